"""Restoring: which state, all or nothing, and what becomes of what stood there."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from backup_worker.snapshots import (
    SnapshotError,
    compare,
    disk,
    execute,
    finish_interrupted,
    plan_restore,
    swap,
    verify_snapshot,
)
from backup_worker.snapshots.manifest import decode
from em_bridge.errors import NotFound, UsageError
from tests.agent_on_disk import NOBODY, NOON, Place, content_of, without_privileges


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path).fill()


def restore(place: Place, **choice: object) -> Path | None:
    plan = plan_restore(place.repo, place.agent, **choice)  # type: ignore[arg-type]
    return execute(plan, place.root, evidence=place.base / "evidence" / "e", now=NOON).evidence


def ruin(place: Place) -> None:
    place.write("SOUL.md", "I am somebody else\n")
    place.write("memory/new.md", "made since\n")
    (place.root / "skills" / "greet.py").unlink()
    (place.root / "skills").rmdir()


def test_a_restore_brings_back_content_modes_and_times(place: Place) -> None:
    (place.root / "memory" / "link").symlink_to("notes.md")
    (place.root / "memory" / "empty").mkdir(mode=0o711)
    (place.root / "skills" / "greet.py").chmod(0o755)
    os.utime(place.root / "memory", ns=(1, 1_500_000_000_000_000_001))
    before = content_of(place.root)
    stats = {path: (place.root / path).lstat() for path in (*before, ".")}
    place.take()
    ruin(place)
    restore(place)
    assert content_of(place.root) == before
    for path, info in stats.items():
        now = (place.root / path).lstat()
        assert (now.st_mode, now.st_mtime_ns) == (info.st_mode, info.st_mtime_ns), path
    assert os.listdir(place.root.parent) == ["z"], "nothing is left beside it"


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes_come_back_whatever_new_files_get_here(place: Place, umask: int) -> None:
    modes = {"SOUL.md": 0o644, "weights.json": 0o666, "memory/notes.md": 0o400, "skills/greet.py": 0o4755}
    for path, mode in modes.items():
        (place.root / path).chmod(mode)
    (place.root / "memory").chmod(0o2775)
    place.take()
    ruin(place)
    before = os.umask(umask)
    try:
        restore(place)
    finally:
        os.umask(before)
    assert {path: (place.root / path).stat().st_mode & 0o7777 for path in modes} == modes
    assert (place.root / "memory").stat().st_mode & 0o7777 == 0o2775


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_owners_come_back_with_the_bits_that_a_new_owner_takes_away(place: Place) -> None:
    for path in ("SOUL.md", "memory", "skills/greet.py"):
        os.chown(place.root / path, NOBODY, NOBODY)
    (place.root / "skills" / "greet.py").chmod(0o4755)
    place.take()
    ruin(place)
    restore(place)
    for path in ("SOUL.md", "memory", "skills/greet.py"):
        info = (place.root / path).stat()
        assert (info.st_uid, info.st_gid) == (NOBODY, NOBODY), path
    assert (place.root / "skills" / "greet.py").stat().st_mode & 0o7777 == 0o4755
    os.chown(place.root / "skills" / "greet.py", 0, 0)
    restore(place)
    info = (place.root / "skills" / "greet.py").stat()
    assert (info.st_uid, info.st_mode & 0o7777) == (NOBODY, 0o4755), (
        "in that state already, save owner and mode"
    )


@pytest.mark.parametrize("path", ["../z2/x", "/etc/x", "a//x", "a/./x", "a/../../x", "", "x\0y", "memory/"])
def test_a_manifest_with_a_path_that_leaves_the_root_is_not_read(place: Place, path: str) -> None:
    manifest = place.repo.path(place.take().id) / "manifest.json"
    document = json.loads(manifest.read_bytes())
    document["entries"][-1]["path"] = path
    with pytest.raises(SnapshotError, match="broken list of entries"):
        decode(json.dumps(document).encode())


@pytest.mark.parametrize(
    "broken",
    [
        {"type": None}, {"type": "door"}, {"size": "large"}, {"mode": None}, {"xattrs": ["user.x"]}, {"hardlink": 7},
        {"xattrs": {"path": "SOUL.md", "type": "file"}}, "SOUL.md", 7, None,
    ],
)  # fmt: skip
def test_a_manifest_with_an_entry_that_makes_no_sense_is_not_read(place: Place, broken: Any) -> None:
    document = json.loads((place.repo.path(place.take().id) / "manifest.json").read_bytes())
    last = document["entries"][-1]
    for entries in (
        [*document["entries"], last | broken if isinstance(broken, dict) else broken],
        [{key: value for key, value in last.items() if key != "type"}],
        last,
    ):
        with pytest.raises(SnapshotError):
            decode(json.dumps(document | {"entries": entries}).encode())


def test_what_stood_there_is_kept_as_evidence(place: Place) -> None:
    place.take()
    ruin(place)
    ruined = content_of(place.root)
    evidence = restore(place)
    assert evidence is not None
    assert content_of(evidence) == ruined
    place.write("SOUL.md", "again somebody else\n")
    second = restore(place)
    assert second is not None
    assert second != evidence
    assert content_of(evidence) == ruined, "earlier evidence is never overwritten"


def test_a_tree_that_is_in_that_state_already_is_left_alone(place: Place) -> None:
    place.take()
    inode = place.root.stat().st_ino
    assert restore(place) is None
    assert place.root.stat().st_ino == inode


def test_excluded_paths_survive_with_their_very_files(place: Place) -> None:
    place.take()
    outbox = place.write("queue.lock", "an open outbox")
    place.write("venv/bin/python", "binary")
    place.write("skills/__pycache__/greet.pyc", "cache")
    inode = outbox.stat().st_ino
    listener = socket.socket(socket.AF_UNIX)
    os.chdir(place.root)
    listener.bind("agent.sock")
    os.chdir("/")
    ruin_soul = place.write("SOUL.md", "ruined")
    evidence = restore(place)
    listener.close()
    assert ruin_soul.read_text() != "ruined"
    assert (place.root / "queue.lock").stat().st_ino == inode
    assert (place.root / "queue.lock").stat().st_nlink == 1
    assert (place.root / "venv/bin/python").read_text() == "binary"
    assert (place.root / "skills/__pycache__/greet.pyc").read_text() == "cache"
    assert (place.root / "agent.sock").exists()
    assert evidence is not None
    assert "venv" not in content_of(evidence)


def test_the_state_is_laid_together_from_the_newest_of_each_scope(place: Place) -> None:
    weekly = place.take(tier="weekly", slot="w", now=NOON)
    place.write("memory/notes.md", "newer memory")
    (place.root / "memory/deep/er/log.txt").unlink()
    daily = place.take(slot="d", now=NOON + 1, include=["memory", "weights"])
    place.write("weights.json", '{"speed": 9}')
    change = place.take(tier="on-change", slot="c", now=NOON + 2, include=["weights"])
    soul = (place.root / "SOUL.md").read_text()
    ruin(place)
    plan = plan_restore(place.repo, place.agent)
    assert plan.sources == (change.id, daily.id, weekly.id)
    restore(place)
    assert (place.root / "SOUL.md").read_text() == soul
    assert (place.root / "weights.json").read_text() == '{"speed": 9}'
    assert (place.root / "memory/notes.md").read_text() == "newer memory"
    assert not (place.root / "memory/deep/er/log.txt").exists(), "the daily says that it was deleted"
    assert not (place.root / "memory/new.md").exists()
    early = plan_restore(place.repo, place.agent, as_of=NOON + 0.5)
    assert early.sources == (weekly.id,)
    with pytest.raises(NotFound):
        plan_restore(place.repo, place.agent, as_of=NOON - 1)


def test_paths_that_no_snapshot_covers_stay(place: Place) -> None:
    place.take(include=["weights"])
    place.write("weights.json", "{}")
    restore(place)
    assert (place.root / "weights.json").read_text() != "{}"
    assert (place.root / "SOUL.md").exists()
    assert (place.root / "memory/notes.md").exists()


def test_only_good_and_proven_snapshots_are_chosen(place: Place) -> None:
    old = place.take(slot="1")
    rotten = place.take(slot="2", now=NOON + 1)
    place.write("SOUL.md", "")
    suspect = place.take(slot="3", now=NOON + 2)
    assert suspect.status == "suspect"
    place.stored(rotten.id, "SOUL.md").write_text("rotten")
    assert plan_restore(place.repo, place.agent).sources == (old.id,)
    assert place.repo.get(rotten.id).damaged, "what was found is written down"
    assert plan_restore(place.repo, place.agent, from_id=suspect.id).sources == (suspect.id,)
    with pytest.raises(SnapshotError, match="damaged"):
        plan_restore(place.repo, place.agent, from_id=rotten.id)


def test_recovery_gets_the_next_older_state_that_differs(place: Place) -> None:
    weekly = place.take(tier="weekly", slot="w")
    place.write("memory/notes.md", "poison, but well-formed")
    twins = [place.take(slot=f"{n}", now=NOON + n, include=["memory"]) for n in (1, 2, 3)]
    first = plan_restore(place.repo, place.agent)
    assert first.state == twins[2].id
    second = plan_restore(place.repo, place.agent, exclude_states=[first.state])
    assert second.sources == (weekly.id,), "two more of the same content are no use"
    with pytest.raises(NotFound):
        plan_restore(place.repo, place.agent, exclude_states=[first.state, second.state])


def test_single_paths_come_back_and_all_else_stays(place: Place) -> None:
    place.take()
    ruin(place)
    restore(place, paths=["SOUL.md", "skills"])
    assert "who I am" in (place.root / "SOUL.md").read_text()
    assert (place.root / "skills/greet.py").exists()
    assert (place.root / "memory/new.md").exists()
    for bad in ("../x", "/etc/passwd", "."):
        with pytest.raises(UsageError):
            plan_restore(place.repo, place.agent, paths=[bad])
    with pytest.raises(NotFound):
        plan_restore(place.repo, place.agent, paths=["no-such-file"])


def test_the_dry_run_says_what_would_change_and_what_would_be_lost(place: Place) -> None:
    place.take(slot="1")
    place.write("memory/notes.md", "in a newer backup")
    place.take(slot="2", now=NOON + 1)
    ruin(place)
    before = content_of(place.root)
    changes = compare(plan_restore(place.repo, place.agent, as_of=NOON), place.root)
    assert set(changes.added) == {"skills", "skills/greet.py"}
    assert set(changes.changed) == {"SOUL.md", "memory/notes.md"}
    assert changes.removed == ("memory/new.md",)
    assert set(changes.lost) == {"SOUL.md", "memory/new.md"}
    assert content_of(place.root) == before


def test_what_only_a_damaged_backup_holds_counts_as_lost(place: Place) -> None:
    place.take(slot="1")
    place.write("memory/notes.md", "in a newer backup")
    newer = place.take(slot="2", now=NOON + 1)
    (place.repo.root / newer.id / "files" / "SOUL.md").write_text("rotten\n")
    plan = plan_restore(place.repo, place.agent)
    assert plan.state != newer.id
    assert compare(plan, place.root).lost == ("memory/notes.md",)


def test_a_stale_log_is_not_played_into_a_restored_database(place: Place) -> None:
    database = place.root / "memory" / "mind.db"
    with sqlite3.connect(database) as connection:
        connection.execute("create table t(a)")
        connection.execute("insert into t values (1)")
    connection.close()
    place.take()
    place.write("memory/mind.db-wal", b"garbage" * 1000)
    agent = place.agent
    object.__setattr__(agent, "exclude", (*agent.exclude, "*-wal"))
    evidence = place.base / "evidence"
    result = execute(plan_restore(place.repo, agent), place.root, evidence=evidence, now=NOON)
    assert not (place.root / "memory/mind.db-wal").exists()
    assert result.evidence is not None
    assert (result.evidence / "memory/mind.db-wal").exists(), "not even garbage is lost"
    with sqlite3.connect(database) as connection:
        assert connection.execute("select a from t").fetchall() == [(1,)]


def test_without_a_place_for_evidence_nothing_is_replaced(place: Place) -> None:
    place.take()
    ruin(place)
    before = content_of(place.root)
    with pytest.raises(UsageError, match="no place to keep"):
        execute(plan_restore(place.repo, place.agent), place.root, evidence=None, now=NOON)
    assert content_of(place.root) == before


def test_evidence_that_cannot_be_kept_stops_the_restore() -> None:
    with without_privileges() as base:
        place = Place(base).fill()
        place.take()
        secret = place.write("memory/unreadable.md", "x")
        place.write("SOUL.md", "ruined")
        secret.chmod(0)
        with pytest.raises(SnapshotError, match="nothing was changed"):
            restore(place)
        secret.chmod(0o600)
        (base / "evidence").chmod(0o500)
        with pytest.raises(SnapshotError, match="nothing was changed"):
            restore(place)
        (base / "evidence").chmod(0o700)
        assert (place.root / "SOUL.md").read_text() == "ruined"
        assert os.listdir(base / "evidence") == []
        assert os.listdir(place.root.parent) == ["z"]


def test_a_missing_root_is_made(place: Place) -> None:
    before = content_of(place.root)
    place.take()
    (place.base / "agents").rename(place.base / "away")
    assert restore(place) is None
    assert content_of(place.root) == before


def test_read_only_folders_and_secret_files_come_back() -> None:
    with without_privileges() as base:
        place = Place(base).fill()
        place.write("memory/locked/in.txt", "x").chmod(0o400)
        (place.root / "memory" / "locked").chmod(0o500)
        place.take()
        place.write("SOUL.md", "ruined")
        restore(place)
        assert (place.root / "memory/locked").stat().st_mode & 0o777 == 0o500
        assert (place.root / "memory/locked/in.txt").stat().st_mode & 0o777 == 0o400
        assert os.listdir(place.root.parent) == ["z"]
        (place.root / "memory/locked").chmod(0o700)


def test_a_root_that_may_not_be_written_comes_back_as_it_was() -> None:
    with without_privileges() as base:
        place = Place(base).fill()
        place.root.chmod(0o500)
        place.take()
        place.root.chmod(0o700)
        place.write("SOUL.md", "ruined")
        for target in (place.root, base / "elsewhere"):
            plan = plan_restore(place.repo, place.agent)
            execute(plan, target, evidence=base / "evidence" / "e", now=NOON)
            assert content_of(target)["SOUL.md"] != b"ruined"
            assert target.stat().st_mode & 0o777 == 0o500
            assert not [name for name in os.listdir(target.parent) if name.startswith(".")]
            target.chmod(0o700)


def test_read_only_folders_can_be_moved_inside_a_mount_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "choose", swap.inside)
    with without_privileges() as base:
        place = Place(base).fill()
        (place.root / "skills").chmod(0o500)
        (place.root / "memory").chmod(0o500)
        place.root.chmod(0o500)
        place.take()
        before = content_of(place.root)
        place.root.chmod(0o700)
        place.write("SOUL.md", "ruined")
        restore(place)
        assert content_of(place.root) == before
        assert {name: (place.root / name).stat().st_mode & 0o777 for name in (".", "skills", "memory")} == {
            ".": 0o500, "skills": 0o500, "memory": 0o500,
        }  # fmt: skip
        for name in (".", "skills", "memory"):
            (place.root / name).chmod(0o700)


def test_where_the_folders_cannot_change_places_the_restore_works_inside(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.take()
    before = content_of(place.root)
    ruin(place)
    place.write("venv/lib.py", "kept")
    inode = place.root.stat().st_ino

    def refuse(one: Path, other: Path) -> None:
        raise OSError(16, "Device or resource busy", str(other))

    monkeypatch.setattr(disk, "exchange", refuse)
    evidence = restore(place)
    assert evidence is not None
    assert os.listdir(evidence.parent) == ["e"]
    assert place.root.stat().st_ino == inode, "a mount point stays the same folder"
    assert content_of(place.root) == before | {"venv": "/", "venv/lib.py": b"kept"}
    assert os.listdir(place.root.parent) == ["z"]


def test_a_backup_refuses_a_tree_that_is_neither_old_nor_new(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.take()
    before = content_of(place.root)
    ruin(place)
    monkeypatch.setattr(swap, "choose", swap.inside)
    real = os.rename
    moves = []

    def die_half_way(*args: object, **options: object) -> None:
        moves.append(args)
        if len(moves) == 5:
            raise KeyboardInterrupt
        real(*args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as dying:
        dying.setattr(os, "rename", die_half_way)
        with pytest.raises(KeyboardInterrupt):
            restore(place)
    assert content_of(place.root) != before
    with pytest.raises(SnapshotError, match="interrupted"):
        place.take(slot="2")
    assert finish_interrupted(place.root) == "finished"
    assert content_of(place.root) == before
    assert place.take(slot="2", now=NOON + 1).status == "good"


def test_two_restores_of_the_same_target_do_not_meet(place: Place) -> None:
    place.take()
    ruin(place)
    with swap.opened(swap.beside(place.root)), pytest.raises(SnapshotError, match="under way"):
        restore(place)


def test_damage_that_appears_while_staging_leaves_the_target_as_it_was(place: Place) -> None:
    made = place.take()
    ruin(place)
    before = content_of(place.root)
    plan = plan_restore(place.repo, place.agent)
    place.stored(made.id, "memory/notes.md").write_text("rotten")
    with pytest.raises(SnapshotError, match="damaged"):
        execute(plan, place.root, evidence=place.base / "evidence", now=NOON)
    assert content_of(place.root) == before
    assert os.listdir(place.root.parent) == ["z"]
    assert verify_snapshot(place.repo, made.id, NOON)


def test_a_staged_file_that_comes_back_changed_leaves_the_target_as_it_was(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.take()
    ruin(place)
    before = content_of(place.root)
    real = disk.sync_all

    def lose_a_bit(fd: int) -> None:
        real(fd)
        staged = swap.beside(place.root).tree / "SOUL.md"
        staged.write_bytes(staged.read_bytes().replace(b"who", b"whn"))

    monkeypatch.setattr(disk, "sync_all", lose_a_bit)
    with pytest.raises(SnapshotError, match="came back from the disk changed"):
        restore(place)
    assert content_of(place.root) == before
    assert os.listdir(place.root.parent) == ["z"]
    assert os.listdir(place.base / "evidence") == [], "nothing was replaced, so there is nothing to examine"
