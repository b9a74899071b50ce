"""Proof of life: of the new process, of no other one, and of its health."""

from __future__ import annotations

import os
import subprocess
import sys

from backup_worker.recovery.incident import ESCALATED, RECOVERED
from em_bridge import streams
from em_bridge.events import Heartbeat
from tests.living_fleet import Fleet, steps, wait_for


def test_an_agent_whose_only_process_has_ended_is_not_recovered_by_its_beats(fleet: Fleet) -> None:
    fleet.add("z", mode="fade", heartbeat={"stable_beats": 4})
    fleet.backup("z")
    opened = fleet.open("z")
    fleet.service.advance(opened.id)
    wait_for(lambda: not fleet.running("z"), "z to end")
    incident = fleet.drive(opened.id)[0]
    assert incident.state == ESCALATED, steps(incident)


def test_beats_of_the_old_incarnation_never_count(fleet: Fleet) -> None:
    fleet.add("z", mode="silent", heartbeat={"verify_within": 1.0}, recovery={"attempts": 1})
    fleet.backup("z")
    streams.append(fleet.client, Heartbeat("z", "old", 1))
    opened = fleet.open("z")
    for number in range(10):
        streams.append(fleet.client, Heartbeat("z", "old", 2 + number))
        fleet.service.advance(opened.id)
    incident = fleet.drive(opened.id)[0]
    assert incident.state == ESCALATED
    assert "old" in incident.old_incarnations


def test_one_that_is_started_by_hand_during_a_recovery_is_never_a_second_one(fleet: Fleet) -> None:
    fleet.add("z", heartbeat={"stable_beats": 100})
    fleet.backup("z")
    opened = fleet.open("z")
    fleet.service.advance(opened.id)
    assert fleet.service.store.get(opened.id).phase == "prove"
    command = fleet.entries["z"]["start"]["command"]
    environment = {**os.environ, "REDIS_URL": fleet.url, "AGENT_ID": "z"}
    by_hand = subprocess.Popen(command, cwd=fleet.root("z"), env=environment)
    try:
        fleet.entries["z"]["heartbeat"]["stable_beats"] = 3
        fleet.write()
        wait_for(lambda: len(fleet.running("z")) == 2, "two of them")
        incident = fleet.drive(opened.id)[0]
        assert incident.state == RECOVERED, incident.steps
        assert by_hand.wait(5) is not None
        assert len(fleet.running("z")) == 1
        assert incident.attempts == 2
        assert incident.tried == ()
        assert any(str(by_hand.pid) in one.detail for one in incident.steps if not one.ok)
    finally:
        by_hand.kill()
        by_hand.wait()


def test_one_that_is_started_by_hand_before_the_start_is_ended_first(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.add("jay", depends_on=["z"])
    fleet.backup("jay")
    opened = fleet.open("jay")
    fleet.service.advance(opened.id)
    assert fleet.service.store.get(opened.id).phase == "depend"
    environment = {**os.environ, "REDIS_URL": fleet.url, "AGENT_ID": "jay"}
    by_hand = subprocess.Popen([sys.executable, "agent.py"], cwd=fleet.root("jay"), env=environment)
    fleet.start("z")
    incident = fleet.drive(opened.id)[0]
    assert incident.state == RECOVERED
    assert incident.attempts == 1
    assert by_hand.wait(5) is not None
    assert len(fleet.running("jay")) == 1


def test_one_that_beats_but_is_not_well_is_not_recovered_until_it_is(fleet: Fleet) -> None:
    health = (
        "import os, sys; print('warming up'); sys.exit(not os.path.exists(os.environ['AGENT_ID'] + '.warm'))"
    )
    fleet.add("z", health=[sys.executable, "-c", health])
    fleet.backup("z")
    opened = fleet.open("z")
    wait_for(lambda: "health!" in steps(fleet.service.advance(opened.id)), "the first examination")
    assert [one.detail for one in fleet.service.store.get(opened.id).steps][
        -1
    ] == "health: exit code 1: warming up"
    fleet.service.advance(opened.id)
    (fleet.root("z") / "z.warm").touch()
    incident = fleet.drive(opened.id)[0]
    assert incident.state == RECOVERED
    assert incident.attempts == 1
    assert steps(incident)[-3:] == ["start", "health!", "prove"], "an answer is kept once"
    assert "health: exit code 0: warming up" in incident.steps[-1].detail


def test_a_state_on_which_the_agent_beats_but_is_never_well_gives_way_to_an_older_one(fleet: Fleet) -> None:
    health = "import sys; sys.exit('poison' if 'poison' in open('SOUL.md').read() else 0)"
    fleet.add("z", health=[sys.executable, "-c", health], heartbeat={"verify_within": 1.5})
    old = fleet.backup("z")
    (fleet.root("z") / "SOUL.md").write_text("I am poison.\n")
    new = fleet.backup("z")
    incident = fleet.recover("z")
    assert incident.state == RECOVERED
    assert (incident.tried, incident.chosen) == ((new,), (old,))
    failed = next(one for one in incident.steps if one.step == "prove" and not one.ok)
    assert "beats within 1.5 s: health: exit code 1: poison" in failed.detail


def test_one_that_dies_while_it_is_examined_is_not_recovered(fleet: Fleet) -> None:
    health = "import os, signal; os.kill(int(open('pid').read()), signal.SIGKILL)"
    fleet.add("z", health=[sys.executable, "-c", health], recovery={"attempts": 1})
    program = fleet.root("z") / "agent.py"
    program.write_text("import os; open('pid', 'w').write(str(os.getpid()))\n" + program.read_text())
    fleet.backup("z")
    incident = fleet.recover("z")
    assert incident.state == ESCALATED
    assert "the new process has ended" in fleet.history()[-1]["detail"]
