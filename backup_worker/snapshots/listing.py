"""What of an agent's tree is in scope at one moment.

Names are reached through folder descriptors, and links never followed. What vanishes while it is listed counts as never
seen; a folder that cannot be listed for any other reason becomes a problem of the snapshot. Raises OSError only where
the root itself is gone.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from typing import NamedTuple

from backup_worker.snapshots import sqlite
from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.manifest import Problem
from backup_worker.snapshots.scope import Scope

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class State(NamedTuple):
    """What changes when a file is written, replaced, or has its mode, owner or names changed.

    Named as in `os.stat_result`, which takes three times the memory: a large agent has a hundred thousand of them.
    """

    st_mode: int
    st_ino: int
    st_size: int
    st_mtime_ns: int
    st_ctime_ns: int
    st_nlink: int
    st_uid: int
    st_gid: int
    st_dev: int

    @property
    def st_mtime(self) -> float:
        """Unix seconds."""
        return self.st_mtime_ns / 1e9

    @property
    def st_ctime(self) -> float:
        """Unix seconds."""
        return self.st_ctime_ns / 1e9


@dataclass
class Listing:
    """The paths in scope with their state, in no order, and the folders that could not be listed."""

    found: dict[str, State] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def state_of(info: os.stat_result) -> State:
    """Return what counts of a stat."""
    return State(
        info.st_mode, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns,
        info.st_nlink, info.st_uid, info.st_gid, info.st_dev,
    )  # fmt: skip


def signature(info: State) -> tuple[int, ...]:
    """Return what tells that a file changed, and is the same again after its file system was mounted anew."""
    return info[:5]


def list_scope(source: Tree, scope: Scope) -> Listing:
    """List what is in scope; folders on the way to it are in, so that their modes come back."""
    listing = Listing({".": state_of(os.fstat(source.fd))})
    found = listing.found
    excludes, includes, is_folder = scope.excludes, scope.includes, stat.S_ISDIR
    pending = ["."]
    while pending:
        here = pending.pop()
        prefix = "" if here == "." else here + "/"
        for name, info in _list_folder(source, here, listing.problems):
            path = prefix + name
            if excludes(path):
                continue
            if is_folder(info.st_mode):
                if scope.may_hold(path):
                    pending.append(path)
                    found[path] = info
            elif includes(path):
                found[path] = info
    _drop_companions(source, found)
    _drop_bare_ways(scope, found)
    return listing


def _list_folder(source: Tree, folder: str, problems: list[Problem]) -> list[tuple[str, State]]:
    found = []
    try:
        with os.scandir(source.folder(folder)) as listing:
            for entry in listing:
                try:
                    found.append((entry.name, state_of(entry.stat(follow_symlinks=False))))
                except FileNotFoundError:
                    continue  # gone between listing and looking: as if it had never been listed
    except OSError as error:
        if error.errno not in _GONE:
            problems.append(Problem(folder, f"cannot be listed: {(error.strerror or '').lower()}"))
    return found


def _drop_companions(source: Tree, found: dict[str, State]) -> None:
    """Drop the logs of databases: what is in them is in the databases' copies."""
    for path in [path for path in found if path.endswith(sqlite.COMPANIONS)]:
        base = path.rpartition("-")[0]
        if base in found and _has_magic(source, base, found[base]):
            del found[path]


def _has_magic(source: Tree, path: str, info: State) -> bool:
    if not stat.S_ISREG(info.st_mode):
        return False
    try:
        fd = source.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return sqlite.is_database(os.pread(fd, 20, 0))
    except OSError:
        return False
    finally:
        os.close(fd)


def _drop_bare_ways(scope: Scope, found: dict[str, State]) -> None:
    """Drop folders that are not covered themselves and turned out to lead to nothing."""
    bare = {path for path, info in found.items() if stat.S_ISDIR(info.st_mode) and not scope.covers(path)}
    if not bare - {"."}:
        return
    needed = {"."}
    for path in found.keys() - bare:
        while path and path not in needed:
            needed.add(path)
            path = path.rpartition("/")[0]
    for path in bare - needed:
        del found[path]
