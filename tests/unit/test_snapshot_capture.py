"""What goes into a snapshot, and how it lies on disk."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from backup_worker.snapshots import (
    AgentFiles,
    Repository,
    SnapshotError,
    capture,
    capture_file,
    disk,
    take_snapshot,
    verify_snapshot,
)
from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.manifest import Entry
from em_bridge.errors import NotFound, UsageError
from tests.agent_on_disk import NOON, Place, content_of, coreutils_proves, without_privileges


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path).fill()


def test_a_snapshot_lies_where_its_id_says_and_coreutils_proves_it(place: Place) -> None:
    made = place.take(slot="2026-11-23")
    folder = place.repo.root / "daily" / "2026-11-23" / "z"
    assert made.id == "daily/2026-11-23/z"
    assert made.status == "good"
    assert sorted(os.listdir(folder)) == ["SHA256SUMS", "files", "manifest.json"]
    assert content_of(folder / "files") == content_of(place.root)
    assert coreutils_proves(folder)
    assert json.loads((folder / "manifest.json").read_text())["created_at"] == NOON


def test_nobody_but_the_owner_can_read_a_snapshot(place: Place) -> None:
    (place.root / "SOUL.md").chmod(0o666)
    place.take()
    for folder, names, files in os.walk(place.repo.root):
        for name in [".", *names, *files]:
            assert stat.S_IMODE(os.lstat(os.path.join(folder, name)).st_mode) & 0o077 == 0, name


def test_any_name_that_a_file_can_have_survives(place: Place) -> None:
    names = [
        b"memory/a\nb",
        b"memory/back\\slash",
        b"memory/\xff\xfe",
        b"memory/ lead",
        b"memory/*",
        b"memory/cr\r",
    ]
    for name in names:
        with open(os.fsencode(place.root) + b"/" + name, "wb") as file:
            file.write(name)
    made = place.take()
    stored = os.fsencode(place.repo.path(made.id)) + b"/files/"
    assert [Path(os.fsdecode(stored + name)).read_bytes() for name in names] == names
    assert {os.fsdecode(name) for name in names} <= {entry.path for entry in place.repo.get(made.id).entries}
    assert coreutils_proves(place.repo.path(made.id))
    assert verify_snapshot(place.repo, made.id, NOON) == []


def test_a_snapshot_of_nothing_is_still_proven_by_coreutils(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.root.mkdir(parents=True)
    made = place.take(include=["memory"])
    assert (made.files, made.bytes) == (0, 0)
    assert coreutils_proves(place.repo.path(made.id))


def test_links_are_stored_as_links_and_never_followed(place: Place) -> None:
    (place.root / "memory" / "out").symlink_to("/etc/passwd")
    (place.root / "memory" / "folder").symlink_to("/etc")
    (place.root / "memory" / "nowhere").symlink_to("gone")
    made = place.take()
    assert os.readlink(place.stored(made.id, "memory/out")) == "/etc/passwd"
    assert os.readlink(place.stored(made.id, "memory/folder")) == "/etc"
    assert {e.path: e.target for e in made.entries if e.kind == "link"} == {
        "memory/out": "/etc/passwd", "memory/folder": "/etc", "memory/nowhere": "gone",
    }  # fmt: skip


def test_a_folder_swapped_for_a_link_does_not_lead_out_of_the_root(place: Place, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    (secret / "er").mkdir(parents=True)
    (secret / "er" / "log.txt").write_text("not yours")
    with Tree(place.root) as tree:
        (place.root / "memory" / "deep").rename(tmp_path / "away")
        (place.root / "memory" / "deep").symlink_to(secret)
        with pytest.raises(OSError, match=r"symbolic|directory"):
            tree.open("memory/deep/er/log.txt", os.O_RDONLY)
        with pytest.raises(PermissionError):
            tree.open("memory/../../secret", os.O_RDONLY)


def test_special_files_are_passed_over_and_counted(place: Place) -> None:
    os.mkfifo(place.root / "memory" / "pipe")
    made = place.take()
    assert made.skipped == {"pipe": 1}
    assert made.status == "good"


def test_empty_folders_are_kept_and_excluded_ones_are_not(place: Place) -> None:
    (place.root / "memory" / "empty").mkdir()
    place.write("skills/__pycache__/greet.pyc", b"x")
    place.write("skills/deep/__pycache__/greet.pyc", b"x")
    place.write("memory/db.lock", b"x")
    place.write("venv/lib/x.py", b"x")
    stored = content_of(place.repo.path(place.take().id) / "files")
    assert stored["memory/empty"] == "/"
    assert not any(
        "__pycache__" in path or path.endswith(".lock") or path.startswith("venv") for path in stored
    )


def test_a_tier_holds_only_the_classes_it_includes(place: Place) -> None:
    made = place.take(include=["weights", "memory"])
    assert {entry.path for entry in made.entries if entry.kind == "file"} == {
        "weights.json", "memory/notes.md", "memory/deep/er/log.txt",
    }  # fmt: skip


def test_modes_and_times_are_in_the_manifest(place: Place) -> None:
    file = place.write("skills/run.sh", "#!/bin/sh\n")
    file.chmod(0o751)
    os.utime(file, ns=(1, 1_234_567_890_123_456_789))
    entry = place.take().by_path()["skills/run.sh"]
    assert (entry.mode, entry.mtime_ns) == (0o751, 1_234_567_890_123_456_789)


def test_an_unchanged_file_is_linked_or_copied_as_the_tier_says(place: Place) -> None:
    first = place.take(slot="1", unchanged="link")
    place.write("memory/notes.md", "something else\n" * 30)
    linked = place.take(slot="2", now=NOON + 1, unchanged="link")
    copied = place.take(slot="3", now=NOON + 2, unchanged="copy")

    def inode(snapshot: str, path: str) -> int:
        return place.stored(snapshot, path).stat().st_ino

    assert inode(first.id, "SOUL.md") == inode(linked.id, "SOUL.md") != inode(copied.id, "SOUL.md")
    assert inode(first.id, "memory/notes.md") != inode(linked.id, "memory/notes.md")
    assert all(coreutils_proves(place.repo.path(one.id)) for one in (first, linked, copied))


def test_same_size_and_times_do_not_hide_a_change(place: Place) -> None:
    first = place.take(slot="1", unchanged="link")
    file = place.root / "SOUL.md"
    before = file.stat()
    file.write_bytes(file.read_bytes().replace(b"who", b"WHO"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = place.take(slot="2", now=NOON + 1, unchanged="link")
    assert place.stored(second.id, "SOUL.md").read_bytes() == file.read_bytes()
    assert place.stored(first.id, "SOUL.md").read_bytes() != file.read_bytes()


def test_a_file_of_the_same_size_and_all_the_same_times_that_took_anothers_place_is_not_taken_for_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Folders change places without their files noticing: then only the inode tells which is which.
    monkeypatch.setattr(capture_file, "TRUST_S", -1.0)
    for _ in range(200):
        files = [place.write(f"memory/{name}/state.md", f"I am {name}\n") for name in ("one", "two")]
        for file in files:
            os.utime(file, ns=(1, 1_234_567_890_123_456_789))
        if files[0].stat().st_ctime_ns == files[1].stat().st_ctime_ns:
            break
        for file in files:
            file.unlink()
    else:
        pytest.skip("the clock of this file system tells any two changes apart")
    place.take(slot="1", unchanged="link")
    disk.exchange(*(file.parent for file in files))
    second = place.take(slot="2", now=NOON + 1, unchanged="link")
    assert place.stored(second.id, "memory/one/state.md").read_text() == "I am two\n"
    assert content_of(place.repo.path(second.id) / "files") == content_of(place.root)


def test_a_damaged_shared_file_is_healed_from_the_source_and_told(place: Place) -> None:
    first = place.take(slot="1", unchanged="link")
    stored = place.stored(first.id, "memory/notes.md")
    stored.write_bytes(stored.read_bytes().replace(b"milk", b"MILK"))
    second = place.take(slot="2", now=NOON + 1, unchanged="link")
    assert second.status == "good"
    assert verify_snapshot(place.repo, second.id, NOON) == []
    assert "memory/notes.md" in second.warnings[0]
    assert place.repo.get(first.id).damaged


@pytest.mark.parametrize("how", ["ab", "r+b"], ids=["grows", "is rewritten"])
@pytest.mark.parametrize("age_s", [0, 3600], ids=["young", "long at rest"])
def test_a_file_that_keeps_changing_makes_the_snapshot_partial_and_is_named(
    place: Place, monkeypatch: pytest.MonkeyPatch, how: str, age_s: int
) -> None:
    busy = place.write("memory/busy.bin", b"x" * 4000)
    os.utime(busy, (time.time() - age_s,) * 2)
    original, real = busy.stat().st_ino, os.read

    def read_while_written(fd: int, size: int) -> bytes:
        content = real(fd, size)
        if len(content) >= 4000 and os.fstat(fd).st_ino == original:
            with busy.open(how) as file:
                file.write(b"y")
        return content

    monkeypatch.setattr(os, "read", read_while_written)
    monkeypatch.setattr(capture, "TRIES", 3)
    made = place.take()
    assert made.status == "partial"
    assert [problem.path for problem in made.problems] == ["memory/busy.bin"]
    assert "memory/busy.bin" not in made.by_path()
    assert verify_snapshot(place.repo, made.id, NOON) == []


def test_a_file_that_appears_or_goes_while_copying_is_no_error(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    doomed = place.write("memory/aaa.txt", "soon gone")
    real = capture.Capture._take_all
    seen = []

    def take(self: capture.Capture, paths: list[str], found: capture.Found) -> None:
        if not seen:
            doomed.unlink()
            place.write("memory/zzz.txt", "just in time")
        seen.append(paths)
        real(self, paths, found)

    monkeypatch.setattr(capture.Capture, "_take_all", take)
    made = place.take()
    assert made.status == "good"
    assert content_of(place.repo.path(made.id) / "files") == content_of(place.root)


def test_an_unreadable_file_or_folder_is_named() -> None:
    with without_privileges() as base:
        place = Place(base).fill()
        (place.root / "memory" / "notes.md").chmod(0)
        (place.root / "skills").chmod(0)
        made = place.take()
        assert made.status == "partial"
        assert {problem.path for problem in made.problems} == {"memory/notes.md", "skills"}
        assert verify_snapshot(place.repo, made.id, NOON) == []


def test_an_unwritable_repository_is_an_error() -> None:
    with without_privileges() as base:
        place = Place(base).fill()
        place.repo.root.mkdir(mode=0o500)
        with pytest.raises(SnapshotError, match="permission denied"):
            place.take()


WRITER = """
import sqlite3, sys, time
c = sqlite3.connect(sys.argv[1], isolation_level=None)
c.execute("pragma journal_mode=" + sys.argv[2])
c.execute("create table if not exists pair(a, b)")
c.execute("insert into pair values (0, 0)")
print("ready", flush=True)
n = 0
while True:
    n += 1
    c.execute("begin immediate")
    c.execute("update pair set a = ?", (n,))
    c.execute("update pair set b = ?", (n,))
    c.execute("insert into pair values (?, ?)", (n, n))
    c.execute("commit")
    if n % 200 == 0: c.execute("delete from pair where rowid > 1")
    time.sleep(0.001)
"""


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_a_database_is_taken_consistent_while_it_is_written(place: Place, mode: str) -> None:
    database = place.write("memory/mind.db", b"")
    writer = subprocess.Popen([sys.executable, "-c", WRITER, database, mode], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"ready\n"
    try:
        for number in range(4):
            made = place.take(slot=f"s{number}", now=NOON + number, unchanged="link")
            assert made.status == "good", made.problems
            names = sorted(os.listdir(place.stored(made.id, "memory")))
            assert names == ["deep", "mind.db", "notes.md"]
            with sqlite3.connect(
                f"file:{place.stored(made.id, 'memory/mind.db')}?immutable=1", uri=True
            ) as copy:
                assert copy.execute("select count(*) from pair where a != b").fetchone() == (0,)
                assert copy.execute("select count(*) from pair").fetchone() > (0,)
        assert writer.poll() is None, "the writer was disturbed"
    finally:
        writer.kill()
        writer.wait()


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_nothing_is_created_beside_a_database_at_rest(place: Place, mode: str) -> None:
    with sqlite3.connect(place.root / "memory" / "mind.db") as database:
        database.execute(f"pragma journal_mode={mode}")
        database.execute("create table t(a)")
    database.close()
    before = {
        name: (place.root / "memory" / name).stat().st_mtime_ns for name in os.listdir(place.root / "memory")
    }
    made = place.take()
    after = {
        name: (place.root / "memory" / name).stat().st_mtime_ns for name in os.listdir(place.root / "memory")
    }
    assert before == after
    assert made.by_path()["memory/mind.db"].sqlite


def test_what_a_killed_application_left_in_its_log_is_in_the_copy(place: Place) -> None:
    code = (
        "import sqlite3, sys, os; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "c.execute('pragma journal_mode=wal');"
        "c.execute('create table t(a)'); c.execute('insert into t values(42)'); os.kill(os.getpid(), 9)"
    )
    database = place.root / "memory" / "mind.db"
    subprocess.run([sys.executable, "-c", code, database], check=False)
    for left in (("mind.db-shm",), ()):
        for name in left:
            (place.root / "memory" / name).unlink()
        assert (place.root / "memory" / "mind.db-wal").stat().st_size > 0
        names = sorted(os.listdir(place.root / "memory"))
        made = place.take(slot=f"s{len(left)}")
        assert sorted(os.listdir(place.root / "memory")) == names
        with sqlite3.connect(f"file:{place.stored(made.id, 'memory/mind.db')}?immutable=1", uri=True) as copy:
            assert copy.execute("select a from t").fetchall() == [(42,)]


def test_a_json_file_rewritten_in_place_is_never_torn(place: Place) -> None:
    file = place.root / "weights.json"
    documents = [json.dumps({"n": n, "fill": "x" * (3000 + 500 * n)}) for n in range(6)]
    stop = threading.Event()

    def write() -> None:
        n = 0
        while not stop.is_set():
            n += 1
            with file.open("w") as out:
                text = documents[n % 6]
                out.write(text[:1500])
                out.flush()
                time.sleep(0.001)
                out.write(text[1500:])
            time.sleep(0.04)

    writer = threading.Thread(target=write)
    writer.start()
    good = 0
    try:
        for number in range(8):
            made = place.take(slot=f"s{number}", now=NOON + number)
            if made.status == "partial":
                assert [problem.path for problem in made.problems] == ["weights.json"]
            else:
                good += 1
                assert place.stored(made.id, "weights.json").read_text() in documents
    finally:
        stop.set()
        writer.join()
    assert good > 0


def test_a_json_file_that_is_half_written_is_waited_for(place: Place) -> None:
    file = place.root / "weights.json"
    half = threading.Event()

    def write_slowly() -> None:
        with file.open("w") as out:
            out.write('{"speed": 1, ')
            out.flush()
            time.sleep(0.05)
            half.set()
            time.sleep(0.1)
            out.write('"care": 2}')

    writer = threading.Thread(target=write_slowly)
    writer.start()
    half.wait()
    made = place.take()
    writer.join()
    assert made.status == "good", made.problems
    assert json.loads(place.stored(made.id, "weights.json").read_text()) == {"speed": 1, "care": 2}


# -- slots, events, bad input ---------------------------------------------------------------------------------------


def test_a_taken_slot_gives_the_next_name_or_what_is_there(place: Place) -> None:
    assert [place.take(slot="s", now=NOON + n).slot for n in range(3)] == ["s", "s-2", "s-3"]
    assert place.take(slot="s", on_taken="return", now=NOON + 9).created_at == NOON


def test_the_same_event_makes_one_snapshot(place: Place) -> None:
    place.take(slot="s", event="1-0")
    second = place.take(slot="s", event="2-0", now=NOON + 1)
    assert second.slot == "s-2"
    assert place.take(slot="s", event="2-0", now=NOON + 2).id == second.id
    assert len(place.repo.snapshots()) == 2


def test_two_processes_in_the_same_slot_make_what_was_asked(place: Place) -> None:
    for on_taken, count in (("return", 1), ("next", 4)):
        threads = [
            threading.Thread(target=place.take, kwargs={"tier": "t-" + on_taken, "on_taken": on_taken})
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        heads = place.repo.snapshots(tier="t-" + on_taken)
        assert len(heads) == count
        assert all(verify_snapshot(place.repo, head.id, NOON) == [] for head in heads)


@pytest.mark.parametrize("inner", ["agents/z/repo", "agents/z", "agents"])
def test_repository_and_root_within_each_other_are_refused(place: Place, inner: str) -> None:
    with pytest.raises(UsageError, match="within each other"):
        take_snapshot(
            Repository(place.base / inner), place.agent, tier="daily", slot="s", include=["*"], unchanged="copy",
            now=NOON, reason="test",
        )  # fmt: skip


def test_a_missing_root_is_an_error_that_leaves_nothing(place: Place, tmp_path: Path) -> None:
    gone = AgentFiles("z", tmp_path / "gone")
    with pytest.raises(SnapshotError, match="does not exist"):
        take_snapshot(
            place.repo, gone, tier="daily", slot="s", include=["*"], unchanged="copy", now=NOON, reason="test"
        )
    assert not place.repo.root.exists()


@pytest.mark.parametrize(
    "identifier", ["../x/z", "daily/../z", "daily/s", "daily/s/z/..", "/etc/passwd/x", "", "a/b/c\n"]
)
def test_an_id_that_is_none_is_not_found(place: Place, identifier: str) -> None:
    place.take()
    for ask in (place.repo.get, place.repo.pin, place.repo.path):
        with pytest.raises(NotFound):
            ask(identifier)


def test_the_engine_needs_neither_redis_nor_the_web() -> None:
    code = (
        "import sys, backup_worker.snapshots;"
        "bad = {'redis', 'rq', 'pydantic', 'flask', 'typer', 'msgpack'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_who_attests_is_asked_about_the_very_bytes_that_were_copied(place: Place) -> None:
    asked = {}

    def attest(entries: Mapping[str, Entry]) -> tuple[bool, str | None]:
        asked.update({path: entry.sha256 for path, entry in entries.items()})
        place.write("weights.json", "changed behind the copy\n")
        return True, "kari"

    manifest = place.take(approved=False, attest=attest)
    assert (manifest.approved, manifest.approved_by) == (True, "kari")
    stored = hashlib.sha256(place.stored(manifest.id, "weights.json").read_bytes()).hexdigest()
    assert asked["weights.json"] == stored


def test_a_file_that_is_written_whenever_it_is_read_is_named_and_not_stored(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = place.root / "SOUL.md"
    inode, size, read = busy.stat().st_ino, busy.stat().st_size, os.read

    def written_then(fd: int, count: int) -> bytes:
        if os.fstat(fd).st_ino == inode:
            busy.write_bytes(os.urandom(size))
        return read(fd, count)

    monkeypatch.setattr(os, "read", written_then)
    made = place.take()
    assert made.status == "partial"
    assert [problem.path for problem in made.problems] == ["SOUL.md"]
    assert "SOUL.md" not in made.by_path()
