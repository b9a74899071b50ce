"""Copy an agent's files while the agent lives, each file consistent in itself.

Every file is opened without following links, and its state compared before and after the copy; if it changed, the copy
is made again with a short back-off. What keeps changing is left out and named, and the snapshot is `partial`. When all
is copied, the tree is listed again, and what changed, came or went in the meantime is taken again. Nothing is written
into the agent's root. Errors of the agent's side become problems of the snapshot; errors of the repository's side
(a full disk) raise OSError.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backup_worker.snapshots import parts
from backup_worker.snapshots.capture_file import (
    Changed,
    FileCapture,
    Previous,
    Sleep,
    Unreadable,
    entry_of,
    is_small,
    kind_of,
)
from backup_worker.snapshots.content import opened_ahead
from backup_worker.snapshots.disk import Tree, order
from backup_worker.snapshots.listing import State, list_scope
from backup_worker.snapshots.manifest import Entry, Problem
from backup_worker.snapshots.parts import in_parts
from backup_worker.snapshots.scope import Scope
from em_bridge import clock

TRIES = 10
ROUNDS = 4
SETTLED_S = 0.2
"""A JSON file that stays unreadable and unchanged for so long is broken, not half written."""
OLD_S = 5.0
"""Nobody is in the middle of writing a file that was last written so long ago."""
_JSON_LIMIT_BYTES = 16 << 20
_SPECIAL = {stat.S_IFSOCK: "socket", stat.S_IFIFO: "pipe", stat.S_IFBLK: "device", stat.S_IFCHR: "device"}

Found = dict[str, State]


@dataclass
class Captured:
    """What was copied: entries by path, what could not be copied, and how many special files were passed over."""

    entries: dict[str, Entry] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def bytes(self) -> int:
        """How many bytes of regular files were copied or shared."""
        return sum(entry.size for entry in self.entries.values())


class Capture:
    """One run over one agent's tree. `store` receives the files; `scratch`, made if needed, work in progress."""

    def __init__(
        self,
        source: Tree,
        store: Tree,
        scratch: Path,
        scope: Scope,
        *,
        previous: Previous | None = None,
        sleep: Sleep = clock.sleep,
    ) -> None:
        self.source, self.store, self.scope, self.sleep = source, store, scope, sleep
        self.files = FileCapture(source, store, scratch, previous, sleep)
        self.done = Captured()
        self._states: dict[str, State] = {}
        self._given_up: dict[str, Problem] = {}
        self._first_of: dict[tuple[int, int], str] = {}
        self._listed: Found | None = None

    def run(self) -> Captured:
        """Copy everything in scope and return what is in the store now."""
        for _ in range(ROUNDS):
            # What was listed to plan the space will do for the first round: the last one lists again.
            found, self._listed = self._listed or self._list(), None
            self.done.skipped = Counter()
            if not self._settle(found):
                break
        self.done.problems += self._given_up.values()
        return self.done

    def take_again(self, paths: list[str]) -> None:
        """Copy `paths` once more, sharing nothing with the previous snapshot."""
        self.files.previous = None
        for path in paths:
            self._drop(path)
        for path in paths:
            self._take_file(path)

    def planned_bytes(self) -> int:
        """Return how many bytes of regular files are in scope now, whatever the number of their names.

        It is the most that the snapshot can need.
        """
        self._listed = self._list()
        files = [info for info in self._listed.values() if stat.S_ISREG(info.st_mode)]
        shared = {(info.st_dev, info.st_ino): info.st_size for info in files if info.st_nlink > 1}
        return sum(info.st_size for info in files if info.st_nlink == 1) + sum(shared.values())

    def _list(self) -> Found:
        listing = list_scope(self.source, self.scope)
        self.done.problems = listing.problems
        return listing.found

    def _settle(self, found: Found) -> bool:
        """Bring the store to what was `found`; tell whether there was anything to do."""
        gone = [p for p, e in self.done.entries.items() if p not in found or kind_of(found[p]) != e.kind]
        for path in sorted(gone, key=order, reverse=True):
            self._drop(path)
        known, given_up, todo = self._states, self._given_up, []
        for path, info in found.items():
            special = _SPECIAL.get(stat.S_IFMT(info.st_mode))
            if special:
                self.done.skipped[special] += 1
            elif known.get(path) != info and path not in given_up:
                todo.append(path)
        # A folder comes right before what it holds.
        todo.sort(key=order)
        self._take_all(todo, found)
        return bool(gone or todo)

    def _take_all(self, paths: Sequence[str], found: Found) -> None:
        """Take folders and links, then the files; those with several names last, when the first of each is there."""
        files: list[str] = []
        twins: list[str] = []
        for path in paths:
            info = found[path]
            if not stat.S_ISREG(info.st_mode):
                self._take_other(path, info)
            else:
                (files if info.st_nlink < 2 else twins).append(path)
        left = [path for path in files if not self._share(path, found[path])]
        sizes = [found[path].st_size for path in left]
        if parts.are_worth_it(sizes):
            self._take_in_parts(left, sizes, found)
        else:
            self._take_files(left, found)
        self._take_files(twins, found)

    def _share(self, path: str, listed: State) -> bool:
        """Share what is known to be unchanged. By this process alone: others would need all entries in their memory."""
        entry = self.files.share(path, listed)
        if entry is not None:
            self._took(path, entry, listed)
        return entry is not None

    def _take_files(self, paths: Sequence[str], found: Found) -> None:
        """Read the many small ones that the disk answers together, then all others."""
        small: list[str] = []
        rest: list[str] = []
        now = clock.now()
        for path in paths:
            listed = found[path]
            is_young_json = now - listed.st_mtime < OLD_S and path.endswith(".json")
            (small if is_small(listed, now) and not is_young_json else rest).append(path)
        for path, fd in opened_ahead(self.source, small, str, from_disk=False):
            listed = found[path]
            taken = self.files.copy_small(path, fd, listed, now) if isinstance(fd, int) else None
            if taken is not None:
                self._took(path, taken, listed)
            else:
                rest.append(path)
        for path in rest:
            self._take_file(path)

    def _took(self, path: str, entry: Entry, state: State) -> None:
        self.done.entries[path] = entry
        self._states[path] = state

    def _take_in_parts(self, paths: Sequence[str], sizes: Sequence[int], found: Found) -> None:
        def take(part: Sequence[str]) -> Any:
            self._take_files(part, found)
            given_up = [(path, self._given_up[path].problem) for path in part if path in self._given_up]
            taken = []
            for path in part:
                # Not kept in here: this process may take many parts.
                entry, state = self.done.entries.pop(path, None), self._states.pop(path, None)
                if entry is not None:
                    taken.append((entry, None if state == found[path] else state))
            return taken, given_up

        for _, (taken, given_up) in in_parts(paths, sizes, take):
            for row, state in taken:
                entry = _from_row(row)
                self._took(entry.path, entry, State(*state) if state else found[entry.path])
            self._given_up |= {path: Problem(path, why) for path, why in given_up}

    def _drop(self, path: str) -> None:
        self.store.remove(path)
        self.done.entries.pop(path, None)
        self._states.pop(path, None)

    def _take_other(self, path: str, info: State) -> None:
        """Take a folder or a link."""
        target = None
        if stat.S_ISLNK(info.st_mode):
            try:
                folder, name = self.source.at(path)
                target = os.readlink(name, dir_fd=folder)
            except OSError:
                return  # replaced meanwhile: the next round lists it as what it is now
            self.store.remove(path)
            folder, name = self.store.at(path)
            os.symlink(target, name, dir_fd=folder)
        elif path != "." and path not in self.done.entries:
            self.store.make_folders(path)
        entry = entry_of(path, info, target=target, size=0)
        if target is None:
            with contextlib.suppress(OSError, Changed):  # gone or changed meanwhile: the next round sees it
                if xattrs := self.files.xattrs(self.source.folder(path)):
                    entry = entry._replace(xattrs=xattrs)
        self._took(path, entry, info)

    def _take_file(self, path: str) -> None:
        """Take a file in as many tries as it needs."""
        torn: tuple[State, float] | None = None
        for attempt in range(TRIES):
            if attempt:
                self.sleep(min(0.01 * 2 ** (attempt - 1), 0.25))
            try:
                entry, info = self.files.copy(path, lambda info: self._twin(path, info))
            except FileNotFoundError:
                return
            except Unreadable as error:
                self._give_up(path, str(error))
                return
            except Changed:
                continue
            now = clock.now()
            if now - info.st_mtime < OLD_S and self._is_torn(entry):
                if torn is None or torn[0] != info:
                    torn = info, now
                if now - torn[1] < SETTLED_S:
                    continue
            self._took(path, entry, info)
            return
        self._give_up(path, f"kept changing while it was read ({TRIES} tries)")

    def _give_up(self, path: str, why: str) -> None:
        self._drop(path)
        self._given_up[path] = Problem(path, why)

    def _twin(self, path: str, info: State) -> Entry | None:
        """Return the entry of an earlier path that is the same file: a hard link."""
        if info.st_nlink < 2:
            return None
        key = (info.st_dev, info.st_ino)
        first = self._first_of.setdefault(key, path)
        known = self.done.entries.get(first)
        if first == path or known is None or known.sqlite or self._states.get(first) != info:
            self._first_of[key] = path
            return None
        return known

    def _is_torn(self, entry: Entry) -> bool:
        if not entry.path.endswith(".json") or entry.size > _JSON_LIMIT_BYTES:
            return False
        try:
            json.loads(self.store.read_bytes(entry.path))
        except (ValueError, RecursionError):
            return True
        return False


def _from_row(row: Sequence[Any]) -> Entry:
    """Return the entry that another process sent as JSON, which knows no tuples."""
    entry = Entry._make(row)
    return entry._replace(xattrs=tuple((name, value) for name, value in entry.xattrs))
