"""What the agent itself is told after a recovery, and that it changes no backup and no restore."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from backup_worker.approval import change_events
from backup_worker.recovery import notice
from backup_worker.recovery.incident import CURRENT, RECOVERED, Incident
from backup_worker.recovery.notice import FILE, MARK, SENDER
from em_bridge import Publisher, streams
from em_bridge.events import ConfigApplied, Message, decode
from tests.living_fleet import Fleet, cli, steps

NOW = 1_795_442_400.0
"""2026-11-23 14:00 in UTC, 15:00 in Oslo."""


def messages(fleet: Fleet) -> list[Message]:
    found = [decode(fields) for _, fields in streams.read_range(fleet.client, streams.MESSAGES)]
    return [one for one in found if isinstance(one, Message)]


def left(fleet: Fleet, agent: str) -> str:
    return (fleet.root(agent) / FILE).read_text()


def test_the_agent_is_told_what_it_lives_on_and_what_it_has_lost(fleet: Fleet) -> None:
    fleet.add("z")
    snapshot = fleet.backup("z")
    (fleet.root("z") / "memory" / "since.md").write_text("learned a minute ago\n")
    fleet.wipe("z")
    incident = fleet.recover("z")
    assert incident.state == RECOVERED
    told = left(fleet, "z")
    assert told.startswith(MARK)
    assert f"those of `{snapshot}`" in told
    assert f"kept in `{incident.evidence[0]}`" in told
    assert "- `memory/since.md`\n" in told
    assert "notes.md" not in told, "what came back is not lost"
    assert (Path(incident.evidence[0]) / "memory" / "since.md").exists()
    (message,) = messages(fleet)
    assert (message.sender, message.to, message.payload.decode()) == (SENDER, "z", told)
    summary = incident.summary()
    assert "memory/since.md" in summary["lost"]
    assert summary["lost_count"] == len(summary["lost"])
    assert summary["from"] == [snapshot]


def test_what_is_lost_counts_from_the_death_however_many_states_were_tried(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.backup("z")
    fleet.set_mode("z", "die")
    bad = fleet.backup("z")
    (fleet.root("z") / "memory" / "since.md").write_text("learned a minute ago\n")
    incident = fleet.recover("z")
    assert (incident.state, incident.attempts) == (RECOVERED, 2)
    assert incident.lost == ("memory/since.md",)
    assert f"did not live: {bad}" in left(fleet, "z")
    assert len(messages(fleet)) == 1


def test_the_notice_is_in_no_backup_and_makes_no_restore_differ(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.backup("z")
    fleet.wipe("z")
    assert fleet.recover("z").state == RECOVERED
    told = left(fleet, "z")
    fleet.kill("z")
    again = fleet.backup("z")
    assert not list((fleet.folder / "backups" / again).rglob(f"*{FILE}*"))
    dry = cli(fleet, "restore", "z", "--dry-run")
    assert "nothing to do: the files are in that state" in dry.stdout, dry.stdout
    incident = fleet.recover("z")
    assert next(one for one in incident.steps if one.step == "restore").detail.endswith(
        "it stood there already; nothing is lost"
    )
    assert incident.lost == ()
    assert left(fleet, "z") != told
    assert "## Lost" not in left(fleet, "z")
    assert [one.seq for one in messages(fleet)] == [1, 2]


def test_one_whose_whole_root_is_gone_is_not_told_that_nothing_is_lost(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.backup("z")
    shutil.rmtree(fleet.root("z"))
    incident = fleet.recover("z")
    restored = next(one for one in incident.steps if one.step == "restore")
    assert restored.detail.endswith("there was no root any more; what is lost is not known")
    assert "It could not be found out" in left(fleet, "z")


def test_one_that_was_only_started_again_is_told_so(fleet: Fleet) -> None:
    fleet.add("z", recovery={"first_try": "current"})
    incident = fleet.recover("z")
    assert incident.chosen == (CURRENT,)
    assert "nothing was restored, nothing was lost" in left(fleet, "z")


def test_a_file_of_that_name_that_is_not_ours_is_left_alone(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.backup("z")
    (fleet.root("z") / FILE).write_text("my own plan for hard times\n")
    incident = fleet.recover("z")
    assert incident.state == RECOVERED
    assert left(fleet, "z") == "my own plan for hard times\n"
    assert "notice!" in steps(incident)
    assert len(messages(fleet)) == 1


def test_approved_changes_that_the_chosen_state_does_not_hold_are_named(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.backup("z")
    publisher = Publisher(fleet.client)
    publisher.config_proposed(change="c1", agent="z", paths=["mode"], by="em", reason="faster")
    publisher.config_approved(change="c1", by="kari")
    publisher.config_proposed(change="c2", agent="z", paths=["mode"], by="em")
    for change in ("c1", "c2"):
        publisher.config_applied(change=change, agent="z", paths=["mode"], by="em")
    time.sleep(0.02)
    held = fleet.recover("z")
    assert held.state == RECOVERED
    assert list(map(str, held.missed)) == ["c1 (mode), approved by kari: faster"], "c2 nobody approved"
    assert "- c1 (mode), approved by kari: faster" in left(fleet, "z")
    fleet.kill("z")
    fleet.backup("z")
    assert fleet.recover("z").missed == (), "the newer state holds it"


def test_a_change_that_the_em_approved_and_that_killed_the_agent_is_named(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.backup("z")
    schedule = fleet.folder / "config" / "backup_schedule.json"
    facts = json.loads(schedule.read_text())
    on_change = {"events": ["config.applied"], "include": ["*"], "slot": "%Y-%m-%d-%H%M%S", "keep": 9}
    facts["tiers"]["on-change"] = on_change
    schedule.write_text(json.dumps(facts))
    fleet.set_mode("z", "die")
    applied = ConfigApplied("c9", "z", ("mode",), by="em", approved_by="kari")
    entry = streams.append(fleet.client, applied)
    (stored,) = change_events.handle(fleet.runtime, applied, entry, now=time.time())
    time.sleep(0.02)
    incident = fleet.recover("z")
    assert (incident.state, incident.attempts) == (RECOVERED, 2)
    (named,) = incident.missed
    assert (named.snapshot, named.change, named.paths) == (stored.id, "c9", ("mode",))
    assert stored.id in str(named)
    assert "approved by kari" in str(named)


def test_a_message_that_is_sent_again_after_a_crash_is_there_once(fleet: Fleet) -> None:
    incident = Incident("z-1", "z", NOW)
    for _ in range(2):
        notice.send(fleet.client, incident, "you were recovered", NOW)
    notice.send(fleet.client, Incident("z-2", "z", NOW), "again", NOW)
    assert [(one.seq, one.payload) for one in messages(fleet)] == [(1, b"you were recovered"), (2, b"again")]


# ── the text and the file ───────────────────────────────────────────────────────────────────────────────────────


def told(**facts: Any) -> str:
    known = {"chosen": ("daily/a/z",), "state_at": NOW - 3600, "evidence": ("/var/e/tree-1",)}
    return notice.text(Incident("z-1", "z", NOW, **(known | facts)), "Europe/Oslo")


def test_times_are_those_of_the_schedules_zone() -> None:
    assert "2026-11-23 15:00:00 CET" in told()
    assert "`daily/a/z`, of 2026-11-23 14:00:00 CET" in told()


def test_of_many_lost_paths_the_others_are_counted_and_the_unknown_is_said() -> None:
    assert "… and 7 more" in told(lost=("a", "b"), lost_count=9)
    assert "more" not in told(lost=("a", "b"), lost_count=2)
    assert "could not be found out" in told(lost_count=None)


def test_a_link_where_the_notice_would_stand_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text(MARK)
    root = tmp_path / "root"
    root.mkdir()
    (root / FILE).symlink_to(other)
    assert not notice.leave(root, "new")
    assert other.read_text() == MARK


def test_a_kept_link_to_the_old_notice_still_holds_the_old_one(tmp_path: Path) -> None:
    assert notice.leave(tmp_path, MARK + "old")
    kept = tmp_path / "kept"
    kept.hardlink_to(tmp_path / FILE)
    assert notice.leave(tmp_path, MARK + "new")
    assert kept.read_text() == MARK + "old"
    assert (tmp_path / FILE).read_text() == MARK + "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, "kept"]
