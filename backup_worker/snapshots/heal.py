"""Mend rot: put a sound copy of the same content in the place of a damaged file.

A sound copy is a file of any snapshot in the repository with the same size and SHA-256, read from the disk and proven
on the way. It is copied, never linked, so that what is mended shares no block with anything; it takes the place of the
damaged file by one rename. A snapshot counts as sound again only when all of it has been proven anew. What no copy can
be found of stays as it is and stays named; killed anywhere, each file is the damaged or the mended one.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from backup_worker.snapshots import disk
from backup_worker.snapshots.content import copy_hashed, forget
from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.errors import SnapshotError, printable, translated
from backup_worker.snapshots.manifest import FILES, Entry, Head, Problem
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


class Sources:
    """In which snapshots each content may be found, for all that is healed in one run.

    Every manifest is read when the first damage is met, and not again; eight bytes of each hash are kept, and tell
    which manifests are worth a second look. What is made later is not looked at.
    """

    def __init__(self, repo: Repository) -> None:
        self._repo = repo

    @cached_property
    def _known(self) -> list[tuple[Head, array[int]]]:
        known = []
        for head in self._repo.snapshots():
            with contextlib.suppress(SnapshotError, NotFound):
                hashes = {_short(e.sha256) for e in self._repo.get(head.id).entries if e.sha256}
                known.append((head, array("Q", hashes)))
        return known

    def places(
        self, identifier: str, wanted: Sequence[Entry]
    ) -> dict[tuple[str | None, int], list[tuple[str, str]]]:
        """Return (snapshot, path) of the files that should have the same contents: this agent's newest ones first."""
        found: dict[tuple[str | None, int], list[tuple[str, str]]] = {(e.sha256, e.size): [] for e in wanted}
        damaged = {(identifier, entry.path) for entry in wanted}
        hashes = {_short(entry.sha256) for entry in wanted if entry.sha256}
        heads = [head for head, known in self._known if not hashes.isdisjoint(known)]
        own = identifier.rpartition("/")[2]
        for head in sorted(heads, key=lambda head: (head.agent == own, head.sort_key), reverse=True):
            with contextlib.suppress(SnapshotError, NotFound):
                for other in self._repo.get(head.id).entries:
                    same = found.get((other.sha256, other.size)) if other.kind == "file" else None
                    if same is not None and (head.id, other.path) not in damaged:
                        same.append((head.id, other.path))
        return found


def _short(sha256: str) -> int:
    return int(sha256[:16], 16)


@translated("healing")
def heal_snapshot(
    repo: Repository, identifier: str, now: float, sources: Sources | None = None
) -> tuple[list[Problem], list[Healed]]:
    """Verify `identifier`, mend what can be, and verify again; return what is still wrong, and what was mended.

    Whoever heals many gives them the same `sources`. Raises NotFound. May run beside backups, restores and prunes.
    """
    with repo.hold([identifier]):
        problems = prove(repo, identifier, now=now)
        if not problems:
            return [], []
        with repo.lock("heal"):
            paths = {problem.path for problem in problems}
            healed = list(_mend(repo, identifier, paths, sources or Sources(repo)))
        return (prove(repo, identifier, now=now) if healed else problems), healed


def _mend(repo: Repository, identifier: str, paths: set[str], sources: Sources) -> Iterator[Healed]:
    try:
        manifest = repo.get(identifier)
    except SnapshotError:
        return  # nothing says any more what should be there
    wanted = [entry for entry in manifest.entries if entry.kind == "file" and entry.path in paths]
    repo.prepare()
    places = sources.places(identifier, wanted) if wanted else {}
    for entry in wanted:
        for source, path in places.get((entry.sha256, entry.size), ()):
            if _replace(repo, identifier, entry, source, path):
                yield Healed(entry.path, source)
                break


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
