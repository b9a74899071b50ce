"""Copy an agent's files while the agent lives, each file consistent in itself.

Every file is opened without following links, and its state compared before and after the copy; if it changed, the copy
is made again with a short back-off. What keeps changing is left out and named, and the snapshot is `partial`. When all
is copied, the tree is listed again, and what changed, came or went in the meantime is taken again. Nothing is written
into the agent's root. Errors of the agent's side become problems of the snapshot; errors of the repository's side
(a full disk) raise OSError.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from backup_worker.snapshots import sqlite
from backup_worker.snapshots.content import ReadError, copy_hashed
from backup_worker.snapshots.disk import Tree, order
from backup_worker.snapshots.manifest import Entry, Kind, Problem
from backup_worker.snapshots.scope import Scope
from em_bridge import clock

TRIES = 10
ROUNDS = 4
HOT_S = 0.02
"""A file younger than this may change again without its time stamps showing it (the kernel's clock tick)."""
SETTLED_S = 0.2
"""A JSON file that stays unreadable and unchanged for so long is broken, not half written."""
OLD_S = 5.0
"""Nobody is in the middle of writing a file that was last written so long ago."""
TRUST_S = 40.0
"""Size, inode and times tell that a file is unchanged only if it was at rest for so long when it was copied: the clock
of a file system may be as coarse as two seconds, and a write through a memory map may show in the times only when the
kernel writes the page back, which it does after 35 seconds."""
_JSON_LIMIT_BYTES = 16 << 20
_SPECIAL = {stat.S_IFSOCK: "socket", stat.S_IFIFO: "pipe", stat.S_IFBLK: "device", stat.S_IFCHR: "device"}

Signature = tuple[int, ...]


class _Changed(Exception):
    """The file changed under the copy: try again."""


class _Unreadable(Exception):
    """The agent's side refuses; the reason is for the snapshot's problems."""


@dataclass
class Previous:
    """The snapshot to share unchanged files with: its files, and its entries by path."""

    files: Tree
    entries: dict[str, Entry]


@dataclass
class Captured:
    """What was copied: entries by path, what could not be copied, and how many special files were passed over."""

    entries: dict[str, Entry] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def signature(info: os.stat_result) -> Signature:
    """Return what changes when a file is written, replaced, or has its mode or owner changed."""
    return (info.st_mode, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


class Capture:
    """One run over one agent's tree. `store` receives the files; `scratch`, on its file system, work in progress."""

    def __init__(
        self,
        source: Tree,
        store: Tree,
        scratch: Path,
        scope: Scope,
        *,
        previous: Previous | None = None,
        sleep: Callable[[float], None] = clock.sleep,
    ) -> None:
        self.source, self.store, self.scratch, self.scope = source, store, scratch, scope
        self.previous = previous
        self.sleep = sleep
        self.done = Captured()
        self._signatures: dict[str, Signature] = {}
        self._given_up: dict[str, Problem] = {}
        self._first_of: dict[tuple[int, int], str] = {}
        self._with_xattrs = True
        self._listed: dict[str, os.stat_result] | None = None

    def run(self) -> Captured:
        """Copy everything in scope and return what is in the store now."""
        for _ in range(ROUNDS):
            # What was listed to plan the space will do for the first round: the last one lists again.
            listing, self._listed = self._listed or self._list(), None
            self.done.skipped = Counter()
            if not self._settle(listing):
                break
        self.done.problems += self._given_up.values()
        return self.done

    def take_again(self, paths: list[str]) -> None:
        """Copy `paths` once more, sharing nothing with the previous snapshot."""
        self.previous = None
        for path in paths:
            self._drop(path)
        for path in paths:
            self._take_file(path)

    def planned_bytes(self) -> int:
        """Return how many bytes of regular files are in scope now: the most that the snapshot can need."""
        self._listed = self._list()
        return sum(info.st_size for info in self._listed.values() if stat.S_ISREG(info.st_mode))

    # -- listing ----------------------------------------------------------------------------------------------------

    def _list(self) -> dict[str, os.stat_result]:
        """List what is in scope; folders on the way to it are in, so that their modes come back."""
        self.done.problems = []
        found = {".": os.fstat(self.source.fd)}
        pending = ["."]
        while pending:
            here = pending.pop()
            for name, info in self._list_folder(here):
                path = name if here == "." else f"{here}/{name}"
                if self.scope.excludes(path):
                    continue
                if stat.S_ISDIR(info.st_mode):
                    if self.scope.may_hold(path):
                        pending.append(path)
                        found[path] = info
                elif self.scope.covers(path):
                    found[path] = info
        self._drop_companions(found)
        self._drop_bare_ways(found)
        return {path: found[path] for path in sorted(found, key=order)}

    def _list_folder(self, folder: str) -> list[tuple[str, os.stat_result]]:
        found = []
        try:
            with os.scandir(self.source.folder(folder)) as listing:
                for entry in listing:
                    # Gone between listing and looking: as if it had never been listed.
                    with contextlib.suppress(FileNotFoundError):
                        found.append((entry.name, entry.stat(follow_symlinks=False)))
        except OSError as error:
            gone = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
            if not gone:
                self.done.problems.append(
                    Problem(folder, f"cannot be listed: {(error.strerror or '').lower()}")
                )
        return found

    def _drop_companions(self, found: dict[str, os.stat_result]) -> None:
        for path in list(found):
            for suffix in sqlite.COMPANIONS:
                base = path.removesuffix(suffix)
                if base != path and base in found and self._has_magic(base, found[base]):
                    del found[path]
                    break

    def _has_magic(self, path: str, info: os.stat_result) -> bool:
        if not stat.S_ISREG(info.st_mode):
            return False
        try:
            fd = self.source.open(path, os.O_RDONLY)
        except OSError:
            return False
        try:
            return sqlite.is_database(os.pread(fd, 20, 0))
        except OSError:
            return False
        finally:
            os.close(fd)

    def _drop_bare_ways(self, found: dict[str, os.stat_result]) -> None:
        """Drop folders that are not covered themselves and turned out to lead to nothing."""
        needed = {"."}
        for path in found:
            if not stat.S_ISDIR(found[path].st_mode) or self.scope.covers(path):
                while path and path not in needed:
                    needed.add(path)
                    path = path.rpartition("/")[0]
        for path in found.keys() - needed:
            del found[path]

    # -- copying ----------------------------------------------------------------------------------------------------

    def _settle(self, listing: dict[str, os.stat_result]) -> bool:
        """Bring the store to what `listing` says; tell whether there was anything to do."""
        gone = [p for p, e in self.done.entries.items() if p not in listing or _kind(listing[p]) != e.kind]
        for path in sorted(gone, key=order, reverse=True):
            self._drop(path)
        busy = bool(gone)
        for path, info in listing.items():
            special = _SPECIAL.get(stat.S_IFMT(info.st_mode))
            if special:
                self.done.skipped[special] += 1
            elif self._signatures.get(path) != signature(info) and path not in self._given_up:
                busy = True
                self._take(path, info)
        return busy

    def _drop(self, path: str) -> None:
        self.store.remove(path)
        self.done.entries.pop(path, None)
        self._signatures.pop(path, None)

    def _take(self, path: str, info: os.stat_result) -> None:
        if stat.S_ISREG(info.st_mode):
            self._take_file(path)
            return
        kind = _kind(info)
        target = None
        if kind == "link":
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
        entry = _entry(path, info, target=target, size=0)
        if kind == "dir":
            with contextlib.suppress(OSError, _Changed):  # gone or changed meanwhile: the next round sees it
                entry = replace(entry, xattrs=self._xattrs(self.source.folder(path)))
        self.done.entries[path] = entry
        self._signatures[path] = signature(info)

    def _xattrs(self, fd: int) -> tuple[tuple[str, str], ...]:
        """Return the attributes that an ordinary user may set; none where the file system has none."""
        if not self._with_xattrs:
            return ()
        try:
            names = sorted(name for name in os.listxattr(fd) if name.startswith("user."))
            return tuple((name, base64.b64encode(os.getxattr(fd, name)).decode("ascii")) for name in names)
        except OSError as error:
            if error.errno == errno.ENODATA:
                raise _Changed from error
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS):
                raise
            self._with_xattrs = False
            return ()

    def _take_file(self, path: str) -> None:
        torn: tuple[Signature, float] | None = None
        for attempt in range(TRIES):
            if attempt:
                self.sleep(min(0.01 * 2 ** (attempt - 1), 0.25))
            try:
                entry, info = self._try_file(path)
            except FileNotFoundError:
                return
            except _Unreadable as error:
                self._give_up(path, str(error))
                return
            except _Changed:
                continue
            now = clock.now()
            if now - info.st_mtime < OLD_S and self._is_torn(entry):
                if torn is None or torn[0] != signature(info):
                    torn = signature(info), now
                if now - torn[1] < SETTLED_S:
                    continue
            self.done.entries[path] = entry
            self._signatures[path] = signature(info)
            return
        self._give_up(path, f"kept changing while it was read ({TRIES} tries)")

    def _give_up(self, path: str, why: str) -> None:
        self._drop(path)
        self._given_up[path] = Problem(path, why)

    def _try_file(self, path: str) -> tuple[Entry, os.stat_result]:
        try:
            fd = self.source.open(path, os.O_RDONLY)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
                raise FileNotFoundError(path) from error
            raise _Unreadable(f"cannot be opened: {(error.strerror or '').lower()}") from error
        try:
            before = os.fstat(fd)
            if not stat.S_ISREG(before.st_mode):
                raise FileNotFoundError(path)
            entry = self._same_file(path, before) or self._copy(path, fd, before)
            return self._dressed(entry, fd, before), before
        finally:
            os.close(fd)

    def _dressed(self, entry: Entry, fd: int, before: os.stat_result) -> Entry:
        """Add what is not content: attributes, and by what an unchanged file is known the next time."""
        try:
            xattrs = self._xattrs(fd)
        except OSError as error:
            raise _Unreadable(f"its attributes cannot be read: {(error.strerror or '').lower()}") from error
        if not entry.sqlite and clock.now() - max(before.st_mtime, before.st_ctime) >= TRUST_S:
            return replace(entry, xattrs=xattrs, inode=before.st_ino, ctime_ns=before.st_ctime_ns)
        return replace(entry, xattrs=xattrs, inode=0, ctime_ns=0) if xattrs or entry.inode else entry

    def _same_file(self, path: str, info: os.stat_result) -> Entry | None:
        """Share with an earlier path of this snapshot that is the same file: a hard link."""
        if info.st_nlink < 2:
            return None
        key = (info.st_dev, info.st_ino)
        first = self._first_of.setdefault(key, path)
        known = self.done.entries.get(first)
        if first == path or known is None or known.sqlite or self._signatures.get(first) != signature(info):
            self._first_of[key] = path
            return None
        self.store.remove(path)
        folder, name = self.store.at(first)
        # The tree keeps one descriptor at a time, and two folders are needed.
        held = os.dup(folder)
        try:
            to_folder, to_name = self.store.at(path)
            os.link(name, to_name, src_dir_fd=held, dst_dir_fd=to_folder, follow_symlinks=False)
        except OSError as error:
            if error.errno in (errno.EMLINK, errno.EPERM):
                return None
            raise
        finally:
            os.close(held)
        return replace(known, path=path, hardlink=first)

    def _copy(self, path: str, fd: int, before: os.stat_result) -> Entry:
        old = self.previous.entries.get(path) if self.previous else None
        if old is not None and _is_unchanged(old, before):
            entry = _entry(path, before, sha256=old.sha256, size=old.size, linked=True)
            if self._link(entry):
                return entry
        if sqlite.is_database(_beginning(fd)):
            try:
                return self._copy_database(path, fd, before)
            except sqlite.NotADatabase:
                pass  # keep its bytes; the sanity check says what is wrong with it
        if old and old.kind == "file" and (old.size, old.mtime_ns) == (before.st_size, before.st_mtime_ns):
            entry = self._hash(path, fd, before, None)
            if self._link(entry):
                return replace(entry, linked=True)
            os.lseek(fd, 0, os.SEEK_SET)
        out = self._create(path)
        try:
            entry = self._hash(path, fd, before, out)
        finally:
            os.close(out)
        return replace(entry, linked=True) if self._link(entry) else entry

    def _create(self, path: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            return self.store.open(path, flags)
        except FileExistsError:
            self.store.remove(path)
            return self.store.open(path, flags)

    def _hash(self, path: str, fd: int, before: os.stat_result, out: int | None) -> Entry:
        try:
            size, digest = copy_hashed(fd, out, before.st_size)
            if clock.now() - before.st_mtime < HOT_S:
                self.sleep(HOT_S)
                os.lseek(fd, 0, os.SEEK_SET)
                if copy_hashed(fd, None, size)[1] != digest:
                    raise _Changed
        except ReadError as error:
            raise _Unreadable(f"cannot be read: {(error.strerror or '').lower()}") from error
        if signature(os.fstat(fd)) != signature(before) or size != before.st_size:
            raise _Changed
        return _entry(path, before, sha256=digest, size=size)

    def _copy_database(self, path: str, fd: int, before: os.stat_result) -> Entry:
        try:
            copy = sqlite.copy_database(self.source, path, fd, self.scratch)
        except sqlite.Unstable as error:
            raise _Changed from error
        copy.chmod(0o600)
        self.store.remove(path)
        folder, name = self.store.at(path)
        os.rename(copy, name, dst_dir_fd=folder)
        stored = self.store.open(path, os.O_RDONLY)
        try:
            size, digest = copy_hashed(stored, None)
        finally:
            os.close(stored)
        entry = _entry(path, before, sha256=digest, size=size, sqlite=True)
        return replace(entry, linked=True) if self._link(entry) else entry

    def _link(self, entry: Entry) -> bool:
        """Put the previous snapshot's file in place of a copy of the same content; tell whether that was possible."""
        if self.previous is None or not entry.same_content(self.previous.entries.get(entry.path)):
            return False
        spare = f"{self.scratch.name}-link"
        try:
            old_folder, name = self.previous.files.at(entry.path)
            folder, _ = self.store.at(entry.path)
            with contextlib.suppress(FileExistsError):
                os.link(name, name, src_dir_fd=old_folder, dst_dir_fd=folder, follow_symlinks=False)
                return True
            # Linked under a spare name first: if the previous snapshot's file is gone, the copy is still there.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(spare, dir_fd=self.store.fd)
            os.link(name, spare, src_dir_fd=old_folder, dst_dir_fd=self.store.fd, follow_symlinks=False)
        except OSError as error:
            if error.errno in (
                errno.EMLINK,
                errno.ENOENT,
                errno.ENOTDIR,
                errno.EPERM,
                errno.EXDEV,
                errno.ELOOP,
            ):
                return False
            raise
        os.rename(spare, name, src_dir_fd=self.store.fd, dst_dir_fd=folder)
        return True

    def _is_torn(self, entry: Entry) -> bool:
        if not entry.path.endswith(".json") or entry.size > _JSON_LIMIT_BYTES:
            return False
        try:
            json.loads(self.store.read_bytes(entry.path))
        except (ValueError, RecursionError):
            return True
        return False


def _beginning(fd: int) -> bytes:
    try:
        return os.pread(fd, 20, 0)
    except OSError as error:
        raise _Unreadable(f"cannot be read: {(error.strerror or '').lower()}") from error


def _kind(info: os.stat_result) -> Kind | None:
    if stat.S_ISREG(info.st_mode):
        return "file"
    if stat.S_ISDIR(info.st_mode):
        return "dir"
    return "link" if stat.S_ISLNK(info.st_mode) else None


def _entry(
    path: str,
    info: os.stat_result,
    *,
    size: int,
    sha256: str | None = None,
    target: str | None = None,
    sqlite: bool = False,
    linked: bool = False,
) -> Entry:
    kind = _kind(info)
    assert kind is not None, "special files never get here"
    return Entry(
        path,
        kind,
        size,
        stat.S_IMODE(info.st_mode),
        info.st_mtime_ns,
        uid=info.st_uid,
        gid=info.st_gid,
        sha256=sha256,
        target=target,
        sqlite=sqlite,
        linked=linked,
    )


def _is_unchanged(old: Entry, info: os.stat_result) -> bool:
    """Tell by inode, size and times, where they can be trusted, that the file is what it was."""
    return old.ctime_ns != 0 and (old.kind, old.inode, old.size, old.mtime_ns, old.ctime_ns) == (
        "file", info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns,
    )  # fmt: skip
