"""Hard links, attributes, holes, depth, and how a file is known to be unchanged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from backup_worker.snapshots import Manifest, capture_file, execute, plan_restore, verify_snapshot
from backup_worker.snapshots.disk import Tree
from tests.agent_on_disk import NOON, Place, content_of, coreutils_proves


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path).fill()


def restored(place: Place) -> Path:
    target = place.base / "restored"
    execute(plan_restore(place.repo, place.agent), target, evidence=None, now=NOON)
    return target


def test_hard_linked_files_of_an_agent_are_one_file_again_after_a_restore(place: Place) -> None:
    os.link(place.root / "memory/notes.md", place.root / "memory/deep/same.md")
    os.link(place.root / "memory/notes.md", place.root / "also.md")
    made = place.take()
    assert coreutils_proves(place.repo.path(made.id))
    entries = made.by_path()
    assert sum(entry.hardlink is not None for entry in entries.values()) == 2
    target = restored(place)
    assert content_of(target) == content_of(place.root)
    assert (target / "also.md").stat().st_nlink == 3
    assert (target / "also.md").samefile(target / "memory/deep/same.md")


def test_a_hard_link_to_a_file_that_changes_later_is_taken_again(place: Place) -> None:
    os.link(place.root / "memory/notes.md", place.root / "also.md")
    place.take(slot="1", unchanged="link")
    place.write("memory/notes.md", "changed in place, under both names")
    made = place.take(slot="2", now=NOON + 1, unchanged="link")
    assert place.stored(made.id, "also.md").read_text() == "changed in place, under both names"
    assert verify_snapshot(place.repo, made.id, NOON) == []


def test_attributes_come_back_where_the_file_system_has_them(place: Place) -> None:
    try:
        os.setxattr(place.root / "SOUL.md", "user.origin", b"kari\x00\xff")
    except OSError:
        pytest.skip("this file system has no user attributes")
    os.setxattr(place.root / "memory", "user.kind", b"notes")
    made = place.take()
    assert Manifest.as_json(place.repo.get(made.id))["entries"]
    target = restored(place)
    assert os.getxattr(target / "SOUL.md", "user.origin") == b"kari\x00\xff"
    assert os.getxattr(target / "memory", "user.kind") == b"notes"


def test_a_sparse_file_stays_sparse_in_the_snapshot_and_after_a_restore(place: Place) -> None:
    file = place.root / "memory" / "sparse.bin"
    with file.open("wb") as out:
        out.seek(5_000_001)
        out.write(b"in the middle")
        out.truncate(64 << 20)
    assert file.stat().st_blocks * 512 < 1 << 20
    made = place.take()
    copies = [place.stored(made.id, "memory/sparse.bin"), restored(place) / "memory/sparse.bin"]
    for copy in copies:
        assert copy.stat().st_size == 64 << 20
        assert copy.stat().st_blocks * 512 < 2 << 20
        assert subprocess.run(["cmp", file, copy], check=False).returncode == 0


def test_a_tree_deeper_than_a_path_may_be_long_comes_back(place: Place) -> None:
    name, depth = "d" * 200, 30
    with Tree(place.root) as tree:
        tree.make_folders("/".join(["memory", *[name] * depth]))
        path = "/".join(["memory", *[name] * depth, "bottom.json"])
        fd = tree.open(path, os.O_WRONLY | os.O_CREAT)
        os.write(fd, b'{"deep": true}')
        os.close(fd)
    assert len(path) > os.pathconf("/", "PC_PATH_MAX")
    made = place.take()
    assert made.status == "good"
    assert verify_snapshot(place.repo, made.id, NOON) == []
    with Tree(restored(place)) as tree:
        assert tree.read_bytes(path) == b'{"deep": true}'


def aged(place: Place, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Make every file old enough to be trusted; return the inodes that are read from now on."""
    monkeypatch.setattr(capture_file, "TRUST_S", -1.0)
    read: set[int] = set()
    real = os.read

    def watching(fd: int, size: int) -> bytes:
        read.add(os.fstat(fd).st_ino)
        return real(fd, size)

    monkeypatch.setattr(os, "read", watching)
    return read


def test_a_file_at_rest_is_known_by_inode_size_and_times_and_its_copy_still_proven(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = aged(place, monkeypatch)
    first = place.take(slot="1", unchanged="link")
    originals = {path.stat().st_ino for path in place.root.rglob("*") if path.is_file()}
    assert originals <= read
    read.clear()
    second = place.take(slot="2", now=NOON + 1, unchanged="link")
    assert not originals & read
    assert place.stored(first.id, "SOUL.md").samefile(place.stored(second.id, "SOUL.md"))
    stored = place.stored(second.id, "SOUL.md")
    stored.write_bytes(stored.read_bytes().replace(b"who", b"whn"))
    third = place.take(slot="3", now=NOON + 2, unchanged="link")
    assert place.stored(third.id, "SOUL.md").read_bytes() == (place.root / "SOUL.md").read_bytes()
    assert "damaged" in third.warnings[0]


def test_reading_leaves_the_times_of_access_of_the_agents_files_alone(place: Place) -> None:
    long_ago = NOON - 10**8
    for path in (place.root / "SOUL.md", place.root / "weights.json"):
        os.utime(path, (long_ago, NOON - 1000))
    place.take()
    assert [os.stat(place.root / name).st_atime for name in ("SOUL.md", "weights.json")] == [long_ago] * 2


def test_a_change_that_keeps_size_and_mtime_is_seen_by_its_ctime(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    aged(place, monkeypatch)
    place.take(slot="1", unchanged="link")
    file = place.root / "SOUL.md"
    before = file.stat()
    file.write_bytes(file.read_bytes().replace(b"who", b"WHO"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    made = place.take(slot="2", now=NOON + 1, unchanged="link")
    assert place.stored(made.id, "SOUL.md").read_bytes() == file.read_bytes()


def test_a_file_that_was_young_when_it_was_copied_is_read_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = place.take(slot="1", unchanged="link")
    assert all(entry.ctime_ns == 0 for entry in made.entries), "no clock is fine enough to trust this"
    read = aged(place, monkeypatch)
    place.take(slot="2", now=NOON + 1, unchanged="link")
    assert (place.root / "SOUL.md").stat().st_ino in read


def test_the_same_content_on_change_is_recorded_and_takes_no_space(place: Place) -> None:
    first = place.take(tier="on-change", slot="1", unchanged="link", event="1-0")
    second = place.take(tier="on-change", slot="2", now=NOON + 1, unchanged="link", event="2-0")
    assert len(place.repo.snapshots(tier="on-change")) == 2
    for entry in second.entries:
        if entry.kind == "file":
            assert place.stored(first.id, entry.path).samefile(place.stored(second.id, entry.path))


def test_a_large_file_takes_little_memory(place: Place) -> None:
    with (place.root / "memory" / "large.bin").open("wb") as out:
        out.write(os.urandom(1 << 20))
        out.truncate(512 << 20)
    code = (
        "import sys; from pathlib import Path; from tests.agent_on_disk import Place, NOON;"
        "from backup_worker.snapshots import execute, plan_restore;"
        "place = Place(Path(sys.argv[1])); assert place.take().status == 'good';"
        "execute(plan_restore(place.repo, place.agent), Path(sys.argv[1]) / 'r', evidence=None, now=NOON);"
        # Not getrusage: that begins with what the process held that started this one.
        "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(place.base)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100_000, "kilobytes"
