"""Before anything is ended or overwritten: is it really dead, did it die on this state before, and are many silent?"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import msgpack
import pytest

from backup_worker.recovery import witnesses
from backup_worker.recovery.incident import CONFIRM, CURRENT, ESCALATED, RECOVERED, Incident
from em_bridge import streams
from tests.integration.dying_worker import worker_that_dies
from tests.living_fleet import Fleet, steps, wait_for


def told(fleet: Fleet, agent: str, *, last_beat: float | None = None) -> str:
    """Tell of a death as the monitor does; return the incident's id. The state is noted first, as the EM notes it."""
    now = time.time()
    record = {"state": "DEAD", "since": now, "last_beat": now if last_beat is None else last_beat}
    fleet.client.hset(streams.STATES, agent, msgpack.packb(record))
    incident = fleet.service.on_state(agent, "DEAD", "silence", now + 1)
    assert incident is not None
    return incident


def dead(fleet: Fleet, agent: str) -> Incident:
    return fleet.drive(told(fleet, agent))[0]


# ── the second witness ──────────────────────────────────────────────────────────────────────────────────────────


def test_one_that_is_told_dead_and_beats_is_left_alone(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.backup("z")
    pid = fleet.start("z")
    (fleet.root("z") / "memory" / "since.md").write_text("learned since\n")
    incident = dead(fleet, "z")
    assert (incident.state, incident.attempts, steps(incident)) == (RECOVERED, 0, ["open", "confirm"])
    assert "nothing was changed" in incident.steps[-1].detail
    assert [one.pid for one in fleet.running("z")] == [pid]
    assert (fleet.root("z") / "memory" / "since.md").exists()
    assert fleet.alerts() == []


def test_one_whose_process_is_gone_is_recovered_at_once(fleet: Fleet) -> None:
    fleet.add("z", heartbeat={"dead_after": 60})
    fleet.backup("z")
    incident = dead(fleet, "z")
    assert incident.state == RECOVERED
    assert incident.steps[1].detail == "no process of it is left"
    assert incident.steps[-1].at - incident.opened_at < 30


def test_one_that_is_frozen_is_ended_only_after_a_second_silence(fleet: Fleet) -> None:
    fleet.add("z", heartbeat={"dead_after": 1})
    fleet.backup("z")
    pid = fleet.start("z")
    os.kill(pid, signal.SIGSTOP)
    incident = dead(fleet, "z")
    assert incident.state == RECOVERED
    confirmed = incident.steps[1]
    assert confirmed.at - incident.opened_at >= 1
    assert "silent for another 1 s" in confirmed.detail
    assert [one.pid for one in fleet.running("z")] != [pid]


def test_a_frozen_one_that_wakes_up_in_the_second_silence_keeps_its_life(fleet: Fleet) -> None:
    fleet.add("z", heartbeat={"dead_after": 5})
    fleet.backup("z")
    pid = fleet.start("z")
    os.kill(pid, signal.SIGSTOP)
    opened = told(fleet, "z")
    assert fleet.service.store.get(opened).phase == CONFIRM
    os.kill(pid, signal.SIGCONT)
    incident = fleet.drive(opened)[0]
    assert (incident.state, incident.attempts) == (RECOVERED, 0)
    assert [one.pid for one in fleet.running("z")] == [pid]


def test_a_humans_word_needs_no_second_witness(fleet: Fleet) -> None:
    fleet.add("z", heartbeat={"dead_after": 300})
    fleet.backup("z")
    pid = fleet.start("z")
    os.kill(pid, signal.SIGSTOP)
    opened = told(fleet, "z")
    assert fleet.open("z").id == opened
    incident = fleet.drive(opened)[0]
    assert incident.state == RECOVERED
    assert incident.by_hand
    assert [one.pid for one in fleet.running("z")] != [pid]


def test_a_worker_may_be_killed_around_the_second_witness(fleet: Fleet) -> None:
    fleet.add("z", recovery={"stable_for": 0})
    fleet.backup("z")
    whole = fleet.files("z")
    for number in range(1, 5):
        fleet.wipe("z")
        opened = fleet.service._open("z", "killed", phase=CONFIRM)[0]
        assert worker_that_dies(fleet, opened.id, "a write of the incident", number)
        incident = fleet.drive(opened.id)[0]
        assert (incident.state, incident.attempts) == (RECOVERED, 1), incident.steps
        assert fleet.files("z") == whole
        fleet.kill("z")


# ── the same state again ────────────────────────────────────────────────────────────────────────────────────────


def three_states(fleet: Fleet, **options: object) -> list[str]:
    """Return three snapshots of z, all of which live, the newest first."""
    fleet.add("z", **options)
    ids = []
    for number in range(3):
        (fleet.root("z") / "memory" / "number").write_text(f"{number}\n")
        ids.append(fleet.backup("z"))
    return ids[::-1]


def test_a_state_that_dies_soon_after_its_recovery_gives_way_to_the_next_older_one(fleet: Fleet) -> None:
    newest, middle, oldest = three_states(fleet)
    chosen = []
    for _ in range(3):
        incident = dead(fleet, "z")
        assert incident.state == RECOVERED, incident.steps
        chosen.append(incident.chosen[0])
        restored = next(one for one in incident.steps if one.step == "restore")
        assert "lost" in restored.detail, "what it costs is said of each"
        fleet.kill("z")
    assert chosen == [newest, middle, oldest]
    fourth = dead(fleet, "z")
    assert fourth.state == ESCALATED
    assert "3 states were tried" in fleet.history()[-1]["detail"]
    assert fleet.running("z") == []


def test_one_that_lived_on_its_state_long_enough_gets_it_again(fleet: Fleet) -> None:
    newest, *_ = three_states(fleet, recovery={"stable_for": 0.5})
    for _ in range(2):
        incident = dead(fleet, "z")
        assert incident.chosen[0] == newest
        time.sleep(0.6)
        fleet.kill("z")


def test_the_only_state_there_is_gets_all_the_attempts_before_a_human_is_called(fleet: Fleet) -> None:
    fleet.add("z")
    only = fleet.backup("z")
    ends = []
    for _ in range(4):
        incident = dead(fleet, "z")
        ends.append((incident.state, incident.chosen))
        fleet.kill("z")
    assert ends == [(RECOVERED, (only,))] * 3 + [(ESCALATED, ())]


def test_a_crash_loop_that_beats_once_and_dies_comes_to_an_end(fleet: Fleet) -> None:
    fleet.add("z", heartbeat={"stable_beats": 1})
    fleet.backup("z")
    fleet.set_mode("z", "fade")
    fleet.backup("z")
    ends = []
    for _ in range(3):
        incident = dead(fleet, "z")
        ends.append(incident.state)
        if "fade" not in (fleet.root("z") / "mode").read_text():
            break
        wait_for(lambda: not fleet.running("z"), "it to fade")
    assert ends == [RECOVERED, RECOVERED], "the older state lives"
    assert len(fleet.running("z")) == 1


def test_by_hand_the_newest_state_is_tried_again(fleet: Fleet) -> None:
    newest, *_ = three_states(fleet)
    assert dead(fleet, "z").chosen[0] == newest
    fleet.kill("z")
    assert fleet.recover("z").chosen[0] == newest


# ── a host that was started anew ────────────────────────────────────────────────────────────────────────────────


def test_after_a_restart_of_the_host_an_agent_is_simply_started(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.backup("z")
    (fleet.root("z") / "memory" / "since.md").write_text("learned since\n")
    incident = fleet.drive(told(fleet, "z", last_beat=time.time() - witnesses.up_s() - 10))[0]
    assert (incident.state, incident.chosen) == (RECOVERED, (CURRENT,))
    assert (fleet.root("z") / "memory" / "since.md").exists()
    assert "host was started" in next(one for one in incident.steps if one.step == "select").detail


def test_after_a_restart_a_state_that_is_not_sane_is_restored(fleet: Fleet) -> None:
    fleet.add("z")
    stored = fleet.backup("z")
    fleet.wipe("z")
    incident = fleet.drive(told(fleet, "z", last_beat=time.time() - witnesses.up_s() - 10))[0]
    assert (incident.state, incident.chosen) == (RECOVERED, (stored,))


# ── many at once ────────────────────────────────────────────────────────────────────────────────────────────────

FLEET = ("z", "jay", "rick", "leroy")


@pytest.fixture
def silent(fleet: Fleet) -> Iterator[Fleet]:
    """Four agents, all frozen; the first has ended besides."""
    for agent in FLEET:
        fleet.add(agent, heartbeat={"dead_after": 1})
        fleet.backup(agent)
        os.kill(fleet.start(agent), signal.SIGSTOP)
    fleet.kill("z")
    for agent in FLEET:
        record = {"state": "DEAD", "since": time.time(), "last_beat": time.time()}
        fleet.client.hset(streams.STATES, agent, msgpack.packb(record))
    # The server has not just been started.
    time.sleep(1.0)
    yield fleet


def test_of_a_silent_fleet_who_has_ended_is_recovered_and_who_runs_is_held(silent: Fleet) -> None:
    before = {agent: [one.pid for one in silent.running(agent)] for agent in FLEET}
    ids = {agent: told(silent, agent) for agent in FLEET}
    assert silent.drive(ids["z"])[0].state == RECOVERED
    time.sleep(1.2)
    for agent in FLEET[1:]:
        held = silent.service.advance(ids[agent])
        assert (held.phase, steps(held)[-1]) == (CONFIRM, "hold")
        assert [one.pid for one in silent.running(agent)] == before[agent]
    assert "mass-silence" in silent.alerts()
    # One wakes up, one ends, for one a human has decided.
    os.kill(before["jay"][0], signal.SIGCONT)
    silent.kill("rick")
    silent.open("leroy")
    ends = dict(zip(FLEET[1:], silent.drive(*(ids[agent] for agent in FLEET[1:])), strict=True))
    assert {one.state for one in ends.values()} == {RECOVERED}
    assert {agent: one.attempts for agent, one in ends.items()} == {"jay": 0, "rick": 1, "leroy": 1}
    assert [one.pid for one in silent.running("jay")] == before["jay"]
    assert silent.alerts() == []


def test_of_a_silent_fleet_nobody_is_recovered_while_the_host_is_not_well(
    silent: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(witnesses, "LEAST_MEMORY", 2.0)
    opened = told(silent, "z")
    held = silent.service.advance(opened)
    assert steps(held) == ["open", "hold"]
    assert "memory" in held.steps[-1].detail
    assert silent.running("z") == []
    assert "mass-silence" in silent.alerts()
    monkeypatch.undo()
    assert silent.drive(opened)[0].state == RECOVERED
