"""Mend rot: put a sound copy of the same content in the place of a damaged file.

A sound copy is a file of any snapshot in the repository with the same size and SHA-256, read from the disk and proven
on the way. It is copied, never linked, so that what is mended shares no block with anything; it takes the place of the
damaged file by one rename. A snapshot counts as sound again only when all of it has been proven anew. What no copy can
be found of stays as it is and stays named; killed anywhere, each file is the damaged or the mended one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backup_worker.snapshots import disk
from backup_worker.snapshots.content import copy_hashed, forget
from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.errors import SnapshotError, printable, translated
from backup_worker.snapshots.manifest import FILES, Entry, Problem
from backup_worker.snapshots.repository import Repository
from backup_worker.snapshots.verify import prove
from em_bridge.errors import NotFound


@dataclass(frozen=True, slots=True)
class Healed:
    """A file that was mended, and the id of the snapshot that the sound copy came from."""

    path: str
    source: str

    def as_json(self) -> dict[str, Any]:
        """Return the two fields, the path fit for printing."""
        return {"path": printable(self.path), "from": self.source}


@translated("healing")
def heal_snapshot(repo: Repository, identifier: str, now: float) -> tuple[list[Problem], list[Healed]]:
    """Verify `identifier`, mend what can be, and verify again; return what is still wrong, and what was mended.

    Raises NotFound. May run beside backups, restores and prunes.
    """
    with repo.hold([identifier]):
        problems = prove(repo, identifier, now=now)
        if not problems:
            return [], []
        with repo.lock("heal"):
            healed = list(_mend(repo, identifier, {problem.path for problem in problems}))
        return (prove(repo, identifier, now=now) if healed else problems), healed


def _mend(repo: Repository, identifier: str, paths: set[str]) -> Iterator[Healed]:
    try:
        manifest = repo.get(identifier)
    except SnapshotError:
        return  # nothing says any more what should be there
    wanted = [entry for entry in manifest.entries if entry.kind == "file" and entry.path in paths]
    repo.prepare()
    candidates = _candidates(repo, identifier, wanted)
    for entry in wanted:
        for source, path in candidates.get((entry.sha256, entry.size), ()):
            if _replace(repo, identifier, entry, source, path):
                yield Healed(entry.path, source)
                break


def _candidates(
    repo: Repository, identifier: str, wanted: list[Entry]
) -> dict[tuple[str | None, int], list[tuple[str, str]]]:
    """Return (snapshot, path) of the files that should have the same contents: this agent's newest ones first."""
    found: dict[tuple[str | None, int], list[tuple[str, str]]] = {(e.sha256, e.size): [] for e in wanted}
    damaged = {(identifier, entry.path) for entry in wanted}
    own = identifier.rpartition("/")[2]
    for head in sorted(repo.snapshots(), key=lambda head: (head.agent == own, head.sort_key), reverse=True):
        with contextlib.suppress(SnapshotError, NotFound):
            for other in repo.get(head.id).entries:
                places = found.get((other.sha256, other.size)) if other.kind == "file" else None
                if places is not None and (head.id, other.path) not in damaged:
                    places.append((head.id, other.path))
    return found


def _replace(repo: Repository, identifier: str, entry: Entry, source: str, path: str) -> bool:
    """Copy the file `path` of `source` into the place of `entry`; False if it is not sound either."""
    with contextlib.suppress(NotFound), repo.hold([source]), repo.staging() as staging:
        fresh = staging / "sound"
        if not _copy_if_sound(repo, source, path, entry, fresh):
            return False
        with Tree(repo.path(identifier) / FILES) as files:
            files.make_folders(entry.path.rpartition("/")[0])
            folder, name = files.at(entry.path)
            os.rename(fresh, name, dst_dir_fd=folder)
            os.fsync(folder)
        return True
    return False


def _copy_if_sound(repo: Repository, source: str, path: str, entry: Entry, fresh: Path) -> bool:
    try:
        with repo.files(source) as files:
            fd = files.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        out = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            forget(fd)
            with contextlib.suppress(OSError):
                if copy_hashed(fd, out, entry.size) != (entry.size, entry.sha256):
                    return False
                disk.sync_all(out)
                forget(out)
                os.lseek(out, 0, os.SEEK_SET)
                return copy_hashed(out, None, entry.size) == (entry.size, entry.sha256)
            return False
        finally:
            os.close(out)
    finally:
        os.close(fd)
