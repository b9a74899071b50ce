"""Put a new tree in place of an old one so that a crash at any instruction can be finished or undone.

Beside the target, where its parent is on the same file system and writable: the two folders change places in one
system call. Inside the target, where it is a mount point or its parent is not ours: each top-level name moves, and the
journal says how far that got. The journal is written before the first move, and evidence is kept before that; without a
journal a workshop holds nothing but a copy. A restore of the same target is kept out by the kernel's lock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from backup_worker.snapshots import disk
from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.errors import SnapshotError, translated
from backup_worker.snapshots.scope import WORKSHOP

Outcome = Literal["finished", "undone"]
_JOURNAL = "journal.json"
_NOT_HERE = (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EBUSY, errno.EPERM, errno.EACCES)


class CannotExchange(Exception):
    """The two folders cannot change places in one call here: work inside the target instead."""


@dataclass(frozen=True, slots=True)
class Workshop:
    """Where a restore builds: `path` is beside or inside `target`, `tree` below it becomes the new tree."""

    path: Path
    target: Path
    inside: bool

    @property
    def tree(self) -> Path:
        """Where the new tree is built."""
        return self.path / "tree"


def beside(target: Path) -> Workshop:
    """Return the workshop beside `target`."""
    return Workshop(target.parent / f"{WORKSHOP}-{target.name}", target, inside=False)


def inside(target: Path) -> Workshop:
    """Return the workshop inside `target`."""
    return Workshop(target / WORKSHOP, target, inside=True)


def choose(target: Path) -> Workshop:
    """Return the workshop that allows the strongest swap of `target`, as far as that can be seen beforehand."""
    same_device = not target.exists() or (
        target.stat().st_dev == target.parent.stat().st_dev and not os.path.ismount(target)
    )
    return beside(target) if same_device and os.access(target.parent, os.W_OK | os.X_OK) else inside(target)


@contextlib.contextmanager
def opened(workshop: Workshop) -> Iterator[None]:
    """Make the workshop, alone in it; on leaving it is gone, unless a swap that began must be finished first.

    What an earlier restore left is finished or undone. Raises SnapshotError if another restore is under way.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            os.mkdir(workshop.path, 0o700)
        try:
            fd = os.open(workshop.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            with disk.locked(fd, wait=False) as free:
                if not free:
                    raise SnapshotError(f"another restore into “{workshop.target}” is under way")
                if os.fstat(fd).st_nlink == 0:
                    continue  # removed by the restore that just ended
                _settle(workshop)
                os.mkdir(workshop.tree, 0o700)
                try:
                    yield
                finally:
                    if not is_pending(workshop):
                        _clear(workshop)
                return
        finally:
            os.close(fd)


def is_pending(workshop: Workshop) -> bool:
    """Tell whether a swap began there and has not been finished or undone."""
    return (workshop.path / _JOURNAL).exists()


@translated("finishing a restore")
def finish_interrupted(target: Path) -> Outcome | None:
    """Finish or undo what a killed restore left at `target`; None if there was nothing.

    Raises SnapshotError if a restore is under way right now, or if what lies there is not understood.
    """
    target = Path(os.path.realpath(target))
    outcome: Outcome | None = None
    for workshop in (beside(target), inside(target)):
        if not workshop.path.is_dir():
            continue
        fd = os.open(workshop.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            with disk.locked(fd, wait=False) as free:
                if not free:
                    raise SnapshotError(f"a restore into “{target}” is under way")
                mode = _root_mode(workshop)
                outcome = _settle(workshop) or outcome
                _clear(workshop)
                if mode is not None:
                    os.chmod(target, mode)
        finally:
            os.close(fd)
    return outcome


def swap(workshop: Workshop) -> None:
    """Put the built and synced tree in the target's place. Raises CannotExchange with nothing changed.

    The name of a target that was not there before is brought to the disk by the caller.
    """
    if workshop.inside:
        _swap_inside(workshop)
    else:
        _swap_beside(workshop)


def _swap_beside(workshop: Workshop) -> None:
    if not os.path.lexists(workshop.target):
        # One rename, and nothing to undo: without a journal, what a crash leaves in the workshop is only a copy.
        os.rename(workshop.tree, workshop.target)
        return
    new = os.stat(workshop.tree)
    _write_journal(workshop, {"device": new.st_dev, "inode": new.st_ino})
    try:
        disk.exchange(workshop.tree, workshop.target)
    except OSError as error:
        os.unlink(workshop.path / _JOURNAL)
        if error.errno in _NOT_HERE and workshop.target.is_dir():
            raise CannotExchange from error
        raise
    disk.sync_folder(workshop.target.parent)
    # The restore is done. If the old tree cannot be removed now, the next restore does it.
    with contextlib.suppress(OSError):
        _settle(workshop)


def _swap_inside(workshop: Workshop) -> None:
    old = [name for name in os.listdir(workshop.target) if name != WORKSHOP]
    os.mkdir(workshop.path / "old", 0o700)
    disk.sync_folder(workshop.path)
    new = os.listdir(workshop.tree)
    _write_journal(workshop, {"old": old, "new": new, "modes": _made_movable(workshop.tree, new)})
    _settle(workshop)


def _made_movable(tree: Path, names: list[str]) -> dict[str, int]:
    """Let the owner write to the folders in `tree`, and to it (`.`); return the modes they are to get back.

    Who is not root may not move a folder that may not be written.
    """
    modes = {name: os.lstat(tree / name).st_mode for name in [".", *names]}
    locked = {
        name: mode & 0o7777 for name, mode in modes.items() if stat.S_ISDIR(mode) and mode & 0o700 != 0o700
    }
    for name, mode in locked.items():
        os.chmod(tree / name, mode | 0o700)
    return locked


def _write_journal(workshop: Workshop, document: dict[str, Any]) -> None:
    with Tree(workshop.path) as tree:
        disk.replace_file(tree, _JOURNAL, json.dumps(document).encode("ascii"))


def _settle(workshop: Workshop) -> Outcome | None:
    """Finish or undo what the journal says, and leave the workshop empty and without journal."""
    journal = workshop.path / _JOURNAL
    outcome: Outcome | None = None
    if journal.exists():
        document = json.loads(journal.read_bytes())
        outcome = _move_inside(workshop, document) if workshop.inside else _settle_beside(workshop, document)
        # The journal goes first: nothing that it speaks of is left to be done, and without it, what lies here is only
        # a copy. Emptying the workshop first would make it lie: a name missing there would look like one not yet moved.
        os.unlink(journal)
        disk.sync_folder(workshop.path)
    with Tree(workshop.path) as tree:
        for name in os.listdir(tree.fd):
            tree.remove(name)
    return outcome


def _settle_beside(workshop: Workshop, document: dict[str, Any]) -> Outcome:
    wanted = (document["device"], document["inode"])
    if _identity(workshop.target) == wanted:
        disk.sync_folder(workshop.target.parent)
        return "finished"
    if _identity(workshop.tree) in (wanted, None):
        return "undone"
    raise SnapshotError(
        f"“{workshop.path}” holds an interrupted restore that does not fit “{workshop.target}”",
        hint="somebody moved one of them: look at both, and remove the first when you need nothing in it",
    )


def _move_inside(workshop: Workshop, document: dict[str, Any]) -> Outcome:
    """Move the old names out, then the new ones in; each step asks the disk whether it was done already."""
    old, target = workshop.path / "old", workshop.target
    for name in document["old"]:
        if not os.path.lexists(old / name) and os.path.lexists(target / name):
            _move(target / name, old / name)
    disk.sync_folder(old)
    for name in document["new"]:
        if os.path.lexists(workshop.tree / name):
            os.rename(workshop.tree / name, target / name)
    modes = document.get("modes", {})
    for name in modes.keys() - {"."}:
        os.chmod(target / name, modes[name])
    disk.sync_folder(target)
    if workshop.tree.is_dir():
        info = os.stat(workshop.tree)
        with contextlib.suppress(PermissionError):
            os.chown(target, info.st_uid, info.st_gid)
        os.chmod(target, info.st_mode & 0o7777)
    return "finished"


def _move(path: Path, to: Path) -> None:
    try:
        os.rename(path, to)
    except PermissionError:
        # The old tree: what it was like is in the evidence.
        os.chmod(path, 0o700)
        os.rename(path, to)


def _root_mode(workshop: Workshop) -> int | None:
    """Return the mode that the target gets when the workshop inside it is gone; None if it has it already."""
    try:
        document = json.loads((workshop.path / _JOURNAL).read_bytes())
    except FileNotFoundError:
        return None
    mode: int | None = document.get("modes", {}).get(".")
    return mode


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return None
    return info.st_dev, info.st_ino


def _clear(workshop: Workshop) -> None:
    with contextlib.suppress(FileNotFoundError), Tree(workshop.path.parent) as parent:
        parent.remove(workshop.path.name)
