"""Waking incidents: once, in time, and for nothing but a single command while nobody waits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis

from backup_worker.config import Config, load
from backup_worker.queueing.due import STREAM, IncidentDue
from backup_worker.recovery.incident import (
    DEADLINES,
    DEPEND,
    ESCALATED,
    FENCE,
    PROVE,
    QUEUED_AGAIN_S,
    RECOVERED,
    Incident,
    IncidentStore,
)
from backup_worker.recovery.pacemaker import BUSY_TICK_S, IDLE_TICK_S, Pacemaker
from em_bridge import streams
from em_bridge.events import Heartbeat, decode
from tests.living_fleet import Fleet

NOW = 1_795_000_000.0


@pytest.fixture
def client() -> redis.Redis:
    return fakeredis.FakeRedis()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    fleet = Fleet(tmp_path, "redis://127.0.0.1:1/0")
    fleet.add("z")
    fleet.add("jay", depends_on=["z"])
    return load(tmp_path / "config")


def opened(client: redis.Redis, agent: str = "z", *, wake_at: float = NOW, **changes: Any) -> Incident:
    store = IncidentStore(client)
    mark = streams.last_id(client, streams.HEARTBEATS)
    incident, _ = store.open(agent, token=str(NOW), now=NOW, reason="", beat_mark=mark)
    return store.save(replace(incident, **changes), wake_at=wake_at)


def woken(client: redis.Redis) -> list[str]:
    found = [decode(fields) for _, fields in streams.read_range(client, STREAM)]
    assert all(isinstance(event, IncidentDue) for event in found)
    return [event.incident for event in found if isinstance(event, IncidentDue)]


def beat(client: redis.Redis, agent: str, incarnation: str = "new", times: int = 1) -> None:
    for number in range(times):
        streams.append(client, Heartbeat(agent, incarnation, number))


def test_what_is_due_is_moved_once_by_many_pacemakers(client: redis.Redis, config: Config) -> None:
    incident = opened(client, phase=FENCE)
    for _ in range(3):
        for pacemaker in [Pacemaker(client) for _ in range(5)]:
            assert pacemaker.tick(config, NOW) == BUSY_TICK_S
    assert woken(client) == [incident.id]


def test_a_deadline_that_was_seen_before_it_was_moved_is_not_moved_twice(
    client: redis.Redis, config: Config
) -> None:
    incident = opened(client, phase=FENCE)
    slow, fast = Pacemaker(client), Pacemaker(client)
    # The slow one has read that the incident is due; before it moves it, the fast one does.
    seen = client.zscore(DEADLINES, incident.id)
    fast.tick(config, NOW)
    assert slow._move(keys=[DEADLINES, STREAM], args=[incident.id, repr(seen), NOW + 9, "type", "x"]) == 0
    assert woken(client) == [incident.id]


def test_what_is_not_due_is_left_alone(client: redis.Redis, config: Config) -> None:
    opened(client, phase=FENCE, wake_at=NOW + 1)
    Pacemaker(client).tick(config, NOW)
    assert woken(client) == []


def test_a_job_that_was_lost_is_made_up_for(client: redis.Redis, config: Config) -> None:
    incident = opened(client, phase=FENCE)
    pacemaker = Pacemaker(client)
    pacemaker.tick(config, NOW)
    pacemaker.tick(config, NOW + QUEUED_AGAIN_S - 0.1)
    assert woken(client) == [incident.id]
    pacemaker.tick(config, NOW + QUEUED_AGAIN_S)
    assert woken(client) == [incident.id] * 2


def test_an_agent_that_must_prove_itself_is_woken_on_the_last_beat_that_it_needs(
    client: redis.Redis, config: Config
) -> None:
    beat(client, "z", "old", 5)
    incident = opened(client, phase=PROVE, wake_at=NOW + 100, old_incarnations=("old",), start_mark="0-0")
    pacemaker = Pacemaker(client)
    beat(client, "z", "old", 3)
    beat(client, "z", "new", 2)
    pacemaker.tick(config, NOW)
    assert woken(client) == []
    beat(client, "z", "new", 1)
    pacemaker.tick(config, NOW)
    assert woken(client) == [incident.id]


def test_nothing_piles_up_while_no_worker_takes_the_job(client: redis.Redis, config: Config) -> None:
    opened(client, phase=PROVE, wake_at=NOW + 100, start_mark="0-0")
    beat(client, "z", "new", 3)
    pacemaker = Pacemaker(client)
    for tenth in range(40):
        pacemaker.tick(config, NOW + tenth / 10)
    assert len(woken(client)) == 1


def test_a_dependent_is_woken_when_what_it_needs_has_beaten(client: redis.Redis, config: Config) -> None:
    beat(client, "z", times=3)
    incident = opened(client, "jay", phase=DEPEND, wake_at=NOW + 100)
    pacemaker = Pacemaker(client)
    pacemaker.tick(config, NOW)
    assert woken(client) == []
    beat(client, "z")
    pacemaker.tick(config, NOW)
    assert woken(client) == [incident.id]


@pytest.mark.parametrize("end", [None, ESCALATED, RECOVERED])
def test_a_beat_from_before_it_was_given_up_is_no_life_of_a_dependency(
    client: redis.Redis, config: Config, end: str | None
) -> None:
    opened(client, "jay", phase=DEPEND, wake_at=NOW + 100)
    needed = opened(client, "z", phase=PROVE, wake_at=NOW + 100, start_mark="0-0")
    beat(client, "z")
    if end:
        mark = streams.last_id(client, streams.HEARTBEATS)
        IncidentStore(client).save(needed.closed(end, NOW, mark), wake_at=None)
    pacemaker = Pacemaker(client)
    pacemaker.tick(config, NOW)
    assert len(woken(client)) == (1 if end == RECOVERED else 0)
    if end == ESCALATED:
        # Somebody brought it back by hand.
        beat(client, "z")
        pacemaker.tick(config, NOW)
        assert len(woken(client)) == 1


def test_an_incident_of_an_agent_that_left_the_configuration_is_still_woken(
    client: redis.Redis, config: Config
) -> None:
    incident = opened(client, "gone", phase=FENCE)
    Pacemaker(client).tick(config, NOW)
    assert woken(client) == [incident.id]


def test_an_incident_that_is_lost_does_not_stop_the_others(client: redis.Redis, config: Config) -> None:
    lost, other = opened(client, "jay", phase=FENCE), opened(client, "z", phase=FENCE)
    client.delete("backup:incident:" + lost.id)
    Pacemaker(client).tick(config, NOW)
    assert other.id in woken(client)


def test_idle_costs_one_command(client: redis.Redis, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    pacemaker = Pacemaker(client)
    sent: list[Any] = []
    execute = client.execute_command

    def counted(*args: Any, **options: Any) -> Any:
        sent.append(args)
        return execute(*args, **options)

    monkeypatch.setattr(client, "execute_command", counted)
    assert pacemaker.tick(config, NOW) == IDLE_TICK_S
    assert len(sent) == 1, sent


def test_a_closed_incident_leaves_nothing_to_wake(client: redis.Redis, config: Config) -> None:
    incident = opened(client, phase=PROVE, start_mark="0-0")
    IncidentStore(client).save(incident.closed(RECOVERED, NOW, "0-0"), wake_at=None)
    pacemaker = Pacemaker(client)
    assert pacemaker.tick(config, NOW + 100) == IDLE_TICK_S
    assert woken(client) == []


def test_one_that_beats_but_is_not_well_is_left_to_its_next_look(client: redis.Redis, config: Config) -> None:
    pacemaker = Pacemaker(client)
    waits = opened(client, phase=PROVE, start_mark="0-0", unwell="health: exit code 1", wake_at=NOW + 100)
    beat(client, "z", times=5)
    pacemaker.tick(config, NOW)
    assert woken(client) == []
    IncidentStore(client).save(replace(waits, unwell=""), wake_at=NOW + 100)
    pacemaker.tick(config, NOW)
    assert woken(client) == [waits.id]


def test_a_clock_that_is_set_back_makes_nobody_wait_for_it(client: redis.Redis, config: Config) -> None:
    incident = opened(client, wake_at=NOW + 5)
    pacemaker = Pacemaker(client)
    pacemaker.tick(config, NOW)
    assert woken(client) == []
    pacemaker.tick(config, NOW - 3600)
    assert woken(client) == [incident.id]
