"""When recovery stands still: a human's pause, an agent that dies again and again, a fleet that does."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis

from backup_worker.config import Config, load
from backup_worker.maintenance import maintain
from backup_worker.recovery import breakers
from backup_worker.recovery.breakers import Pause
from backup_worker.recovery.incident import DEADLINES, ESCALATED, RECOVERED, Incident
from tests.integration.conftest import ValkeyServer
from tests.living_fleet import Fleet, cli, steps

NOW = 1_795_000_000.0


def command(fleet: Fleet, *arguments: str, code: int = 0) -> Any:
    result = cli(fleet, *arguments, "--json", "--redis-url", fleet.url)
    assert result.returncode == code, result.stderr
    return json.loads(result.stdout) if result.stdout else result.stderr


def dead(fleet: Fleet, agent: str) -> Incident:
    """Tell of a death as the monitor does, and drive the incident to its end."""
    incident = fleet.service.on_state(agent, "DEAD", "silence", time.time() + 1)
    assert incident is not None
    return fleet.drive(incident)[0]


# ── pause ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_dies_while_recovery_is_paused_waits_untouched_and_goes_on_at_the_resume(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.backup("z")
    fleet.wipe("z")
    before = fleet.files("z")
    paused = command(fleet, "pause-recovery", "--reason", "moving disks", "--by", "kari")
    assert paused == {
        "paused": True,
        "by": "kari",
        "reason": "moving disks",
        "until": None,
        "since": paused["since"],
    }
    opened = fleet.service.on_state("z", "DEAD", "silence", time.time())
    assert opened is not None
    for _ in range(3):
        held = fleet.service.advance(opened)
    assert steps(held) == ["open", "confirm", "paused"], "said once"
    assert held.is_open
    assert fleet.files("z") == before
    assert set(fleet.alerts()) == {"recovery-paused", "recovery/z"}
    assert command(fleet, "status")["recovery_paused"]["by"] == "kari"
    assert "RECOVERY IS PAUSED" in cli(fleet, "status", "--redis-url", fleet.url).stdout
    resumed = command(fleet, "resume-recovery", "--by", "ola")
    assert (resumed["paused"], resumed["waiting"]) == (False, ["z"])
    assert fleet.client.zscore(DEADLINES, opened) <= time.time(), "it is woken at once"
    assert fleet.drive(opened)[0].state == RECOVERED
    assert fleet.alerts() == []
    assert [line["by"] for line in fleet.history("recovery-paused")] == ["kari"]
    assert [line["by"] for line in fleet.history("recovery-resumed")] == ["ola"]


def test_a_pause_outlives_the_server_and_ends_by_itself_at_its_time(
    fleet: Fleet, valkey: ValkeyServer
) -> None:
    fleet.add("z")
    fleet.backup("z")
    command(fleet, "pause-recovery", "--until", str(time.time() + 4))
    opened = fleet.service.open("z", "by hand")
    valkey.restart()
    assert steps(fleet.service.advance(opened.id)) == ["open", "paused"]
    incident = fleet.drive(opened.id)[0]
    assert incident.state == RECOVERED
    assert fleet.alerts() == []
    assert len(fleet.history("recovery-resumed")) == 1


def test_a_pause_in_which_nobody_dies_ends_at_its_time_too(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.service.pause("kari", "", until=time.time() + 0.3)
    maintain.run(fleet.runtime, "watch", now=time.time())
    assert "recovery-paused" in fleet.alerts()
    time.sleep(0.4)
    maintain.run(fleet.runtime, "watch", now=time.time())
    assert "recovery-paused" not in fleet.alerts()
    assert breakers.stored(fleet.client) is None


def test_a_recovery_that_has_begun_to_act_goes_on_through_a_pause(fleet: Fleet) -> None:
    fleet.add("z", heartbeat={"stable_beats": 30})
    fleet.backup("z")
    opened = fleet.open("z")
    assert fleet.service.advance(opened.id).phase == "prove"
    fleet.service.pause("kari", "")
    assert fleet.drive(opened.id)[0].state == RECOVERED


def test_one_that_a_human_started_during_the_pause_is_left_alone_at_the_resume(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.backup("z")
    fleet.service.pause("kari", "")
    opened = fleet.service.on_state("z", "DEAD", "silence", time.time())
    assert opened is not None
    fleet.service.advance(opened)
    (fleet.root("z") / "memory" / "since.md").write_text("learned after the repair\n")
    pid = fleet.start("z")
    fleet.service.resume("kari")
    incident = fleet.drive(opened)[0]
    assert incident.state == RECOVERED
    assert "it came back while recovery was paused" in incident.steps[-1].detail
    assert [one.pid for one in fleet.running("z")] == [pid]
    assert (fleet.root("z") / "memory" / "since.md").exists()


def test_the_commands_say_what_cannot_be(fleet: Fleet) -> None:
    fleet.add("z")
    assert "not paused" in command(fleet, "resume-recovery", code=4)
    assert "over already" in command(fleet, "pause-recovery", "--until", "2020-01-01", code=2)
    command(fleet, "pause-recovery")
    waits = cli(fleet, "recover", "z", "--redis-url", fleet.url)
    assert waits.returncode == 0
    assert "recovery is paused: this waits" in waits.stderr


# ── intensity ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_agent_that_dies_again_and_again_is_given_to_a_human_and_nobody_else_is(fleet: Fleet) -> None:
    fleet.add("z", recovery={"max_recoveries": 2, "stable_for": 0})
    fleet.add("jay")
    fleet.backup("z")
    fleet.backup("jay")
    for _ in range(2):
        assert dead(fleet, "z").state == RECOVERED
        fleet.kill("z")
    third = dead(fleet, "z")
    assert third.state == ESCALATED
    assert steps(third) == ["open", "confirm", "breaker!"]
    assert "recovered 2 times within 3600 s" in third.steps[-1].detail
    assert (Path(third.evidence[-1]) / "REPORT.md").exists()
    assert "escalation/z" in fleet.alerts()
    assert dead(fleet, "jay").state == RECOVERED
    assert fleet.recover("z").state == RECOVERED, "by hand it is always possible"


def test_a_fleet_that_dies_again_and_again_is_paused_loudly_until_a_human_resumes(fleet: Fleet) -> None:
    schedule = fleet.folder / "config" / "backup_schedule.json"
    facts = json.loads(schedule.read_text())
    facts["limits"]["fleet_recoveries"] = 2
    schedule.write_text(json.dumps(facts))
    for agent in ("z", "jay", "rick"):
        fleet.add(agent)
        fleet.backup(agent)
    assert [dead(fleet, agent).state for agent in ("z", "jay")] == [RECOVERED] * 2
    opened = fleet.service.on_state("rick", "DEAD", "silence", time.time())
    assert opened is not None
    assert steps(fleet.service.advance(opened)) == ["open", "confirm", "paused"]
    assert (
        "2 recoveries within 60 minutes; the limit is 2" in fleet.service.store.get(opened).steps[-1].detail
    )
    assert {"recovery-paused", "recovery/rick"} <= set(fleet.alerts())
    assert command(fleet, "status")["recovery_paused"]["by"] == "breaker"
    fleet.service.resume("kari")
    assert fleet.drive(opened)[0].state == RECOVERED, "what was before the resume is forgiven"


def test_an_agent_that_falls_silent_and_comes_back_all_the_time_is_given_to_a_human_as_it_is(
    fleet: Fleet,
) -> None:
    fleet.add("z", recovery={"max_recoveries": 2})
    fleet.backup("z")
    pid = fleet.start("z")
    for _ in range(2):
        calm = dead(fleet, "z")
        assert (calm.state, calm.attempts, steps(calm)) == (RECOVERED, 0, ["open", "confirm"])
    third = dead(fleet, "z")
    assert (third.state, steps(third)) == (ESCALATED, ["open", "breaker!"])
    assert [one.pid for one in fleet.running("z")] == [pid], "a human decides"
    assert fleet.client.zcard("backup:recovery:done") == 0, "it says nothing about the fleet"


# ── counting ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def client() -> redis.Redis:
    return fakeredis.FakeRedis()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    fleet = Fleet(tmp_path, "redis://127.0.0.1:1/0")
    fleet.add("z", recovery={"max_recoveries": 2, "max_recoveries_within": 100})
    fleet.add("jay")
    return load(tmp_path / "config")


def count(client: redis.Redis, agent: str, at: float, *, by_hand: bool = False) -> None:
    done = Incident(f"{agent}-{at}", agent, at - 5, attempts=1, by_hand=by_hand)
    breakers.count(client, replace(done, closed_at=at))


def test_only_recoveries_within_the_period_and_of_that_agent_count(
    client: redis.Redis, config: Config
) -> None:
    for agent, at in (("z", NOW - 100), ("z", NOW - 1), ("z", NOW - 1), ("jay", NOW - 1), ("jay", NOW)):
        count(client, agent, at)
    assert breakers.agent_tripped(client, config, "z", NOW) is None
    count(client, "z", NOW)
    assert breakers.agent_tripped(client, config, "z", NOW) is not None
    assert breakers.agent_tripped(client, config, "z", NOW + 99) is None


def test_a_whole_fleet_that_dies_once_does_not_trip_its_breaker(client: redis.Redis, config: Config) -> None:
    for number in range(breakers.AT_LEAST - 1):
        count(client, f"agent{number}", NOW - number)
    assert breakers.fleet_tripped(client, config, NOW) is None
    many = replace(config, agents={f"a{number}": config.agents["jay"] for number in range(20)})
    count(client, "jay", NOW)
    assert breakers.fleet_tripped(client, config, NOW) is not None
    assert breakers.fleet_tripped(client, many, NOW) is None
    assert breakers.fleet_tripped(client, config, NOW + 3600) is None


def test_what_a_human_has_started_does_not_trip_the_breaker_of_the_fleet(
    client: redis.Redis, config: Config
) -> None:
    for number in range(breakers.AT_LEAST + 1):
        count(client, f"agent{number}", NOW - number, by_hand=True)
    assert breakers.fleet_tripped(client, config, NOW) is None


def test_a_second_pause_keeps_the_beginning_of_the_first(client: redis.Redis) -> None:
    breakers.pause(client, Pause(NOW, "kari"))
    breakers.pause(client, Pause(NOW + 9, "ola", "disks", NOW + 20))
    assert breakers.paused(client, NOW + 19) == Pause(NOW, "ola", "disks", NOW + 20)
    assert breakers.paused(client, NOW + 20) is None
    assert breakers.stored(client) is not None
    assert breakers.resume(client, NOW + 21) is not None
    assert breakers.resume(client, NOW + 21) is None


def test_nothing_is_remembered_for_ever(client: redis.Redis, config: Config) -> None:
    count(client, "z", NOW - breakers.KEPT_S - 1)
    count(client, "z", NOW)
    assert client.zcard("backup:recovery:done") == 1
    assert client.zcard("backup:recovery:done:z") == 1
