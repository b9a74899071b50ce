"""The list of snapshots, kept in memory: no page waits for 20,000 of them to be read.

Whether anything was added or removed is seen from the times of the folders, once a second at most; then, and every
`LATEST_S` for what folders do not tell (a new date of verification), the list is read anew in the background, and
pages show the one before meanwhile (a short list is read at once). Only the very first reader waits. What somebody
changes in this console is seen at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from backup_worker.console.background import Background
from em_bridge import clock
from em_bridge.errors import NotFound

if TYPE_CHECKING:
    from pathlib import Path

    from backup_worker.snapshots import Head, Repository

FRESH_S = 1.0
LATEST_S = 30.0
FEW = 2000
"""So many are read at once by the page that notices the change."""

NOTES = ("pins", "damaged", "failed")


class Shelf:
    """The snapshots of one repository, oldest first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._root: Path | None = None
        self._heads: list[Head] = []
        self._stamp = 0
        self._looked_at = self._read_at = 0.0
        self._background: Background[None] = Background("shelf")

    def heads(self, repository: Repository) -> list[Head]:
        """Return the snapshots as they were a moment ago."""
        with self._lock:
            if self._root != repository.root:
                self._read(repository)
            now, few = clock.monotonic(), len(self._heads) <= FEW
            if few or now - self._looked_at >= FRESH_S:
                self._looked_at = now
                if now - self._read_at >= (FRESH_S if few else LATEST_S) or stamp(repository) != self._stamp:
                    if few:
                        self._read(repository)
                    else:
                        self._background.start("read", lambda: self._read(repository))
            return self._heads

    def _read(self, repository: Repository) -> None:
        # The stamp first: what comes while we read makes the next look read again.
        found, read_at = stamp(repository), clock.monotonic()
        self._heads = repository.snapshots()
        self._stamp, self._read_at, self._root = found, read_at, repository.root

    def warm(self, repository: Repository) -> None:
        """Read the list before somebody asks for it."""
        self._background.start("read", lambda: self._read(repository))

    def renew(self, repository: Repository, identifier: str) -> None:
        """Read one snapshot's head again, which was changed from here."""
        try:
            new = repository.get_head(identifier)
        except NotFound:
            return
        with self._lock:
            self._heads = [new if head.id == identifier else head for head in self._heads]

    def close(self) -> None:
        """Read no more."""
        self._background.close()


def stamp(repository: Repository) -> int:
    """Return a number that changes when a snapshot comes or goes, or is pinned, damaged or failing."""
    return hash(tuple(_times(repository)))


def _times(repository: Repository) -> Iterator[tuple[str, int]]:
    tiers = [entry for entry in _folders(repository.root) if not entry.name.startswith(".")]
    for tier in tiers:
        for slot in _folders(tier.path):
            yield slot.path, slot.stat(follow_symlinks=False).st_mtime_ns
    for kind in NOTES:
        try:
            yield kind, os.stat(repository.hidden / kind).st_mtime_ns
        except OSError:
            yield kind, 0


def _folders(path: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as found:
            return sorted(
                (one for one in found if one.is_dir(follow_symlinks=False)), key=lambda one: one.name
            )
    except OSError:
        return []
