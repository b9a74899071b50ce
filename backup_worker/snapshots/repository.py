"""The repository on disk: `<tier>/<slot>/<agent>/`, and our own bookkeeping in the hidden folder `.agent-backup`.

A snapshot appears by one rename and disappears by one rename. What a killed process left in staging or trash is swept
when the next one starts; whether a process still works there is asked of the kernel (`flock`), so that no stale lock
can exist. Everything is readable by its owner alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from backup_worker.snapshots import disk, index
from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.errors import SnapshotError, from_os_error, printable, translated
from backup_worker.snapshots.layout import folders, is_folder, make_private
from backup_worker.snapshots.manifest import (
    FILES,
    MANIFEST,
    Head,
    Manifest,
    decode,
    read_head,
    snapshot_id,
    split_id,
)
from backup_worker.snapshots.notes import Notes
from em_bridge import clock
from em_bridge.errors import NotFound

HIDDEN = ".agent-backup"
INDEX = "heads"
AnyHead = TypeVar("AnyHead", bound=Head)


class Repository:
    """Snapshots below one folder. Nothing is created before something is written."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.hidden = self.root / HIDDEN
        self._notes = Notes(self.hidden, self.root)
        self._swept = False

    # -- reading ----------------------------------------------------------------------------------------------------

    def ids(self, agent: str | None = None, tier: str | None = None) -> list[str]:
        """Return the ids of all snapshots on disk, whole or broken."""
        found = []
        for tier_name in folders(self.root):
            if tier not in (None, tier_name):
                continue
            for slot in folders(self.root / tier_name):
                folder = self.root / tier_name / slot
                # Asked for by name: a slot holds as many folders as there are agents.
                for name in folders(folder) if agent is None else [agent]:
                    with contextlib.suppress(NotFound):
                        identifier = snapshot_id(tier_name, slot, name)
                        if agent is None or is_folder(folder / name):
                            found.append(identifier)
        return found

    def snapshots(self, agent: str | None = None, tier: str | None = None) -> list[Head]:
        """Return the readable snapshots, oldest first. What is unreadable, `verify` names."""
        return self.survey(agent, tier)[0]

    def unreadable(self) -> list[str]:
        """Return the ids of folders that stand where a snapshot should be, and cannot be read as one."""
        return self.survey()[1]

    def survey(self, agent: str | None = None, tier: str | None = None) -> tuple[list[Head], list[str]]:
        """Return the readable snapshots, oldest first, and the ids of what cannot be read as one."""
        # The few of one agent are read faster than the memory of all.
        known = index.load(self.hidden / INDEX) if agent is None else {}
        found: dict[str, index.Remembered] = {}
        unreadable: list[str] = []
        settled, unknown, now = [], 0, clock.now()
        for identifier in self.ids(agent, tier):
            try:
                info, one = index.recall(self.root, identifier, known.get(identifier))
            except (SnapshotError, OSError):
                unreadable.append(identifier)
                continue
            found[identifier] = one
            if index.is_settled(info, now):
                settled.append(one)
                unknown += one is not known.get(identifier)
        if agent is None and tier is None and index.is_worth_writing(len(known), len(settled), unknown):
            index.save(self.hidden / INDEX, settled, self.staging())
        marks = self._notes.marks(found)
        heads = [one.head(**marks.of(i, one.values["created_at"])) for i, one in found.items()]
        return sorted(heads, key=lambda head: head.sort_key), unreadable

    def get(self, identifier: str) -> Manifest:
        """Return one snapshot with its entries. Raises NotFound, or SnapshotError if its manifest is broken."""
        path = self.path(identifier)
        try:
            content = (path / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            if path.is_dir():
                raise SnapshotError(f"snapshot “{identifier}” has no manifest") from error
            raise NotFound(f"there is no snapshot “{identifier}”", hint="see `backup-worker list`") from error
        except OSError as error:
            raise from_os_error(f"reading snapshot “{identifier}”", error) from error
        try:
            manifest = decode(content)
        except SnapshotError as error:
            raise SnapshotError(
                f"snapshot “{identifier}”: {error.message}", hint="restore from another one"
            ) from error
        if manifest.id != identifier:
            raise SnapshotError(
                f"snapshot “{identifier}” says of itself that it is “{printable(manifest.id)}”"
            )
        return self.noted([manifest])[0]

    def get_head(self, identifier: str) -> Head:
        """Return one snapshot without its entries. Raises NotFound if it is gone or unreadable."""
        split_id(identifier)
        try:
            with open(self.path(identifier) / MANIFEST, "rb") as file:
                return self.noted([read_head(file)])[0]
        except (SnapshotError, OSError) as error:
            raise NotFound(f"there is no snapshot “{identifier}”", hint="see `backup-worker list`") from error

    def path(self, identifier: str) -> Path:
        """Return the folder of a snapshot, there or not. Raises NotFound for what is not an id."""
        return self.root.joinpath(*split_id(identifier))

    def files(self, identifier: str) -> Tree:
        """Open a snapshot's files. Raises NotFound if it is gone."""
        try:
            return Tree(self.path(identifier) / FILES)
        except FileNotFoundError as error:
            raise NotFound(f"there is no snapshot “{identifier}”", hint="see `backup-worker list`") from error

    # -- notes: pins, dates of verification, damage, failures ---------------------------------------------------------

    @translated("pinning")
    def pin(self, identifier: str) -> None:
        """Hold a snapshot: retention never deletes it. Raises NotFound."""
        self.get(identifier)
        self._notes.put("pins", identifier)

    @translated("unpinning")
    def unpin(self, identifier: str) -> bool:
        """Let go of a snapshot; tell whether it was held. Raises NotFound."""
        self.get(identifier)
        return self._notes.drop("pins", identifier)

    def record_verified(self, identifier: str, *, now: float, ok: bool) -> None:
        """Write down when a snapshot was last proven, or that it is damaged."""
        if ok:
            self._notes.put("verified", identifier, now)
            self._notes.drop("damaged", identifier)
        else:
            self._notes.put("damaged", identifier, now)

    def damaged_at(self, identifier: str) -> float | None:
        """Return when damage was last found in a snapshot that was not proven since, or None."""
        return self._notes.at("damaged", identifier)

    def record_failure(self, tier: str, agent: str, *, now: float) -> None:
        """Write down that a backup failed: retention deletes nothing of that agent and tier until one succeeds."""
        self._notes.put("failed", f"{tier}/{agent}", now)

    def record_success(self, tier: str, agent: str) -> None:
        """Take back `record_failure`."""
        self._notes.drop("failed", f"{tier}/{agent}")

    def drop_orphaned_notes(self) -> None:
        """Take back the dates of snapshots that are gone: the next one of that name must not inherit them."""
        for kind in ("verified", "damaged"):
            for key in self._notes.keys(kind):
                with contextlib.suppress(NotFound):
                    if not is_folder(self.path(key)):
                        self._notes.drop(kind, key)

    def failing(self) -> frozenset[tuple[str, str]]:
        """Return the (agent, tier) pairs whose last backup failed."""
        pairs = (key.split("/") for key in self._notes.keys("failed"))
        return frozenset((pair[1], pair[0]) for pair in pairs if len(pair) == 2)

    def noted(self, heads: Sequence[AnyHead]) -> list[AnyHead]:
        """Return `heads` with what is noted of them now: date of verification, pin, damage. One that agrees stays."""
        marks = self._notes.marks([head.id for head in heads])
        found = ((head, marks.of(head.id, head.created_at)) for head in heads)
        return [
            head
            if all(getattr(head, name) == value for name, value in noted.items())
            else replace(head, **noted)
            for head, noted in found
        ]

    # -- locks --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self, name: str, *, shared: bool = False) -> Iterator[None]:
        """Hold a named lock of this repository, waiting for it; it ends with this process at the latest."""
        folder = self.hidden / "locks"
        self._make_private(folder)
        fd = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with disk.locked(fd, shared=shared):
                yield
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def hold(self, identifiers: Iterable[str]) -> Iterator[None]:
        """Keep snapshots from being deleted while they are read. Raises NotFound if one is gone already."""
        with contextlib.ExitStack() as stack:
            for identifier in sorted(set(identifiers)):
                tree = self._open_folder(identifier)
                stack.callback(os.close, tree)
                stack.enter_context(disk.locked(tree, shared=True))
                if os.fstat(tree).st_nlink == 0 or not self.path(identifier).is_dir():
                    raise NotFound(
                        f"there is no snapshot “{identifier}” (any more)", hint="see `backup-worker list`"
                    )
            yield

    def _open_folder(self, identifier: str) -> int:
        try:
            return os.open(self.path(identifier), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFound(f"there is no snapshot “{identifier}”", hint="see `backup-worker list`") from error

    def in_use(self, identifiers: Iterable[str]) -> frozenset[str]:
        """Return those of `identifiers` that somebody is reading now."""
        busy = set()
        for identifier in identifiers:
            with contextlib.suppress(NotFound):
                fd = self._open_folder(identifier)
                try:
                    with disk.locked(fd, wait=False) as free:
                        if not free:
                            busy.add(identifier)
                finally:
                    os.close(fd)
        return frozenset(busy)

    # -- writing ------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the repository's folders and sweep what dead processes left. Raises SnapshotError if not writable.

        Swept once by each `Repository`: what dies later is for the next one, or for maintenance.
        """
        try:
            for name in ("staging", "trash", "locks"):
                self._make_private(self.hidden / name)
            if not self._swept:
                self.sweep()
                self._swept = True
        except OSError as error:
            raise from_os_error(f"writing to the repository “{self.root}”", error) from error

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """Yield a fresh private folder on the repository's file system; what is still there at the end is removed."""
        while True:
            path = self.hidden / "staging" / uuid.uuid4().hex
            os.mkdir(path, 0o700)
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # swept between the two calls
            try:
                with disk.locked(fd):
                    if os.fstat(fd).st_nlink == 0:
                        continue  # swept before we had the lock
                    try:
                        yield path
                    finally:
                        _remove(path)
                    return
            finally:
                os.close(fd)

    def commit(self, staged: Path, identifier: str, *, sync: bool = True) -> None:
        """Give a whole and synced snapshot its name by one rename. Raises FileExistsError if the name is taken.

        Without `sync` the caller brings the new name to the disk.
        """
        target = self.path(identifier)
        for _ in range(10):
            self._make_private(target.parent.parent)
            self._make_private(target.parent)
            try:
                os.rename(staged, target)
            except FileNotFoundError:
                continue  # a prune removed the empty slot meanwhile
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise FileExistsError(error.errno, error.strerror, str(target)) from error
                raise
            for folder in (target.parent, target.parent.parent, self.root) if sync else ():
                disk.sync_folder(folder)
            return
        raise SnapshotError(f"the slot “{target.parent}” keeps disappearing")

    def delete(self, identifier: str) -> bool:
        """Delete one snapshot; False if somebody is reading it, or it is pinned or gone.

        It leaves its name by one rename into the trash, then its manifest goes first: killed anywhere, no half
        snapshot is listed. With a full disk, where a rename may fail, it is emptied in place in the same order.
        """
        target = self.path(identifier)
        with contextlib.suppress(NotFound):
            fd = self._open_folder(identifier)
            try:
                with disk.locked(fd, wait=False) as free:
                    if not free or self._notes.at("pins", identifier) is not None:
                        return False
                    self._make_private(self.hidden / "trash")
                    doomed = self.hidden / "trash" / uuid.uuid4().hex
                    try:
                        os.rename(target, doomed)
                    except OSError as error:
                        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                            raise
                        doomed = target
                    disk.sync_folder(target.parent)
                    _remove(doomed)
            finally:
                os.close(fd)
            for folder in (target.parent, target.parent.parent):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
            for kind in ("verified", "damaged", "pins"):
                self._notes.drop(kind, identifier)
            return True
        return False

    def discard_remains(self, identifier: str) -> None:
        """Remove a folder that holds no manifest, which a deletion on a full disk may have left under a name."""
        target = self.path(identifier)
        if target.is_dir() and not (target / MANIFEST).exists():
            _remove(target)

    def sweep(self) -> int:
        """Remove what dead processes left in staging and trash; return how many folders that were."""
        swept = 0
        for folder in (self.hidden / "staging", self.hidden / "trash"):
            for name in folders(folder, hidden=True):
                with contextlib.suppress(FileNotFoundError):
                    fd = os.open(folder / name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
                    try:
                        with disk.locked(fd, wait=False) as free:
                            if free:
                                _remove(folder / name)
                                swept += 1
                    finally:
                        os.close(fd)
        return swept

    def free_bytes(self) -> int:
        """Return how many bytes may still be written."""
        return shutil.disk_usage(self.root).free

    def _make_private(self, path: Path) -> None:
        make_private(path, self.root)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path / MANIFEST)
    with contextlib.suppress(FileNotFoundError), Tree(path.parent) as tree:
        tree.remove(path.name)
