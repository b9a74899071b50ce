"""A Redis that is away: the scheduler tells people itself, for every other alert needs Redis."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis

from backup_worker.config import ConfigWatch
from backup_worker.demo.pager import Pager
from backup_worker.running import services
from backup_worker.running.absence import AFTER_S, Absence
from em_bridge import clock
from em_bridge.errors import RedisRefused
from tests.small_fleet import SmallFleet


class Clock:
    """Both clocks, moved on by hand."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.at = 1000.0
        patch.setattr(clock, "monotonic", lambda: self.at)
        patch.setattr(clock, "now", lambda: self.at)


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def fleet(tmp_path: Path) -> SmallFleet:
    return SmallFleet(tmp_path)


def absence(fleet: SmallFleet, pager: Pager) -> Absence:
    fleet.edit("backup_schedule.json", lambda document: document.update(alerts=[pager.url]))
    return Absence(ConfigWatch(fleet.config_dir))


def test_a_restart_of_redis_is_told_to_nobody(fleet: SmallFleet, moving: Clock) -> None:
    with Pager() as pager:
        seen = absence(fleet, pager)
        for _ in range(3):
            seen.away("refused")
            moving.at += AFTER_S - 1
            seen.back()
        assert pager.pages == []


def test_a_redis_that_stays_away_is_told_once_with_growing_pauses_and_so_is_its_return(
    fleet: SmallFleet, moving: Clock
) -> None:
    with Pager() as pager:
        seen = absence(fleet, pager)
        told = []
        for _ in range(8 * 360):
            before = len(pager.pages)
            seen.away("nobody answers at 127.0.0.1")
            if len(pager.pages) > before:
                told.append((moving.at - 1000) / 3600)
            moving.at += 10
        assert [round(hour) for hour in told] == [0, 1, 3, 7]
        assert told[0] * 3600 >= AFTER_S
        assert "nobody answers at 127.0.0.1" in pager.pages[0][1]
        assert "docs/runbook.md#redis" in pager.pages[0][1]
        seen.back()
        seen.back()
    assert [title for title, _ in pager.pages[-1:]] == [
        "[resolved] Redis cannot be reached, or takes nothing"
    ]
    assert len(pager.pages) == 5
    kinds = [line["kind"] for line in fleet.history()]
    assert (kinds.count("alert"), kinds.count("alert-resolved")) == (4, 1)


def test_whoever_comes_after_a_killed_scheduler_tells_that_redis_is_back(
    fleet: SmallFleet, moving: Clock
) -> None:
    with Pager() as pager:
        first = absence(fleet, pager)
        first.away("gone")
        moving.at += AFTER_S
        first.away("gone")
        absence(fleet, pager).back()
        assert [title.split()[0] for title, _ in pager.pages] == ["[critical]", "[resolved]"]


def test_a_record_that_cannot_be_written_either_stops_nothing(fleet: SmallFleet, moving: Clock) -> None:
    (fleet.folder / "history.jsonl").mkdir()
    with Pager() as pager:
        seen = absence(fleet, pager)
        seen.away("the disk is full", at_once=True)
        seen.back()
        assert len(pager.pages) == 2


def test_the_loop_of_a_part_tells_of_both_and_of_a_wrong_password_at_once(
    fleet: SmallFleet, moving: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "TICK_S", 0.0)
    client = fakeredis.FakeRedis()
    with Pager() as pager:
        seen = absence(fleet, pager)
        stop = threading.Event()
        answers: list[Any] = [redis.ConnectionError("no"), redis.ConnectionError("no"), 0.0]

        def step() -> float:
            moving.at += AFTER_S
            answer = answers.pop(0)
            if not answers:
                stop.set()
            if isinstance(answer, Exception):
                raise answer
            return 0.0

        services.every(stop, "scheduler", client, step, absence=seen)
        assert [title.split()[0] for title, _ in pager.pages] == ["[critical]", "[resolved]"]
        answers.append(redis.AuthenticationError("WRONGPASS"))
        stop.clear()
        with pytest.raises(RedisRefused):
            services.every(stop, "scheduler", client, step, absence=seen)
        assert [title.split()[0] for title, _ in pager.pages[2:]] == ["[critical]"]
