"""Slots that failed, and when they are tried again."""

from __future__ import annotations

from typing import Any

import fakeredis
import pytest

from backup_worker import slots
from backup_worker.queueing.due import STREAM, BackupDue
from backup_worker.schedule import Due
from em_bridge import events, streams

SLOT = Due("daily", "2026-11-23", "z", 100.0)
NAME = ("daily", "2026-11-23", "z")


@pytest.fixture
def client() -> Any:
    return fakeredis.FakeRedis()


def announced(client: Any) -> list[BackupDue]:
    found = [events.decode(fields) for _, fields in streams.read_range(client, STREAM)]
    return [one for one in found if isinstance(one, BackupDue)]


def test_a_failed_slot_is_announced_when_its_pause_has_ended_and_once(client: Any) -> None:
    pause_s = slots.failed(client, *NAME, attempt=0, now=1000.0)
    assert pause_s == slots.PAUSES_S[0]
    assert slots.announce(client, [SLOT], 1000.0 + pause_s - 1, ttl_s=9) == []
    for _ in range(3):
        assert slots.announce(client, [SLOT], 1000.0 + pause_s, ttl_s=9) == ["daily/2026-11-23/z"]
    assert announced(client) == [BackupDue("daily", "2026-11-23", "z", 100.0, attempt=1)]


def test_the_pauses_grow_and_end(client: Any) -> None:
    now, pauses = 0.0, []
    while (pause_s := slots.failed(client, *NAME, attempt=len(pauses), now=now)) is not None:
        pauses.append(pause_s)
        now += pause_s
        slots.announce(client, [SLOT], now, ttl_s=9)
    assert pauses == sorted(set(pauses))
    assert [one.attempt for one in announced(client)] == list(range(1, len(pauses) + 1))
    assert slots.waiting(client) == {}


def test_a_slot_that_was_made_is_forgotten(client: Any) -> None:
    slots.failed(client, *NAME, attempt=0, now=0.0)
    slots.made(client, *NAME)
    assert slots.announce(client, [SLOT], 1e9, ttl_s=9) == []
    assert announced(client) == []


@pytest.mark.parametrize("current", [[], [Due("daily", "2026-11-24", "z", 200.0)]])
def test_a_slot_whose_time_is_over_is_not_made_any_more(client: Any, current: list[Due]) -> None:
    # The next one is due, or the agent or the tier is gone.
    slots.failed(client, *NAME, attempt=0, now=0.0)
    assert slots.announce(client, current, 1e9, ttl_s=9) == []
    assert slots.waiting(client) == {}
    assert announced(client) == []


@pytest.mark.parametrize("attempt", [-1, 1.5, True, "1", None])
def test_an_attempt_that_is_no_count_makes_no_event(attempt: Any) -> None:
    fields = events.encode(BackupDue("daily", "s", "z", 0.0, attempt=1))
    assert events.decode(fields, stream=STREAM) == BackupDue("daily", "s", "z", 0.0, attempt=1)
    with pytest.raises(events.InvalidEvent):
        events.encode(BackupDue("daily", "s", "z", 0.0, attempt=attempt))
