"""Recovery under everything that can go wrong around it: who is dead, in what order, and what is away meanwhile.

A few of the cases in `make test`, all of them with `FAULTS=all` (`make faults`).
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest

from backup_worker.approval import changes
from backup_worker.config import ConfigWatch
from backup_worker.recovery.incident import ESCALATED, PROVE, RECOVERED
from backup_worker.recovery.machine import Recovery
from backup_worker.watchdog import LEASE_S, Watchdog
from em_bridge import Publisher, streams
from em_bridge.events import DEAD, Heartbeat, decode, encode
from em_bridge.messages import send_once
from tests.integration.conftest import ValkeyServer
from tests.integration.parts import Part, running
from tests.living_fleet import Fleet, wait_for

EVERYTHING = os.environ.get("FAULTS") == "all"
NEEDS: dict[str, list[str]] = {"z": [], "jay": ["z"], "rick": ["z"], "leroy": ["jay", "rick"]}
SUBSETS = [dead for count in range(5) for dead in itertools.combinations(NEEDS, count)]
AWAY_S = 30 if EVERYTHING else 3
SAMPLE = [("z",), ("jay", "leroy"), ("z", "jay", "rick", "leroy")]


@pytest.fixture
def fleet(valkey: ValkeyServer, tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, valkey.url, limits={"fleet_recoveries": 1000})
    yield fleet
    fleet.close()


def live(fleet: Fleet, needs: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Make and start agents that depend on each other; return their pids."""
    for agent, others in needs.items():
        fleet.add(agent, depends_on=list(others), recovery={"stable_for": 0, "max_recoveries": 99})
        fleet.backup(agent)
    return {agent: fleet.start(agent) for agent in needs}


def die_and_come_back(fleet: Fleet, needs: Mapping[str, Sequence[str]], dead: Sequence[str]) -> None:
    """Wipe and kill `dead`, tell of it, and check in which order they come back, and that nobody else was touched."""
    before = {agent: [one.pid for one in fleet.running(agent)] for agent in needs}
    whole = {agent: fleet.files(agent) for agent in dead}
    for agent in dead:
        fleet.wipe(agent)
        fleet.kill(agent)
    opened = {agent: str(fleet.service.on_state(agent, DEAD, "killed", time.time() + 1)) for agent in dead}
    ends = dict(zip(dead, fleet.drive(*opened.values(), within_s=90), strict=True)) if dead else {}
    for agent, incident in ends.items():
        assert incident.state == RECOVERED, (dead, agent, incident.steps)
        started = next(one.at for one in incident.steps if one.step == "start")
        for other in set(needs[agent]) & set(dead):
            proven = next(one.at for one in ends[other].steps if one.step == "prove")
            assert started >= proven, (dead, agent, other)
        assert fleet.files(agent) == whole[agent], (dead, agent)
        assert len(fleet.running(agent)) == 1, (dead, agent)
    for agent in needs.keys() - set(dead):
        assert [one.pid for one in fleet.running(agent)] == before[agent], (dead, agent)
    assert fleet.alerts() == []


def test_whoever_of_the_four_is_dead_comes_back_in_order_and_nobody_else_is_touched(fleet: Fleet) -> None:
    live(fleet, NEEDS)
    for dead in SUBSETS if EVERYTHING else SAMPLE:
        die_and_come_back(fleet, NEEDS, dead)


@pytest.mark.parametrize("seed", range(8 if EVERYTHING else 1))
def test_any_graph_comes_back_in_order(fleet: Fleet, seed: int) -> None:
    chance = random.Random(seed)
    names = [f"a{number}" for number in range(5)]
    needs = {
        name: chance.sample(names[:number], chance.randint(0, min(2, number)))
        for number, name in enumerate(names)
    }
    live(fleet, needs)
    dead = [name for name in names if chance.random() < 0.7] or names[:1]
    die_and_come_back(fleet, needs, dead)


# ── proof of life, to the second ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("late_s", "lives"), [(-1.0, True), (0.0, True), (1.0, False)])
def test_the_last_beat_counts_up_to_five_minutes_and_not_a_second_longer(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, late_s: float, lives: bool
) -> None:
    fleet.add("z", mode="silent", heartbeat={"verify_within": 300}, recovery={"attempts": 1})
    fleet.backup("z")
    incident = fleet.service.advance(fleet.open("z").id)
    assert incident.phase == PROVE
    assert incident.deadline is not None
    for at in (incident.deadline - 200, incident.deadline - 100, incident.deadline + late_s):
        fields = encode(Heartbeat("z", "new", 1))
        fleet.client.xadd(streams.HEARTBEATS, fields, id=f"{int(at * 1000)}-0")
    # The worker that looks was late itself: what counts is when the beats came.
    monkeypatch.setattr(Recovery, "now", lambda _: incident.deadline + 3)
    ended = fleet.service.advance(incident.id)
    assert ended.state == (RECOVERED if lives else ESCALATED), ended.steps


# ── what cannot be restored ─────────────────────────────────────────────────────────────────────────────────────


def test_when_every_snapshot_is_corrupt_a_human_is_called_and_the_files_stay(fleet: Fleet) -> None:
    fleet.add("z")
    ids = [fleet.backup("z") for _ in range(2)]
    for snapshot in ids:
        stored = fleet.folder / "backups" / snapshot / "files" / "memory" / "notes.md"
        stored.chmod(0o600)
        stored.write_text("remember the silk\n" * 50)
    fleet.wipe("z")
    before = fleet.files("z")
    incident = fleet.recover("z")
    assert incident.state == ESCALATED
    assert fleet.files("z") == before
    facts = json.loads((Path(incident.evidence[-1]) / "incident.json").read_text())
    assert [one["status"] for one in facts["snapshots"]] == ["damaged", "damaged"]


def test_restoring_the_em_rolls_back_neither_the_log_nor_the_approvals(fleet: Fleet) -> None:
    fleet.add("em")
    fleet.backup("em")
    publisher = Publisher(fleet.client)
    publisher.config_proposed(change="c1", agent="em", paths=["mode"], by="em")
    publisher.config_approved(change="c1", by="kari")
    send_once(fleet.client, "z", "jay", b"hello", at=time.time(), line="1")
    log, approvals = fleet.client.xrange(streams.MESSAGES), changes.all_changes(fleet.client)
    fleet.wipe("em")
    assert fleet.recover("em").state == RECOVERED
    assert fleet.client.xrange(streams.MESSAGES)[: len(log)] == log
    assert changes.all_changes(fleet.client) == approvals


# ── what is away meanwhile ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def parts() -> Iterator[list[Part]]:
    with running() as parts:
        yield parts


def worked_on(fleet: Fleet, parts: list[Part]) -> None:
    """Run a dispatcher and a recovery worker."""
    env = {"REDIS_URL": fleet.url, "BACKUP_CONFIG": str(fleet.folder / "config")}
    parts.append(Part(fleet.folder, "dispatcher", env=env))
    parts.append(Part(fleet.folder, "worker", "--queue", "recovery", "--processes", "2", env=env))


@pytest.mark.parametrize("how", ["killed", "frozen"] if EVERYTHING else ["killed"])
def test_a_server_that_is_away_in_the_middle_is_waited_out(
    fleet: Fleet, parts: list[Part], valkey: ValkeyServer, how: str
) -> None:
    fleet.add("z", heartbeat={"verify_within": 60})
    fleet.backup("z")
    whole = fleet.files("z")
    fleet.wipe("z")
    worked_on(fleet, parts)
    with Publisher(fleet.url) as em:
        em.agent_state("z", DEAD, reason="killed")
    wait_for(lambda: fleet.running("z") != [], "the start", within_s=40)
    if how == "killed":
        valkey.kill()
        time.sleep(AWAY_S)
        valkey.start()
    else:
        valkey.freeze()
        time.sleep(AWAY_S)
        valkey.thaw()
    store = fleet.service.store
    wait_for(lambda: not store.open_ids() and any(store.all()), "the end", within_s=60)
    incident = next(iter(store.all()))
    assert incident.state == RECOVERED, incident.steps
    assert fleet.files("z") == whole
    assert len(fleet.running("z")) == 1


def test_a_frozen_watchdog_is_replaced_and_tells_nothing_when_it_wakes_up(
    fleet: Fleet, valkey: ValkeyServer, parts: list[Part]
) -> None:
    fleet.add("em", heartbeat={"dead_after": 2})
    env = {"REDIS_URL": fleet.url, "BACKUP_CONFIG": str(fleet.folder / "config")}
    frozen = Part(fleet.folder, "watchdog", env=env)
    parts.append(frozen)
    frozen.says("watching the EM")
    streams.append(fleet.client, Heartbeat("em", "first", 1))
    os.kill(frozen.process.pid, signal.SIGSTOP)
    second = Watchdog(valkey.client(), ConfigWatch(fleet.folder / "config"))

    def deaths() -> int:
        second.step()
        found = [decode(fields) for _, fields in streams.read_range(fleet.client, streams.AGENT_STATE)]
        return sum(getattr(one, "state", "") == DEAD for one in found)

    began = time.monotonic()
    wait_for(lambda: deaths() == 1, "the death", within_s=LEASE_S + 15, pause_s=0.2)
    assert time.monotonic() - began < LEASE_S + 12
    os.kill(frozen.process.pid, signal.SIGCONT)
    wait_for(lambda: psutil.Process(frozen.process.pid).status() != psutil.STATUS_STOPPED, "it to wake up")
    for _ in range(10):
        assert deaths() == 1
        time.sleep(0.2)
    assert frozen.process.poll() is None
