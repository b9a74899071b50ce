"""What stands in an agent's guarded files: those of the classes whose every change needs an approval.

`look` answers path -> SHA-256 of the living files. It asks for stat first and reads only what has changed since the
last look; what was changed so shortly before a look that a later change could bear the same times is read again. It
never follows a link (a link counts by what it points to), and leaves out databases, whose bytes mean nothing while
they are open.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgpack

from backup_worker.snapshots import AgentFiles, Entry, Scope, SnapshotError
from backup_worker.snapshots.content import copy_hashed
from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.listing import State, list_scope, signature
from backup_worker.snapshots.sqlite import is_database

if TYPE_CHECKING:
    from redis import Redis

    from backup_worker.config import Config

_SEEN = "backup:guarded:"
"""Hash, with the agent's name: path -> msgpack list of the file's signature, its SHA-256 and when it was read."""

_RACY_S = 2.0
"""Within so many seconds two changes of a file may bear the same time."""

_DATABASE = ""


@dataclass(frozen=True, slots=True)
class Look:
    """The guarded files at one moment: `found` is path -> SHA-256, `changed_at` when each was changed last."""

    found: Mapping[str, str]
    changed_at: Mapping[str, float]
    modes: Mapping[str, int]


def scope_of(config: Config, agent: str) -> Scope:
    """Return which of the agent's paths are guarded. Raises NotFound."""
    return config.files_of(agent).scope(config.schedule.approvals.classes)


def look(client: Redis | None, files: AgentFiles, scope: Scope, now: float) -> Look:
    """Look at the guarded files now. Raises SnapshotError if the root, or a folder in scope, cannot be read."""
    known = _remembered(client, files.name)
    try:
        with Tree(files.root, follow=True) as tree:
            listing = list_scope(tree, scope)
            if listing.problems:
                first = listing.problems[0]
                raise SnapshotError(f"“{first.path}” of “{files.name}” {first.problem}")
            digests, fresh = {}, {}
            for path, info in listing.found.items():
                digest = _digest(tree, path, info, known.get(path))
                if digest is None:
                    continue
                digests[path] = digest
                if now - info.st_ctime > _RACY_S:
                    fresh[path] = (list(signature(info)), digest)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise SnapshotError(f"the files of “{files.name}” cannot be read: {reason}") from error
    _remember(client, files.name, fresh, known)
    guarded = {path: digest for path, digest in digests.items() if digest != _DATABASE}
    infos = listing.found
    return Look(
        guarded,
        {path: infos[path].st_ctime for path in guarded},
        {path: stat.S_IMODE(infos[path].st_mode) for path in guarded},
    )


def of_entries(entries: Iterable[Entry], scope: Scope) -> dict[str, str]:
    """Return what a snapshot holds of the guarded files: path -> SHA-256, as `look` says it."""
    found = {}
    for entry in entries:
        if not scope.covers(entry.path) or entry.sqlite:
            continue
        if entry.kind == "file" and entry.sha256:
            found[entry.path] = entry.sha256
        elif entry.kind == "link":
            found[entry.path] = _link_digest(entry.target or "")
    return found


def _digest(tree: Tree, path: str, info: State, known: tuple[list[int], str] | None) -> str | None:
    """Return the SHA-256 of what stands at `path`, None for what is not guarded: folders, sockets and the like."""
    if stat.S_ISLNK(info.st_mode):
        folder, name = tree.at(path)
        return _link_digest(os.readlink(name, dir_fd=folder))
    if not stat.S_ISREG(info.st_mode):
        return None
    if known is not None and known[0] == list(signature(info)):
        return known[1]
    try:
        fd = tree.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        if is_database(os.pread(fd, 20, 0)):
            return _DATABASE
        return copy_hashed(fd, None, info.st_size)[1]
    finally:
        os.close(fd)


def _link_digest(target: str) -> str:
    return hashlib.sha256(b"link to " + os.fsencode(target)).hexdigest()


def _remembered(client: Redis | None, agent: str) -> dict[str, tuple[list[int], str]]:
    if client is None:
        return {}
    rows: Any = client.hgetall(_SEEN + agent)
    found = {}
    for path, row in rows.items():
        marks, digest = msgpack.unpackb(row)
        found[os.fsdecode(path)] = (marks, digest)
    return found


def _remember(
    client: Redis | None,
    agent: str,
    fresh: Mapping[str, tuple[list[int], str]],
    known: Mapping[str, tuple[list[int], str]],
) -> None:
    if client is None or fresh == known:
        return
    with client.pipeline(transaction=True) as pipeline:
        pipeline.delete(_SEEN + agent)
        if fresh:
            rows: Any = {os.fsencode(path): msgpack.packb(row) for path, row in fresh.items()}
            pipeline.hset(_SEEN + agent, mapping=rows)
        pipeline.execute()
