"""Notes about snapshots: pins, dates of verification, damage, failures. One empty file each.

The name says what it is about, its time of modification is the date. A note is on the disk before `put` returns; one
that is lost costs a verification, and never a snapshot.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backup_worker.snapshots import disk
from backup_worker.snapshots.layout import make_private

MANY = 100
"""From so many snapshots on, all notes are listed at once; below, listing those of a large fleet for each of its agents
would take the square of its size."""


@dataclass(frozen=True, slots=True)
class Marks:
    """What the notes say of some snapshots, by id."""

    verified_at: Mapping[str, float]
    pinned: Collection[str]
    damaged: Collection[str]

    def of(self, identifier: str, created_at: float) -> dict[str, Any]:
        """Return the three fields of a head that are not in its manifest."""
        return {
            # A snapshot is read back before it gets its name: its making is its first verification.
            "verified_at": self.verified_at.get(identifier, created_at),
            "pinned": identifier in self.pinned,
            "damaged": identifier in self.damaged,
        }


class Notes:
    """Notes of several kinds, in a folder each, below `folder` in the repository `root`."""

    def __init__(self, folder: Path, root: Path) -> None:
        self._folder, self._root = folder, root

    def at(self, kind: str, key: str) -> float | None:
        """Return the date of a note in Unix seconds, or None if there is none."""
        try:
            return os.stat(f"{self._folder}/{kind}/{key.replace('/', '@')}", follow_symlinks=False).st_mtime
        except FileNotFoundError:
            return None

    def put(self, kind: str, key: str, at: float | None = None) -> None:
        """Make a note, dated `at` (default: now). Raises OSError."""
        path = self._folder / kind / key.replace("/", "@")
        make_private(path.parent, self._root)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if at is not None:
                os.utime(fd, ns=(int(at * 1e9), int(at * 1e9)))
            os.fsync(fd)
        finally:
            os.close(fd)
        disk.sync_folder(path.parent)

    def drop(self, kind: str, key: str) -> bool:
        """Take a note back; tell whether there was one. Raises OSError."""
        try:
            os.unlink(self._folder / kind / key.replace("/", "@"))
        except FileNotFoundError:
            return False
        disk.sync_folder(self._folder / kind)
        return True

    def keys(self, kind: str) -> list[str]:
        """Return what there are notes of this kind about."""
        try:
            return [name.replace("@", "/") for name in os.listdir(self._folder / kind)]
        except FileNotFoundError:
            return []

    def marks(self, identifiers: Collection[str]) -> Marks:
        """Return what is noted of the snapshots `identifiers`."""
        if len(identifiers) < MANY:
            pinned, damaged = (
                {i for i in identifiers if self.at(kind, i) is not None} for kind in ("pins", "damaged")
            )
            noted = identifiers
        else:
            pinned, damaged = set(self.keys("pins")), set(self.keys("damaged"))
            noted = set(self.keys("verified")).intersection(identifiers)
        dates = {identifier: self.at("verified", identifier) for identifier in noted}
        return Marks({i: at for i, at in dates.items() if at is not None}, pinned, damaged)
