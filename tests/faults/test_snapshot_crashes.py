"""Backup, restore and prune, killed or starved at their file-system calls: the promises hold at every one of them.

`strace` counts the calls of a run and then strikes at one of them: SIGKILL, a full disk, an input/output error. A
sample is taken by default; `FAULTS=all` strikes at every call.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backup_worker.snapshots import finish_interrupted, index, large, verify_snapshot
from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.repository import INDEX
from tests.agent_on_disk import NOON, Place, content_of, coreutils_proves
from tests.faults.act import act
from tests.small_disk import fill, small_disk
from tests.tools import needs

CALLS = (
    "mkdir", "mkdirat", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "link", "linkat", "symlink",
    "symlinkat", "write", "pwrite64", "ftruncate", "fsync", "fdatasync", "syncfs", "chmod", "fchmod", "fchmodat",
    "chown", "fchown", "fchownat", "copy_file_range", "setxattr", "fsetxattr", "utimensat", "flock",
)  # fmt: skip
"""Every call by which the engine changes a disk; between two of them nothing changes."""

SAMPLE = 12
OPERATIONS = ("backup", "restore", "restore-inside", "prune")

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(autouse=True, scope="module")
def _strace_is_there() -> None:
    needs("strace", why="it strikes at each system call")


def strace(operation: str, base: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["strace", "-f", "-qq", "-e", "signal=none", *options]
    command += [sys.executable, "-m", "tests.faults.act", operation, str(base)]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def prepare(base: Path) -> Place:
    """Make a place with four snapshots, and a tree that has changed since and holds excluded files."""
    place = Place(base).fill()
    place.write("frozen/rules.md", "nobody writes here\n")
    (place.root / "frozen").chmod(0o500)
    for number in range(4):
        place.write("memory/notes.md", f"memory number {number}\n" * 30)
        place.take(slot=f"s{number}", now=NOON + number, unchanged="link")
    place.write("SOUL.md", "I have changed, but not beyond recognition.\n")
    place.write("memory/since.md", "made since the last backup\n" * 20)
    place.write("venv/bin/tool", "not backed up")
    (place.root / "skills" / "greet.py").unlink()
    return place


def count_calls(operation: str, base: Path) -> dict[str, int]:
    """Return how often each call happens in a run of `operation`."""
    trace = base.parent / f"{base.name}.trace"
    done = strace(operation, base, "-o", str(trace), "-e", f"trace={','.join(CALLS)}")
    assert done.returncode == 0, done.stderr
    names = re.findall(r"^\d+ +(\w+)\(", trace.read_text(), re.MULTILINE)
    return {name: names.count(name) for name in set(names)}


def points_of(operation: str, counts: dict[str, int], sample: int) -> list[tuple[str, int]]:
    every = [(name, index) for name, count in sorted(counts.items()) for index in range(1, count + 1)]
    if os.environ.get("FAULTS") == "all":
        return every
    # Renames decide; they are always struck at.
    decisive = [point for point in every if point[0].startswith("rename")]
    chosen = random.Random(operation).sample(every, min(sample, len(every)))
    return sorted({*chosen, *decisive[-3:]})


def strike_everywhere(
    operation: str,
    tmp_path: Path,
    inject: str,
    judge: Callable[[Place, int, str], None],
    sample: int = SAMPLE,
    prepared: Callable[[Path], Place] | None = None,
) -> None:
    template = (prepared or prepare)(tmp_path / "template").base
    shutil.copytree(template, tmp_path / "counted", symlinks=True)
    points = points_of(operation, count_calls(operation, tmp_path / "counted"), sample)

    def strike(point: tuple[str, int]) -> bool:
        name, index = point
        base = tmp_path / f"{name}-{index}"
        subprocess.run(["cp", "-a", str(template), str(base)], check=True)
        done = strace(
            operation,
            base,
            "-o",
            "/dev/null",
            "-e",
            f"trace={name}",
            "-e",
            f"inject={name}:{inject}:when={index}",
        )
        try:
            judge(Place(base), done.returncode, done.stderr)
        except AssertionError as error:
            raise AssertionError(
                f"{operation}, {inject} at {name} number {index}: {error}\n{done.stderr}"
            ) from error
        with Tree(base.parent) as around:
            around.remove(base.name)
        return done.returncode != 0

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        felt = sum(pool.map(strike, points))
    print(f"{operation}: {inject} at {len(points)} points, {felt} of them felt")
    # Without this, a strike that never lands would pass as a promise kept.
    assert felt >= len(points) * (0.9 if "KILL" in inject else 0.25)


def only_whole_snapshots(place: Place) -> None:
    repo = place.repo
    assert repo.unreadable() == []
    for head in repo.snapshots():
        assert verify_snapshot(repo, head.id, NOON) == [], head.id
        assert coreutils_proves(repo.path(head.id)), head.id


def nothing_left_over(place: Place) -> None:
    for name in ("staging", "trash"):
        assert os.listdir(place.repo.hidden / name) == []
    assert sorted(os.listdir(place.root.parent)) == ["z"]
    if (place.base / "evidence").is_dir():
        assert not [name for name in os.listdir(place.base / "evidence") if name.startswith(".")]


# -- killed --------------------------------------------------------------------------------------------------


def after_a_killed_backup(place: Place, code: int, said: str) -> None:
    assert code in (0, -9, 137), said
    only_whole_snapshots(place)
    slots = [head.slot for head in place.repo.snapshots()]
    assert slots[:4] == ["s0", "s1", "s2", "s3"]
    assert slots[4:] in ([], ["new"])
    act("backup", place)
    assert [head.slot for head in place.repo.snapshots()][4:] == ["new"]
    only_whole_snapshots(place)
    nothing_left_over(place)


def restored_content(place: Place) -> dict[str, str | bytes]:
    """Return what the tree holds after a restore of the newest snapshot in `prepare`."""
    return content_of(place.repo.path("daily/s3/z") / "files") | {
        "venv": "/", "venv/bin": "/", "venv/bin/tool": b"not backed up",
    }  # fmt: skip


def after_a_killed_restore(place: Place, code: int, said: str, *, inside: bool = False) -> None:
    assert code in (0, -9, 137), said
    old = content_of(prepare(place.base / "again").root)
    new = restored_content(place)
    if inside:
        finish_interrupted(place.root)
    found = content_of(place.root)
    assert found in (old, new), "neither the old nor the new tree"
    if found == new:
        kept = content_of(place.base / "evidence" / "tree")
        assert kept == {path: text for path, text in old.items() if not path.startswith("venv")}
    act("restore-inside" if inside else "restore", place)
    assert content_of(place.root) == new
    assert (place.root / "venv/bin/tool").stat().st_nlink == 1
    assert stat.S_IMODE((place.root / "frozen").stat().st_mode) == 0o500
    only_whole_snapshots(place)
    nothing_left_over_after_restore(place)


def nothing_left_over_after_restore(place: Place) -> None:
    assert sorted(os.listdir(place.root.parent)) == ["z"]
    assert not [name for name in os.listdir(place.root) if name.startswith(".agent-backup")]


def after_a_killed_prune(place: Place, code: int, said: str) -> None:
    assert code in (0, -9, 137), said
    only_whole_snapshots(place)
    slots = [head.slot for head in place.repo.snapshots()]
    assert slots[-2:] == ["s2", "s3"]
    act("prune", place)
    assert [head.slot for head in place.repo.snapshots()] == ["s2", "s3"]
    only_whole_snapshots(place)
    place.repo.sweep()
    nothing_left_over(place)


def test_a_backup_killed_anywhere_leaves_only_whole_snapshots(tmp_path: Path) -> None:
    strike_everywhere("backup", tmp_path, "signal=SIGKILL", after_a_killed_backup)


def test_a_restore_killed_anywhere_leaves_the_old_or_the_new_tree(tmp_path: Path) -> None:
    strike_everywhere("restore", tmp_path, "signal=SIGKILL", after_a_killed_restore)


def prepare_two_changed(base: Path) -> Place:
    place, other = prepare(base), Place(base, "zoe").fill()
    other.take(now=NOON)
    other.write("SOUL.md", "I have changed, too.\n")
    return place


def test_restores_that_wait_together_killed_anywhere_leave_each_tree_old_or_new(tmp_path: Path) -> None:
    def judge(place: Place, code: int, said: str) -> None:
        assert code in (0, -9, 137), said
        other, prepared = Place(place.base, "zoe"), prepare_two_changed(place.base / "again")
        assert content_of(place.root) in (content_of(prepared.root), restored_content(place))
        old = content_of(Place(prepared.base, "zoe").root)
        new = content_of(other.repo.path("daily/s/zoe") / "files")
        assert content_of(other.root) in (old, new)
        act("restores", place)
        assert content_of(place.root) == restored_content(place)
        assert content_of(other.root) == new
        assert sorted(os.listdir(place.root.parent)) == ["z", "zoe"]
        only_whole_snapshots(place)

    strike_everywhere("restores", tmp_path, "signal=SIGKILL", judge, prepared=prepare_two_changed)


def test_a_restore_inside_a_mount_point_killed_anywhere_can_be_finished(tmp_path: Path) -> None:
    def judge(place: Place, code: int, said: str) -> None:
        after_a_killed_restore(place, code, said, inside=True)

    strike_everywhere("restore-inside", tmp_path, "signal=SIGKILL", judge)


def test_a_prune_killed_anywhere_deletes_whole_snapshots_or_none(tmp_path: Path) -> None:
    strike_everywhere("prune", tmp_path, "signal=SIGKILL", after_a_killed_prune)


def prepare_two(base: Path) -> Place:
    place = prepare(base)
    Place(base, "zoe").fill()
    return place


def test_backups_that_wait_together_killed_anywhere_leave_only_whole_snapshots(tmp_path: Path) -> None:
    def judge(place: Place, code: int, said: str) -> None:
        assert code in (0, -9, 137), said
        only_whole_snapshots(place)
        found = {(head.agent, head.slot) for head in place.repo.snapshots()}
        assert found >= {("z", f"s{number}") for number in range(4)}
        act("several", place)
        found = {(head.agent, head.slot) for head in place.repo.snapshots()}
        assert found >= {("z", "new"), ("zoe", "new")}
        only_whole_snapshots(place)
        assert os.listdir(place.repo.hidden / "staging") == []

    strike_everywhere("several", tmp_path, "signal=SIGKILL", judge, prepared=prepare_two)


@pytest.mark.parametrize("inject", ["signal=SIGKILL", "error=ENOSPC", "error=EIO"])
def test_a_list_struck_anywhere_while_it_writes_its_memory_leaves_the_old_or_the_new_one(
    tmp_path: Path, inject: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "WRITE_FROM", 1)

    def judge(place: Place, code: int, said: str) -> None:
        assert code in (0, -9, 137) if "KILL" in inject else code in (0, 3), said
        assert "Traceback" not in said
        heads, unreadable = place.repo.survey()
        assert [head.slot for head in heads] == ["s0", "s1", "s2", "s3"]
        assert unreadable == []
        act("list", place)
        assert len(index.load(place.repo.hidden / INDEX)) == 4
        place.repo.sweep()
        if "KILL" in inject:
            nothing_left_over(place)

    strike_everywhere("list", tmp_path, inject, judge)


def prepare_large(base: Path) -> Place:
    place = prepare(base)
    place.write("memory/large.bin", os.urandom(large.FROM_BYTES + 5))
    return place


@pytest.mark.parametrize("inject", ["signal=SIGKILL", "error=ENOSPC", "error=EIO"])
def test_a_backup_of_a_large_file_struck_anywhere_leaves_only_whole_snapshots(
    tmp_path: Path, inject: str
) -> None:
    def judge(place: Place, code: int, said: str) -> None:
        assert code in ((0, -9, 137) if "KILL" in inject else (0, 3)), said
        assert "Traceback" not in said
        after_a_killed_backup(place, 0, said)

    strike_everywhere("backup", tmp_path, inject, judge, sample=6, prepared=prepare_large)


def prepare_large_lost(base: Path) -> Place:
    place = prepare(base)
    place.write("memory/large.bin", bytes(range(1, 251)) * (large.FROM_BYTES // 250 + 1))
    place.take(slot="s4", now=NOON + 4, unchanged="link")
    place.write("memory/large.bin", "wiped")
    return place


@pytest.mark.parametrize("inject", ["signal=SIGKILL", "error=ENOSPC", "error=EIO"])
def test_a_restore_of_a_large_file_struck_anywhere_leaves_the_old_or_the_new_tree(
    tmp_path: Path, inject: str
) -> None:
    old = content_of(prepare_large_lost(tmp_path / "old").root)

    def judge(place: Place, code: int, said: str) -> None:
        assert code in ((0, -9, 137) if "KILL" in inject else (0, 3)), said
        assert "Traceback" not in said
        new = old | {"memory/large.bin": place.stored("daily/s4/z", "memory/large.bin").read_bytes()}
        assert content_of(place.root) in (old, new), "neither the old nor the new tree"
        act("restore", place)
        assert content_of(place.root) == new
        only_whole_snapshots(place)

    strike_everywhere("restore", tmp_path, inject, judge, sample=3, prepared=prepare_large_lost)


def prepare_rot(base: Path) -> Place:
    place = prepare(base)
    place.take(tier="weekly", slot="w", now=NOON - 1)
    place.write("memory/notes.md", "memory number 3\n" * 30)
    place.take(tier="weekly", slot="x", now=NOON + 5)
    file = place.stored("daily/s3/z", "memory/notes.md")
    file.write_bytes(file.read_bytes().replace(b"3", b"4", 1))
    return place


def test_healing_killed_anywhere_leaves_each_file_damaged_or_sound(tmp_path: Path) -> None:
    def judge(place: Place, code: int, said: str) -> None:
        assert code in (0, -9, 137), said
        assert {problem.path for problem in verify_snapshot(place.repo, "daily/s3/z", NOON)} <= {
            "memory/notes.md"
        }
        act("heal", place)
        only_whole_snapshots(place)
        place.repo.sweep()
        assert os.listdir(place.repo.hidden / "staging") == []

    strike_everywhere("heal", tmp_path, "signal=SIGKILL", judge, prepared=prepare_rot)


# -- starved -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_failing_disk_leaves_nothing_half(tmp_path: Path, operation: str, error: str) -> None:
    def judge(place: Place, code: int, said: str) -> None:
        assert code in (0, 3), said
        assert "Traceback" not in said
        only_whole_snapshots(place)
        slots = [head.slot for head in place.repo.snapshots()]
        if operation != "prune":
            assert slots[:4] == ["s0", "s1", "s2", "s3"]
        if operation.startswith("restore"):
            finish_interrupted(place.root)
            old = content_of(prepare(place.base / "again").root)
            assert content_of(place.root) in (old, restored_content(place))
        act(operation, place)
        only_whole_snapshots(place)
        if operation.startswith("restore"):
            assert content_of(place.root) == restored_content(place)

    strike_everywhere(operation, tmp_path, f"error={error}", judge, sample=4)


# -- really full ---------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "small") as mount:
        yield mount


def test_a_really_full_disk_leaves_the_earlier_snapshots_and_can_be_pruned(disk: Path) -> None:
    from backup_worker.snapshots import NoSpace, Repository, take_snapshot

    place = Place(disk.parent).fill()
    repo = Repository(disk / "repo")

    def take(number: int) -> None:
        place.write("memory/big.bin", os.urandom(300_000))
        take_snapshot(
            repo, place.agent, tier="daily", slot=f"s{number}", include=["*"], unchanged="link", now=NOON + number,
            reason="test",
        )  # fmt: skip

    number = 0
    with pytest.raises(NoSpace):
        for number in range(20):
            take(number)
    whole = [head.slot for head in repo.snapshots()]
    assert whole == [f"s{n}" for n in range(number)]
    assert len(whole) > 3
    assert all(verify_snapshot(repo, head.id, NOON) == [] for head in repo.snapshots())
    assert os.listdir(repo.hidden / "staging") == []
    filler = fill(disk)
    from backup_worker.snapshots import Policy, plan_prune, prune

    deleted = prune(repo, plan_prune(repo, {"daily": Policy(2)}, now=NOON + 99))
    assert len(deleted) == number - 2
    filler.unlink()
    take(50)


def test_a_real_mount_point_as_root_is_restored_inside(disk: Path) -> None:
    from backup_worker.snapshots import AgentFiles, Repository, execute, plan_restore, take_snapshot

    (disk / "memory").mkdir()
    (disk / "memory" / "a.txt").write_text("first")
    (disk / "SOUL.md").write_text("me")
    agent = AgentFiles("z", disk, {}, (), ())
    repo = Repository(disk.parent / "repo")
    take_snapshot(
        repo, agent, tier="daily", slot="s", include=["*"], unchanged="copy", now=NOON, reason="test"
    )
    before = content_of(disk)
    (disk / "SOUL.md").write_text("poisoned")
    (disk / "memory" / "b.txt").write_text("new")
    result = execute(plan_restore(repo, agent), disk, evidence=disk.parent / "evidence", now=NOON)
    assert content_of(disk) == before
    assert result.evidence is not None
    assert content_of(result.evidence)["SOUL.md"] == b"poisoned"
