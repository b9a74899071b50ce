"""When a stream is left unread because its queue is full."""

from __future__ import annotations

from typing import Any

import fakeredis
import pytest

from backup_worker.config.schedule import Limits
from backup_worker.dispatcher import DUE_MARK_TTL_S, MARK_TTL_S, STREAMS, mark_ttl_s, plan
from backup_worker.queueing import due
from backup_worker.queueing.backpressure import HELD_AT, WIDE, held, lengths
from em_bridge import events, streams

LIMIT = 100


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [
        ({}, {}),
        ({"backup": LIMIT}, {}),
        ({"backup": LIMIT + 1}, {streams.CONFIG_CHANGE: "backup"}),
        ({"backup": 60, "backup.one": 60}, {streams.CONFIG_CHANGE: "backup"}),
        ({"recovery": LIMIT + 1}, {streams.AGENT_STATE: "recovery"}),
        ({"maintenance": LIMIT + 1}, {}),
        (
            {"maintenance": LIMIT * WIDE + 1},
            {streams.AGENT_STATE: "maintenance", due.STREAM: "maintenance"},
        ),
        ({"backup": LIMIT * WIDE + 1}, {streams.CONFIG_CHANGE: "backup", due.STREAM: "backup"}),
    ],
)
def test_a_full_queue_holds_the_streams_that_fill_it(
    waiting: dict[str, int], expected: dict[str, str]
) -> None:
    assert held(waiting, LIMIT) == expected


def test_every_stream_and_every_queue_has_an_end() -> None:
    assert set(HELD_AT) == set(STREAMS)
    for kind in ("recovery", "backup", "maintenance"):
        assert held({kind: 10**9}, LIMIT)


def test_a_backlog_of_backups_does_not_hold_the_deaths_of_agents() -> None:
    assert streams.AGENT_STATE not in held({"backup": 10**9}, LIMIT)
    # Nor the deadlines of recoveries, before memory is in danger.
    assert due.STREAM not in held({"backup": LIMIT * 5, "maintenance": LIMIT * 5}, LIMIT)


def test_the_queues_of_all_hosts_are_counted_and_foreign_keys_are_not() -> None:
    client: Any = fakeredis.FakeRedis()
    client.rpush("rq:queue:backup", "a", "b")
    client.rpush("rq:queue:recovery.one", "c")
    client.rpush("rq:queue:stranger", "d")
    client.set("rq:queue:maintenance", "no list")
    names = ("backup", "recovery.one", "recovery.two", "stranger", "maintenance")
    client.sadd("rq:queues", "nonsense", b"rq:queue:\xff", *(f"rq:queue:{name}" for name in names))
    assert lengths(client) == {
        "recovery": 0,
        "backup": 2,
        "maintenance": 0,
        "recovery.one": 1,
        "recovery.two": 0,
    }


def ttl_of(event: events.Event, log_days: float = 7) -> int:
    return mark_ttl_s(plan(event.stream, "1-1", event), Limits(log_days=log_days))


def test_marks_outlive_their_entries_however_long_those_are_kept() -> None:
    for event in (events.AgentState("z", "DEAD"), events.ConfigApplied("c", "z", ("a",))):
        assert ttl_of(event) == MARK_TTL_S
        for days in (20, 400):
            assert ttl_of(event, days) > days * 86400
    assert mark_ttl_s("a dead letter's reason", Limits()) == MARK_TTL_S


def test_marks_of_what_comes_round_by_itself_are_forgotten_after_a_day() -> None:
    for event in (due.IncidentDue("i"), due.MaintenanceDue("watch")):
        assert ttl_of(event, 400) == DUE_MARK_TTL_S
    # A slot comes once, and its job has the slot's name.
    assert ttl_of(due.BackupDue("daily", "s", "z", 0.0)) == MARK_TTL_S
