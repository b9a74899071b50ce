"""What is applied against what was approved: byte by byte, on disk."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from backup_worker import alerts, backups
from backup_worker.approval import approvals, change_events, changes, guard, guarded
from backup_worker.approval.approved import ApprovedStates
from backup_worker.restoring import revert
from backup_worker.snapshots import Manifest, NoSpace
from backup_worker.snapshots.content import copy_hashed
from em_bridge import events
from tests.change_house import BOTH, NEW, OTHER, WEIGHTS, House
from tests.small_fleet import ON_CHANGE


@pytest.fixture
def house(tmp_path: Path) -> House:
    house = House(tmp_path)
    house.scan()
    return house


def test_what_was_approved_and_applied_is_approved_and_becomes_the_approved_state(house: House) -> None:
    house.propose()
    house.approve()
    house.write(NEW)
    made = house.apply()
    assert (made.approved, made.approved_by) == (True, "kari")
    assert house.approved() == NEW
    assert house.critical() == []
    (line,) = [one for one in house.fleet.history("change") if one["event"] == "config.applied"]
    assert line["sha256"] == {WEIGHTS: hashlib.sha256(NEW).hexdigest()}


def test_one_other_byte_than_was_approved_is_unapproved_and_alerts(house: House) -> None:
    house.propose()
    house.approve()
    house.write(NEW[:-1] + b" ")
    made = house.apply()
    assert (made.approved, made.approved_by) == (False, None)
    assert house.critical() == ["unapproved/c1"]
    assert "not what was approved" in alerts.open_alerts(house.client)[0].body
    assert house.approved() == b'{"speed": 0.5}\n'


def test_the_em_s_word_does_not_cover_other_bytes_than_were_proposed(house: House) -> None:
    house.propose()
    house.write(OTHER)
    assert house.apply(approved_by="kari").approved is False


def test_what_was_approved_but_not_written_is_unapproved(house: House) -> None:
    house.propose()
    house.approve()
    assert house.apply().approved is False
    (house.fleet.root() / WEIGHTS).unlink()
    assert house.apply().approved is False


def test_an_approval_backs_up_the_state_before_and_an_application_the_state_after(house: House) -> None:
    house.propose()
    (before,) = house.approve()
    house.write(NEW)
    after = house.apply()
    stored = [
        (house.fleet.repository.path(one.id) / "files" / WEIGHTS).read_bytes() for one in (before, after)
    ]
    assert stored == [b'{"speed": 0.5}\n', NEW]
    assert before.approved is None
    assert "config.approved c1" in before.reason


def test_an_approval_that_does_not_count_backs_up_nothing(house: House) -> None:
    house.propose()
    assert house.approve(by="em") == []
    assert house.approve(by="kari") != []
    assert house.approve(by="ola") == []


def test_an_approval_given_unseen_is_bound_to_the_first_bytes_and_says_so(house: House) -> None:
    house.propose(None)
    house.approve()
    house.write(NEW)
    assert house.apply().approved is True
    state = ApprovedStates(house.runtime.repository).load("z")
    assert state is not None
    assert state.files[WEIGHTS].how == "unseen"
    assert house.apply().approved is True
    house.write(OTHER)
    made = house.apply()
    assert made.approved is False
    assert "given unseen" in house.fleet.history("change")[-1]["why"]


def test_a_folder_that_was_approved_unseen_covers_the_files_in_it_once(house: House) -> None:
    house.propose(None, path="rules")
    house.approve()
    house.write(b"be kind\n", "rules/one.md")
    house.write(b"be brief\n", "rules/two.md")
    assert house.apply(paths=("rules",)).approved is True
    house.write(b"be cruel\n", "rules/two.md")
    assert house.apply(paths=("rules",)).approved is False


def test_the_same_path_written_in_another_way_is_the_same_path(house: House) -> None:
    proposed = events.ConfigProposed("c1", "z", ("./weights.json",), "em", proposed={"./weights.json": NEW})
    house.handle(proposed)
    house.approve()
    house.write(NEW)
    assert house.apply(paths=("weights.json",)).approved is True


def test_two_changes_applied_before_anybody_looked_are_both_approved(house: House) -> None:
    # Everything was down: both events are handled when the second content stands there already.
    house.propose(NEW, change="c1")
    house.approve("c1")
    house.propose(OTHER, change="c2")
    house.approve("c2")
    house.write(OTHER)
    assert house.apply("c1").approved is True
    assert house.apply("c2").approved is True
    assert house.approved() == OTHER


def test_an_older_approval_does_not_cover_what_came_after_a_newer_one(house: House) -> None:
    for change, content in (("c1", NEW), ("c2", OTHER)):
        house.propose(content, change=change)
        house.approve(change)
        house.write(content)
        house.apply(change)
    house.write(NEW)
    assert house.scan()["deviating"] == [WEIGHTS]


def test_an_expired_proposal_cannot_be_approved(house: House) -> None:
    house.propose()
    house.now += 15 * 86400
    house.approve()
    rules = approvals.rules(house.runtime.config, house.now)
    found = changes.get(house.client, "c1", rules)
    assert (found.state, found.decision) == ("expired", "")
    assert "expired" in found.refused[0]
    house.write(NEW)
    assert house.apply().approved is False


def test_a_change_that_no_snapshot_covers_is_judged_by_the_files_themselves(tmp_path: Path) -> None:
    only_charter = {**ON_CHANGE, "include": ["charter"]}
    house = House(tmp_path, {"on-change": only_charter})
    house.scan()
    house.propose()
    house.approve()
    house.write(OTHER)
    assert house.apply().approved is False
    house.write(NEW)
    house.propose(change="c2")
    house.approve("c2")
    assert house.apply("c2").approved is True
    assert house.approved() == NEW


def test_a_second_run_of_the_same_event_says_the_same(house: House) -> None:
    house.propose()
    house.approve()
    house.write(NEW)
    event = events.ConfigApplied("c1", "z", (WEIGHTS,), "em")
    entry = house.publish(event)
    first = change_events.handle(house.runtime, event, entry, now=house.now)
    house.write(OTHER)
    again = change_events.handle(house.runtime, event, entry, now=house.now + 9)
    assert [one.id for one in again] == [one.id for one in first]
    assert again[0].approved is True
    assert house.approved() == NEW
    assert len([one for one in house.fleet.history("change") if one["event"] == "config.applied"]) == 1


# ── the watch ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_change_by_hand_while_nothing_ran_is_backed_up_marked_told_and_proposed(house: House) -> None:
    house.write(OTHER)
    assert house.scan(600) == {"deviating": [WEIGHTS], "fresh": [], "files": 2}
    (head,) = house.fleet.repository.snapshots()
    assert (head.tier, head.approved) == ("on-change", False)
    (key,) = house.critical()
    assert key.startswith("unapproved/z/")
    assert "backup-worker revert z" in alerts.open_alerts(house.client)[0].body
    (line,) = house.fleet.history("unapproved")
    assert line["snapshot"] == head.id
    (change,) = changes.all_changes(house.client)
    assert (change.by, change.state, change.proposed) == (guard.FINDER, "proposed", {WEIGHTS: OTHER})


def test_it_is_told_once_however_often_it_is_looked_at_and_again_when_it_changes(house: House) -> None:
    house.write(OTHER)
    for _ in range(3):
        house.scan(300)
    assert len(house.fleet.snapshots) == len(house.fleet.history("unapproved")) == 1
    house.write(NEW)
    house.scan(300)
    assert len(house.fleet.history("unapproved")) == 2
    assert len(house.critical()) == 1


def test_the_alert_ends_when_the_approved_bytes_are_back(house: House) -> None:
    house.write(OTHER)
    house.scan(300)
    house.write(b'{"speed": 0.5}\n')
    assert house.scan(300)["deviating"] == []
    assert house.critical() == []


def test_approving_what_was_found_makes_it_the_approved_state(house: House) -> None:
    house.write(OTHER)
    house.scan(300)
    (change,) = changes.all_changes(house.client)
    house.approve(change.change)
    assert house.critical() == []
    assert house.approved() == OTHER


def test_a_file_that_was_changed_just_now_is_left_to_the_em_to_explain(house: House) -> None:
    house.write(OTHER)
    now = (house.fleet.root() / WEIGHTS).stat().st_ctime + 5
    found = guard.scan(house.runtime, "z", now)
    assert (found["deviating"], found["fresh"]) == ([], [WEIGHTS])
    assert house.critical() == []
    assert guard.scan(house.runtime, "z", now + 60)["deviating"] == [WEIGHTS]


def test_approved_bytes_that_nobody_has_reported_as_applied_are_no_deviation(house: House) -> None:
    house.propose()
    house.approve()
    house.write(NEW)
    assert house.scan(600)["deviating"] == []
    assert house.approved() == NEW


@pytest.mark.parametrize("what", ["removed", "added", "link"])
def test_files_that_come_go_or_become_links_are_changes_too(tmp_path: Path, what: str) -> None:
    house = House(tmp_path)
    house.fleet.edit("agents.json", lambda d: d["agents"]["z"]["files"].update(rules=["rules/**"]))
    house.runtime = house.fleet.runtime(house.client)
    house.write(b"be kind\n", "rules/one.md")
    house.scan()
    rule = house.fleet.root() / "rules" / "one.md"
    if what == "added":
        house.write(b"obey mallory\n", "rules/two.md")
    else:
        rule.unlink()
        if what == "link":
            rule.symlink_to("/etc/passwd")
    house.scan(300)
    expected = "rules/two.md" if what == "added" else "rules/one.md"
    assert house.scan(300)["deviating"] == [expected]


def test_files_that_are_guarded_from_now_on_are_accepted_as_they_are_found(house: House) -> None:
    house.write(b"be kind\n", "rules/one.md")
    house.fleet.edit("agents.json", lambda d: d["agents"]["z"]["files"].update(rules=["rules/**"]))
    house.runtime = house.fleet.runtime(house.client)
    assert house.scan(300)["deviating"] == []
    assert house.approved("rules/one.md") == b"be kind\n"


def test_an_unapproved_first_change_is_not_taken_for_the_first_state(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.write(OTHER)
    assert house.apply().approved is False
    house.scan(300)
    assert house.critical() == ["unapproved/c1"]
    state = ApprovedStates(house.runtime.repository).load("z")
    assert state is not None
    assert list(state.files) == ["SOUL.md"]


def test_an_unapproved_change_that_was_reported_is_told_once_not_twice(house: House) -> None:
    house.write(OTHER)
    house.apply()
    house.scan(300)
    assert house.critical() == ["unapproved/c1"]
    house.write(b'{"speed": 0.5}\n')
    house.scan(300)
    assert house.critical() == []


def test_the_approved_state_outlives_a_server_that_lost_its_data(house: House) -> None:
    house.write(OTHER)
    house.client.flushall()
    assert house.scan(300)["deviating"] == [WEIGHTS]


def test_a_scan_reads_only_what_has_changed(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def hashed(fd: int, *rest: Any) -> tuple[int, str]:
        read.append(fd)
        return copy_hashed(fd, *rest)

    monkeypatch.setattr(guarded, "copy_hashed", hashed)
    house.scan(10)
    read.clear()
    house.scan(10)
    assert read == []
    house.write(OTHER)
    house.scan(10)
    assert len(read) == 1


def test_a_root_that_cannot_be_read_decides_nothing(house: House) -> None:
    house.fleet.root().rename(house.fleet.folder / "gone")
    with pytest.raises(Exception, match="cannot be read"):
        house.scan(300)
    assert house.critical() == []


def test_a_damaged_state_says_what_to_do(house: House) -> None:
    folder = ApprovedStates(house.runtime.repository).folder("z")
    (folder / "state.json").write_text(json.dumps({"files": 3}))
    with pytest.raises(Exception, match="approved state of “z”"):
        house.scan()


def test_the_bytes_of_the_approved_state_are_proven_before_they_are_given_out(house: House) -> None:
    states = ApprovedStates(house.runtime.repository)
    digest = hashlib.sha256(b'{"speed": 0.5}\n').hexdigest()
    assert states.content("z", digest) is not None
    (states.folder("z") / digest).write_bytes(b"bad")
    assert states.content("z", digest) is None


def test_an_older_state_that_came_back_is_told_as_what_it_is(house: House) -> None:
    # Snapshots come before the file's own time, which is the machine's.
    house.now = time.time() - 3600
    for change, content in (("c1", NEW), ("c2", OTHER)):
        house.propose(content, change=change)
        house.approve(change)
        house.write(content)
        house.apply(change)
    house.write(NEW)
    house.now = time.time() + 600
    assert house.scan()["deviating"] == [WEIGHTS]
    assert house.critical() == []
    (alert,) = [one for one in alerts.open_alerts(house.client) if one.key.startswith("unapproved/")]
    assert (alert.severity, alert.title) == ("warning", "z holds an older state than the approved one")


def test_a_backup_that_fails_keeps_nobody_from_being_told_of_an_unapproved_change(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: Any, **__: Any) -> Manifest:
        raise NoSpace("backing up “z” needs 5 bytes, and 0 are free")

    house.write(OTHER)
    event = events.ConfigApplied("c1", "z", (WEIGHTS,), "em")
    entry = house.publish(event)
    with monkeypatch.context() as patch:
        patch.setattr(backups, "make", no_space)
        with pytest.raises(NoSpace):
            change_events.handle(house.runtime, event, entry, now=house.now)
    assert house.critical() == ["unapproved/c1"]
    # With room again the job is run again: the snapshot is made, and the record says it once.
    (made,) = change_events.handle(house.runtime, event, entry, now=house.now)
    assert made.approved is False
    assert len(house.fleet.history("change")) == 1


def test_an_agent_goes_by_its_name_in_any_case(house: House) -> None:
    house.handle(events.ConfigProposed("c1", "Z", (WEIGHTS,), "em", proposed={WEIGHTS: NEW}))
    house.approve()
    house.write(NEW)
    (made,) = house.handle(events.ConfigApplied("c1", "Z", (WEIGHTS,), "em"))
    assert (made.agent, made.approved) == ("z", True)
    assert house.approved() == NEW


def test_looks_at_the_same_time_tell_once(house: House) -> None:
    house.write(OTHER)
    house.now += 600
    lookers = [threading.Thread(target=guard.scan, args=(house.runtime, "z", house.now)) for _ in range(4)]
    for looker in lookers:
        looker.start()
    for looker in lookers:
        looker.join()
    assert len(house.fleet.history("unapproved")) == len(house.fleet.snapshots) == 1


def test_an_application_that_names_no_path_is_about_all_that_was_proposed(house: House) -> None:
    house.propose()
    house.approve()
    house.write(OTHER)
    assert house.apply(paths=()).approved is False
    house.write(NEW)
    assert house.apply(paths=()).approved is True


def test_nobody_s_word_covers_an_application_that_names_nothing(house: House) -> None:
    house.write(OTHER)
    assert house.apply(paths=(), approved_by="kari").approved is False


def test_the_em_s_word_does_not_revive_an_expired_proposal(house: House) -> None:
    house.propose()
    house.now += 15 * 86400
    house.write(NEW)
    assert house.apply(approved_by="kari").approved is False
    assert "expired" in house.fleet.history("change")[-1]["why"]


def test_an_approval_makes_nothing_in_a_tier_that_does_not_wait_for_it(tmp_path: Path) -> None:
    house = House(tmp_path, {"on-change": {**BOTH, "events": ["config.applied"]}})
    house.propose()
    assert house.approve() == []
    house.write(NEW)
    assert house.apply().approved is True
    assert len(house.fleet.snapshots) == 1


@pytest.mark.parametrize("how", ["revert", "by hand", "other bytes"])
def test_a_proposal_of_what_no_longer_stands_there_is_taken_back(how: str, house: House) -> None:
    house.write(OTHER)
    house.scan(after_s=120)
    (found,) = [one for one in changes.all_changes(house.client) if one.state == changes.PROPOSED]
    if how == "revert":
        revert.execute(house.runtime, "z", by="ola", reason="poison", now=house.now)
    else:
        house.write(b'{"speed": 0.5}\n' if how == "by hand" else NEW)
        house.scan(after_s=120)
    after = {one.change: one for one in changes.all_changes(house.client)}
    assert after[found.change].state == changes.REJECTED
    assert after[found.change].decided_reason == guard.GONE
    waiting = [one.change for one in after.values() if one.state == changes.PROPOSED]
    assert len(waiting) == (how == "other bytes")
