"""Build the tree that takes the place of the old one: what the plan decides, and what it says nothing about.

Nothing of the old tree is changed. What the snapshots hold is copied, proven later by whoever asked; what they say
nothing about is carried over, shared (excluded paths) or copied.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence

from backup_worker.snapshots import disk, parts
from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.exact_copy import as_folder, copy_any, copy_file
from backup_worker.snapshots.manifest import Entry
from backup_worker.snapshots.parts import in_parts
from backup_worker.snapshots.scope import WORKSHOP, Scope
from backup_worker.snapshots.state import Piece, RestorePlan, is_special


def stage(plan: RestorePlan, staged: Tree) -> list[Entry]:
    """Copy every piece; return those that do not have their modes and times yet.

    The content is compared when it is read back from the disk, so that it is hashed once.
    """
    later: list[Entry] = []
    files: list[Piece] = []
    twins: list[Piece] = []
    privileged = os.geteuid() == 0
    for piece in plan.pieces:
        entry = piece.entry
        if entry.kind == "file":
            (twins if entry.hardlink else files).append(piece)
            if not stays_readable(entry, privileged):
                later.append(entry)
            continue
        if entry.kind == "link":
            folder, name = staged.at(entry.path)
            os.symlink(entry.target or "", name, dir_fd=folder)
        elif entry.path != ".":
            staged.make_folders(entry.path)
        later.append(entry)
    with contextlib.ExitStack() as stack:
        sources = {name: stack.enter_context(plan.repo.files(name)) for name in plan.sources}

        def copy(part: Sequence[Piece]) -> None:
            for piece in part:
                finish = stays_readable(piece.entry, privileged)
                try:
                    copy_file(sources[piece.source], staged, piece.entry, finish=finish)
                except FileExistsError:
                    # A process that was to copy this part was killed in the midst of it.
                    staged.remove(piece.entry.path)
                    copy_file(sources[piece.source], staged, piece.entry, finish=finish)

        sizes = [piece.entry.size for piece in files]
        if parts.are_worth_it(sizes):
            for _ in in_parts(files, sizes, copy):
                pass
        else:
            copy(files)
        origin = {piece.entry.path: piece.source for piece in plan.pieces} if twins else {}
        for piece in twins:
            entry = piece.entry
            if not (origin.get(entry.hardlink or "") == piece.source and _join(staged, entry)):
                copy([piece])
    return later


def stays_readable(entry: Entry, privileged: bool) -> bool:
    """Tell whether it, and what it holds, can still be read back when it has its mode."""
    needed = {"file": 0o400, "dir": 0o500, "link": 0}[entry.kind]
    return privileged or entry.mode & needed == needed


def _join(staged: Tree, entry: Entry) -> bool:
    """Make the path another name of the file that it was a hard link to; tell whether that was possible."""
    assert entry.hardlink is not None
    try:
        folder, name = staged.at(entry.hardlink)
        held = os.dup(folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        to_folder, to_name = staged.at(entry.path)
        os.link(name, to_name, src_dir_fd=held, dst_dir_fd=to_folder, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EMLINK, errno.EPERM):
            return False
        raise
    finally:
        os.close(held)
    return True


def carry_over(plan: RestorePlan, old: Tree, staged: Tree) -> tuple[list[Entry], frozenset[str]]:
    """Bring what the plan does not decide about into the new tree.

    Returns the folders made, for their modes, and what could not come along because a file is where its folder was.
    """
    folders: list[Entry] = []
    blocked = set()
    excluded = Scope((), tuple(plan.agent.exclude))
    for path, info in disk.walk(old):
        if (plan.decides(path) and not is_special(info)) or path.split("/")[0] == WORKSHOP:
            continue
        here = staged.find(path)
        if _is_blocked(staged, path) or (
            here is not None and stat.S_ISDIR(here.st_mode) != stat.S_ISDIR(info.st_mode)
        ):
            blocked.add(path)
        elif stat.S_ISDIR(info.st_mode):
            staged.make_folders(path)
            folders.append(as_folder(path, info))
        elif here is None:
            _make_ways(old, staged, path, folders)
            share = is_special(info) or excluded.excludes(path)
            if not (share and _link_file(old, staged, path)):
                copy_any(old, staged, path, info)
    return folders, frozenset(blocked)


def _is_blocked(staged: Tree, path: str) -> bool:
    """Tell whether the new tree has a file where `path` needs a folder; the path is then only in the evidence."""
    above = path.rpartition("/")[0]
    while above:
        here = staged.find(above)
        if here is not None:
            return not stat.S_ISDIR(here.st_mode)
        above = above.rpartition("/")[0]
    return False


def _make_ways(old: Tree, staged: Tree, path: str, folders: list[Entry]) -> None:
    above = path.rpartition("/")[0]
    missing = []
    while above and staged.find(above) is None:
        missing.append(above)
        above = above.rpartition("/")[0]
    for folder in reversed(missing):
        staged.make_folders(folder)
        folders.append(as_folder(folder, old.lstat(folder)))


def _link_file(old: Tree, staged: Tree, path: str) -> bool:
    """Share an excluded file with the new tree: the old one loses it when it is removed."""
    try:
        from_folder, name = old.at(path)
        to_folder, _ = staged.at(path)
        os.link(name, name, src_dir_fd=from_folder, dst_dir_fd=to_folder, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
            return False
        raise
    return True
