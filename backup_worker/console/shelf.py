"""The list of snapshots, kept in memory: no page waits for 20,000 of them to be read.

Only the very first reader waits, which is the console itself when it starts. From then on a look costs a stat of each
slot's folder, once a second at most: of a slot that something came to or went from, the heads are read again. Pins,
damage and dates of verification are notes beside the snapshots: they are read again when one was made or taken back,
and every `NOTES_S` for what folders do not tell (a new date). What somebody changes in this console is seen at once.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING

from em_bridge import clock
from em_bridge.errors import NotFound

if TYPE_CHECKING:
    from pathlib import Path

    from backup_worker.snapshots import Head, Repository

FRESH_S = 1.0
NOTES_S = 30.0
FEW = 2000
"""With no more than so many snapshots, every page looks."""

SETTLED_S = 2.0
"""A folder younger than this is read again at the next look: what comes within one tick of the file system's clock
would not show in its time."""

NOTES = ("pins", "damaged")
_UNSETTLED = -1
_NEW: tuple[int, list[Head]] = (_UNSETTLED, [])


class Shelf:
    """The snapshots of one repository, oldest first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._root: Path | None = None
        self._heads: list[Head] = []
        self._slots: dict[str, tuple[int, list[Head]]] = {}
        self._notes: list[tuple[str, int]] = []
        self._looked_at = self._noted_at = 0.0

    def heads(self, repository: Repository) -> list[Head]:
        """Return the snapshots as they were a moment ago."""
        with self._lock:
            now = clock.monotonic()
            if self._root != repository.root:
                self._read(repository)
            elif len(self._heads) <= FEW or now - self._looked_at >= FRESH_S:
                self._look(repository)
            else:
                return self._heads
            self._looked_at = now
            return self._heads

    def _read(self, repository: Repository) -> None:
        # The times first: what comes while we read makes the next look read again.
        times, self._notes = _times(repository), _note_times(repository)
        self._root, self._noted_at = repository.root, clock.monotonic()
        self._heads = repository.snapshots()
        self._slots = {name: (_settled(time_ns), []) for name, time_ns in times.items()}
        for head in self._heads:
            # A slot that came meanwhile is read at the next look.
            if (name := _slot_of(head.id)) in self._slots:
                self._slots[name][1].append(head)

    def _look(self, repository: Repository) -> None:
        times, notes, now = _times(repository), _note_times(repository), clock.monotonic()
        if notes != self._notes or now - self._noted_at >= NOTES_S:
            self._notes, self._noted_at = notes, now
            self._put({name: (at, repository.noted(heads)) for name, (at, heads) in self._slots.items()})
        changed = [name for name, time_ns in times.items() if self._slots.get(name, _NEW)[0] != time_ns]
        if changed or times.keys() != self._slots.keys():
            kept = {name: slot for name, slot in self._slots.items() if name in times}
            self._put(
                kept | {name: (_settled(times[name]), _read_slot(repository, name)) for name in changed}
            )

    def _put(self, slots: dict[str, tuple[int, list[Head]]]) -> None:
        self._slots = slots
        found = [head for _, heads in slots.values() for head in heads]
        self._heads = sorted(found, key=lambda head: head.sort_key)

    def renew(self, repository: Repository, identifier: str) -> None:
        """Read the slot of one snapshot again, which was changed from here."""
        with self._lock:
            if (known := self._slots.get(name := _slot_of(identifier))) is not None:
                self._put({**self._slots, name: (known[0], _read_slot(repository, name))})


def _slot_of(identifier: str) -> str:
    return identifier.rpartition("/")[0]


def _read_slot(repository: Repository, name: str) -> list[Head]:
    heads = []
    for folder in _folders(repository.root / name):
        # What is no snapshot, or not whole, is left out here as in every list.
        with contextlib.suppress(NotFound):
            heads.append(repository.get_head(f"{name}/{folder.name}"))
    return heads


def stamp(repository: Repository) -> int:
    """Return a number that changes when a snapshot comes or goes, is pinned or damaged, or a backup fails."""
    kinds = (*NOTES, "failed")
    return hash((*_times(repository).items(), *_note_times(repository, kinds)))


def _times(repository: Repository) -> dict[str, int]:
    """Return `<tier>/<slot>` -> when something came to it or went, in nanoseconds."""
    return {
        f"{tier.name}/{slot.name}": _mtime_ns(slot.path)
        for tier in _folders(repository.root)
        if not tier.name.startswith(".")
        for slot in _folders(tier.path)
    }


def _settled(time_ns: int) -> int:
    """Return the time if a later change would show in it, else one that no folder has."""
    return time_ns if time_ns < (clock.now() - SETTLED_S) * 1e9 else _UNSETTLED


def _note_times(repository: Repository, kinds: tuple[str, ...] = NOTES) -> list[tuple[str, int]]:
    return [(kind, _mtime_ns(repository.hidden / kind)) for kind in kinds]


def _mtime_ns(path: Path | str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _folders(path: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as found:
            return sorted(
                (one for one in found if one.is_dir(follow_symlinks=False)), key=lambda one: one.name
            )
    except OSError:
        return []
