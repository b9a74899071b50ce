"""The many or large files of one agent go through several processes; nothing else about its snapshot is different."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from backup_worker.snapshots import (
    AgentFiles,
    DamagedSnapshot,
    Entry,
    capture_file,
    execute,
    large,
    parts,
    plan_restore,
    staging,
    verify,
    verify_snapshot,
)
from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.exact_copy import copy_file
from backup_worker.snapshots.parts import in_parts
from tests.agent_on_disk import NOON, Place, content_of, coreutils_proves, without_privileges


@pytest.fixture(autouse=True)
def _few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "FROM", 10)
    monkeypatch.setattr(parts, "PART", 7)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})


def filled(base: Path) -> Place:
    """Make an agent with some files of every kind."""
    place = Place(base).fill()
    for number in range(60):
        place.write(f"memory/{number % 5}/{number}.json", f'{{"number": {number}}}')
    place.write("skills/broken.py", "def broken(:\n")
    place.write(b"memory/\xff\n.txt".decode("utf-8", "surrogateescape"), "a name that is not UTF-8")
    os.setxattr(place.root / "memory/3/3.json", "user.mood", b"fine")
    os.link(place.root / "memory/1/1.json", place.root / "memory/2/twin.json")
    (place.root / "memory" / "link").symlink_to("1/1.json")
    return place


def test_a_snapshot_made_by_several_processes_is_the_one_that_one_process_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture_file, "TRUST_S", -1.0)
    place = filled(tmp_path)
    many = place.take(slot="many", unchanged="link")
    again = place.take(slot="again", now=NOON + 1, unchanged="link")
    monkeypatch.setattr(parts, "FROM", 10**6)
    one = place.take(tier="other", slot="one", now=NOON + 2)
    assert many.entries == one.entries
    assert [entry._replace(linked=False) for entry in again.entries] == list(many.entries)
    assert many.problems == again.problems == one.problems
    assert [problem.path for problem in many.problems] == ["skills/broken.py"]
    for made in (many, again, one):
        assert content_of(place.repo.path(made.id) / "files") == content_of(place.root)
        assert coreutils_proves(place.repo.path(made.id))
    assert all(entry.linked for entry in again.entries if entry.kind == "file" and not entry.hardlink)


def test_damage_is_found_and_healed_whichever_process_reads_it(tmp_path: Path) -> None:
    place = filled(tmp_path)
    first = place.take(slot="1", unchanged="link")
    for number in (0, 17, 59):
        place.stored(first.id, f"memory/{number % 5}/{number}.json").write_text("rotten")
    bad = {"memory/0/0.json", "memory/2/17.json", "memory/4/59.json"}
    second = place.take(slot="2", now=NOON + 1, unchanged="link")
    assert verify_snapshot(place.repo, second.id, NOON) == []
    assert len(second.warnings) == 3
    assert {problem.path for problem in verify_snapshot(place.repo, first.id, NOON)} == bad


def test_files_that_another_process_could_not_read_are_named() -> None:
    with without_privileges() as base:
        place = Place(base).fill()
        for number in range(30):
            place.write(f"memory/{number}.txt", "x")
        (place.root / "memory" / "7.txt").chmod(0)
        made = place.take()
        assert made.status == "partial"
        assert [problem.path for problem in made.problems] == ["memory/7.txt"]


def test_a_part_whose_process_was_killed_is_done_again() -> None:
    here = os.getpid()

    def work(part: Sequence[int]) -> int:
        if 8 in part and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return sum(part)

    done = list(in_parts(range(50), [1] * 50, work))
    assert sum(result for _, result in done) == sum(range(50))
    assert sorted(item for part, _ in done for item in part) == list(range(50))


def test_what_fails_in_a_part_fails_here() -> None:
    def work(part: Sequence[int]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    with pytest.raises(OSError, match="No space") as caught:
        list(in_parts(range(50), [1] * 50, work))
    assert caught.value.errno == errno.ENOSPC


def test_a_part_is_many_small_files_or_few_large_ones() -> None:
    sizes = [10] * 20 + [1 << 20] + [10] * 3 + [1 << 20] * 2
    done = [part for part, _ in in_parts(range(len(sizes)), sizes, len, processes=1)]
    assert done == [range(7), range(7, 14), range(14, 21), range(21, 25), range(25, 26)]
    assert parts.are_worth_it([1 << 20] * 2)
    assert not parts.are_worth_it([1 << 30]), "nobody is there to share it with"
    assert not parts.are_worth_it([10] * 8)


def test_a_few_large_files_go_through_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path).fill()
    for number in range(3):
        place.write(f"memory/{number}.bin", os.urandom(5 << 20))
    read_here: list[int] = []
    for name in ("copy_hashed", "hash_from_disk", "copy"):
        real = getattr(large, name)
        monkeypatch.setattr(large, name, lambda *a, real=real: (read_here.append(os.getpid()), real(*a))[1])
    monkeypatch.setattr(verify, "hash_from_disk", large.hash_from_disk)
    made = place.take()
    assert content_of(place.repo.path(made.id) / "files") == content_of(place.root)
    assert content_of(restored(place)) == content_of(place.root)
    assert read_here == [], "others did it"


def restored(place: Place) -> Path:
    plan = plan_restore(place.repo, AgentFiles("z", place.root), proven=False)
    return execute(plan, place.base / "restored", evidence=None, now=NOON).target


def test_a_restore_by_several_processes_is_the_one_that_one_process_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = filled(tmp_path)
    place.write("skills/broken.py", "mended = True\n")
    (place.root / "memory/4/4.json").chmod(0o755)
    (place.root / "memory/4").chmod(0o500)
    place.take()
    read_by: list[int] = []
    monkeypatch.setattr(
        staging, "copy_file", lambda *a, **k: (read_by.append(os.getpid()), copy_file(*a, **k))
    )
    root = restored(place)
    assert content_of(root) == content_of(place.root)
    for path in content_of(root):
        old, new = (place.root / path).lstat(), (root / path).lstat()
        assert (new.st_mode, new.st_mtime_ns, new.st_nlink) == (old.st_mode, old.st_mtime_ns, old.st_nlink), (
            path
        )
    assert os.getxattr(root / "memory/3/3.json", "user.mood") == b"fine"
    assert read_by == [], "others did it"


def test_a_restore_is_whole_though_one_of_its_processes_was_killed_in_the_midst_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = filled(tmp_path)
    place.write("skills/broken.py", "mended = True\n")
    place.take()
    here, killed = os.getpid(), tmp_path / "killed"

    def deadly(source: Tree, target: Tree, entry: Entry, *, finish: bool) -> None:
        copy_file(source, target, entry, finish=finish)
        if os.getpid() != here and entry.path == "memory/3/33.json":
            target_fd = target.open(entry.path, os.O_WRONLY | os.O_TRUNC)
            os.write(target_fd, b"half")
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(staging, "copy_file", deadly)
    assert content_of(restored(place)) == content_of(place.root)
    assert killed.exists()


def test_rot_that_another_process_reads_stops_a_restore(tmp_path: Path) -> None:
    place = filled(tmp_path)
    place.write("skills/broken.py", "mended = True\n")
    made = place.take()
    place.stored(made.id, "memory/2/17.json").write_text("rotten")
    with pytest.raises(DamagedSnapshot, match="17"):
        restored(place)
    assert not (place.base / "restored").exists()
    assert place.repo.get_head(made.id).damaged
