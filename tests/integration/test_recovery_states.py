"""Which state an agent comes back to, how many are tried, and when a human is called instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backup_worker.recovery.incident import CURRENT, ESCALATED, RECOVERED
from em_bridge.outbox import Outbox
from tests.living_fleet import Fleet, steps, wait_for


def test_a_wiped_agent_comes_back_equal_to_its_backup_and_what_stood_there_is_kept(fleet: Fleet) -> None:
    fleet.add("z")
    pid = fleet.start("z")
    snapshot = fleet.backup("z")
    whole = fleet.files("z")
    fleet.wipe("z")
    wiped = fleet.files("z")
    fleet.kill("z")
    incident = fleet.recover("z")
    assert incident.state == RECOVERED, incident.steps
    assert incident.chosen == (snapshot,)
    assert fleet.files("z") == whole
    kept = Path(incident.evidence[0])
    assert {str(p.relative_to(kept)): p.read_bytes() for p in kept.rglob("*") if p.is_file()} == wiped
    assert f"pid {pid}" in kept.with_name("tree-1.log").read_text()
    assert len(fleet.running("z")) == 1
    assert fleet.alerts() == []


def test_what_an_agent_has_yet_to_say_survives_its_restore(fleet: Fleet) -> None:
    fleet.add("z")
    with Outbox(fleet.root("z") / "z.outbox", "z"):
        fleet.backup("z")
    with Outbox(fleet.root("z") / "z.outbox", "z") as outbox:
        outbox.put("jay", b"my last words")
    fleet.wipe("z")
    assert fleet.recover("z").state == RECOVERED
    with Outbox(fleet.root("z") / "z.outbox", "z") as outbox:
        assert [one.payload for one in outbox.batch()] == [b"my last words"]


def test_a_state_that_dies_at_its_start_gives_way_to_the_next_older_one(fleet: Fleet) -> None:
    fleet.add("z")
    old = fleet.backup("z")
    fleet.set_mode("z", "die")
    new = fleet.backup("z")
    incident = fleet.recover("z")
    assert incident.state == RECOVERED, incident.steps
    assert incident.attempts == 2
    assert incident.tried == (new,)
    assert incident.chosen == (old,)
    assert "this state kills me" in next(one for one in incident.steps if not one.ok).detail


def test_when_every_state_is_bad_a_human_gets_everything_and_the_files_stay_untouched(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.backup("z")
    damaged = fleet.folder / "backups" / fleet.backup("z") / "files" / "SOUL.md"
    damaged.chmod(0o600)
    for file in (fleet.folder / "backups").rglob("files/SOUL.md"):
        file.chmod(0o600)
        file.write_text("I am somebody else.\n")
    fleet.wipe("z")
    suspect = fleet.backup("z")
    before = fleet.files("z")
    incident = fleet.recover("z")
    assert incident.state == ESCALATED
    assert fleet.files("z") == before
    folder = Path(incident.evidence[-1])
    report = (folder / "REPORT.md").read_text()
    facts = json.loads((folder / "incident.json").read_text())
    snapshots = {one["id"]: one["status"] for one in facts["snapshots"]}
    assert sorted(snapshots.values()) == ["damaged", "damaged", "suspect"]
    assert snapshots[suspect] == "suspect"
    for identifier in snapshots:
        assert f"`{identifier}`" in report
    assert "SOUL.md" in report
    assert "**not running**" in report
    assert "nothing was restored" in report
    assert "escalation/z" in fleet.alerts()
    assert "recovery/z" not in fleet.alerts()
    assert [line["step"] for line in fleet.history()][-1] == ESCALATED


def test_an_agent_that_stays_silent_is_tried_again_after_its_deadline_and_then_left_stopped(
    fleet: Fleet,
) -> None:
    fleet.add("z", mode="silent", heartbeat={"verify_within": 0.5}, recovery={"attempts": 2})
    fleet.backup("z")
    fleet.set_mode("z", "die")
    fleet.backup("z")
    incident = fleet.recover("z")
    assert incident.state == ESCALATED
    assert incident.attempts == 2
    assert "0 of 3 beats within 0.5 s" in [one for one in incident.steps if one.step == "prove"][-1].detail
    assert fleet.running("z") == []


def test_an_agent_that_merely_crashed_keeps_what_it_learned_since_the_backup(fleet: Fleet) -> None:
    fleet.add("z", recovery={"first_try": "current"})
    fleet.backup("z")
    (fleet.root("z") / "memory" / "since.md").write_text("learned a minute ago\n")
    before = fleet.files("z")
    incident = fleet.recover("z")
    assert incident.state == RECOVERED
    assert incident.chosen == (CURRENT,)
    assert fleet.files("z") == before
    assert incident.evidence == ()


def test_a_current_state_that_is_not_sane_is_not_started_on(fleet: Fleet) -> None:
    fleet.add("z", recovery={"first_try": "current"})
    snapshot = fleet.backup("z")
    whole = fleet.files("z")
    fleet.wipe("z")
    incident = fleet.recover("z")
    assert incident.state == RECOVERED
    assert incident.attempts == 1
    assert incident.chosen == (snapshot,)
    assert fleet.files("z") == whole
    assert steps(incident)[:4] == ["open", "fence", "select!", "select"]


def test_a_current_state_that_dies_is_replaced_by_the_newest_backup(fleet: Fleet) -> None:
    fleet.add("z", recovery={"first_try": "current"})
    snapshot = fleet.backup("z")
    fleet.set_mode("z", "die")
    incident = fleet.recover("z")
    assert incident.state == RECOVERED
    assert incident.tried == (CURRENT,)
    assert incident.chosen == (snapshot,)


def test_an_insane_current_state_stays_on_the_record_when_there_is_no_backup_either(fleet: Fleet) -> None:
    fleet.add("z", recovery={"first_try": "current"})
    fleet.wipe("z")
    incident = fleet.recover("z")
    assert incident.state == ESCALATED
    assert steps(incident) == ["open", "fence", "select!", "select!"]


@pytest.mark.parametrize("critical", [True, False])
def test_a_critical_agent_calls_a_human_at_its_first_failure_and_still_comes_back(
    fleet: Fleet, critical: bool
) -> None:
    fleet.add("z", critical=critical, heartbeat={"stable_beats": 40})
    fleet.backup("z")
    fleet.set_mode("z", "die")
    bad = fleet.backup("z")
    opened = fleet.open("z")
    wait_for(lambda: fleet.service.advance(opened.id).attempts == 1, "the first failure")
    report = fleet.state / "evidence" / opened.id / "REPORT.md"
    assert ("attempt/z" in fleet.alerts()) == report.exists() == critical
    if critical:
        assert "# z did not come back; its recovery goes on" in report.read_text()
        assert f"`{bad}`" in report.read_text()
        assert json.loads(report.with_name("incident.json").read_text())["incident"]["state"] == "open"
    assert fleet.drive(opened.id)[0].state == RECOVERED
    assert fleet.alerts() == []


def test_a_critical_agent_that_cannot_be_recovered_is_escalated_once_in_the_end(fleet: Fleet) -> None:
    fleet.add("z", mode="die", critical=True, recovery={"attempts": 2, "first_try": "current"})
    fleet.backup("z")
    fleet.wipe("z")
    (fleet.root("z") / "SOUL.md").write_text("I am z.\n")
    incident = fleet.recover("z")
    assert incident.state == ESCALATED
    assert fleet.alerts() == ["escalation/z"]
    told = [line["key"] for line in fleet.history("alert")]
    assert told == ["recovery/z", "attempt/z", "escalation/z"]
