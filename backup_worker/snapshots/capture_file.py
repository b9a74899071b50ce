"""Copy one regular file of a living agent, so that the copy is what the file was at one moment.

A file is opened without following links, read and hashed in one pass, and its state compared before and after; one that
changes meanwhile raises `Changed`, and the caller tries again. What the previous snapshot holds already becomes a hard
link to that. The content of databases goes through SQLite. Errors of the agent's side raise `Unreadable` or
FileNotFoundError; errors of the repository's side (a full disk) any other OSError.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from backup_worker.snapshots import large, sqlite
from backup_worker.snapshots.content import ReadError, copy_hashed, write_whole
from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.listing import State, state_of
from backup_worker.snapshots.manifest import Entry, Kind
from em_bridge import clock

HOT_S = 0.02
"""A file younger than this may change again without its time stamps showing it (the kernel's clock tick)."""
TRUST_S = 40.0
"""Size, inode and times tell that a file is unchanged only if it was at rest for so long when it was copied: the clock
of a file system may be as coarse as two seconds, and a write through a memory map may show in the times only when the
kernel writes the page back, which it does after 35 seconds."""
SMALL_BYTES = 1 << 20
"""A file up to this size is read with one call."""
_NO_LINK = (errno.EMLINK, errno.ENOENT, errno.ENOTDIR, errno.EPERM, errno.EXDEV, errno.ELOOP)
_CREATING = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

Sleep = Callable[[float], None]


class Changed(Exception):
    """The file changed under the copy: try again."""


class Unreadable(Exception):
    """The agent's side refuses; the reason is for the snapshot's problems."""


@dataclass
class Previous:
    """The snapshot to share unchanged files with: its files, and its entries by path."""

    files: Tree
    entries: Mapping[str, Entry]


class FileCapture:
    """Copies files from `source` to `store`; `scratch` is how a folder beside it begins, made for work in progress."""

    def __init__(
        self, source: Tree, store: Tree, scratch: Path, previous: Previous | None, sleep: Sleep
    ) -> None:
        self.source, self.store, self.scratch = source, store, scratch
        self.previous, self.sleep = previous, sleep
        self._with_xattrs = True

    # -- the short way ----------------------------------------------------------------------------------------------

    def share(self, path: str, listed: State) -> Entry | None:
        """Share a file that its inode and times prove to be the previous snapshot's, attributes and all; unread."""
        old = self.previous.entries.get(path) if self.previous else None
        if old is None or listed.st_nlink != 1 or old.hardlink is not None or not _is_unchanged(old, listed):
            return None
        folder, _, name = path.rpartition("/")
        if not self._link_new(folder, name):
            return None
        return old if old.linked else old._replace(linked=True)

    def copy_small(self, path: str, fd: int, listed: State, now: float) -> Entry | None:
        """Copy a file at rest that `is_small`, open as `fd`, with the fewest calls; None: it needs `copy`.

        `listed` is its state before, of a time not later than `now`, which is not later than the reading.
        """
        read = self._read_small(fd, listed)
        if read is None:
            return None
        content, xattrs = read
        folder, _, name = path.rpartition("/")
        old = self.previous.entries.get(path) if self.previous else None
        trusted = now - max(listed.st_mtime, listed.st_ctime) >= TRUST_S
        inode, ctime_ns = (listed.st_ino, listed.st_ctime_ns) if trusted else (0, 0)
        digest = hashlib.sha256(content).hexdigest()
        linked = (
            old is not None
            and (old.sha256, old.size, old.kind) == (digest, listed.st_size, "file")
            and self._link_new(folder, name)
        )
        if not linked:
            out = self._create(path, folder, name)
            try:
                write_whole(out, content)
            finally:
                os.close(out)
        mode, mtime_ns, uid, gid = (
            stat.S_IMODE(listed.st_mode),
            listed.st_mtime_ns,
            listed.st_uid,
            listed.st_gid,
        )
        return Entry(
            path, "file", listed.st_size, mode, mtime_ns, uid, gid, digest, None, linked, False, None, xattrs,
            inode, ctime_ns,
        )  # fmt: skip

    def _read_small(self, fd: int, listed: State) -> tuple[bytes, tuple[tuple[str, str], ...]] | None:
        """Return content and attributes, or None where the file is not, before and after, what was listed."""
        try:
            content = os.read(fd, listed.st_size + 1)
            xattrs = self.xattrs(fd)
            after = state_of(os.fstat(fd))
        except (OSError, Changed):
            return None
        if len(content) != listed.st_size or after != listed or sqlite.is_database(content):
            return None
        return content, xattrs

    def _link_new(self, folder: str, name: str) -> bool:
        """Link the previous snapshot's file into its place, which must be free; tell whether that was possible."""
        assert self.previous is not None, "only called where there is one"
        try:
            os.link(
                name, name, src_dir_fd=self.previous.files.folder(folder), dst_dir_fd=self.store.folder(folder),
                follow_symlinks=False,
            )  # fmt: skip
        except OSError as error:
            if error.errno == errno.EEXIST or error.errno in _NO_LINK:
                return False
            raise
        return True

    # -- the long way -----------------------------------------------------------------------------------------------

    def copy(self, path: str, twin: Callable[[State], Entry | None]) -> tuple[Entry, State]:
        """Copy the file `path`, whatever it is; return its entry and its state.

        `twin` returns the entry of an earlier path of this snapshot that is the same file, if there is one.
        """
        try:
            fd = self.source.open_quietly(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
                raise FileNotFoundError(path) from error
            raise Unreadable(f"cannot be opened: {(error.strerror or '').lower()}") from error
        try:
            before = state_of(os.fstat(fd))
            if not stat.S_ISREG(before.st_mode):
                raise FileNotFoundError(path)
            known = twin(before)
            entry = self._share_twin(path, known) if known else None
            return self._dressed(entry or self._copy(path, fd, before), fd, before), before
        finally:
            os.close(fd)

    def xattrs(self, fd: int) -> tuple[tuple[str, str], ...]:
        """Return the attributes that an ordinary user may set; none where the file system has none.

        Raises Changed, or OSError where they cannot be read.
        """
        return self._xattrs(fd) if self._with_xattrs else ()

    def _xattrs(self, fd: int) -> tuple[tuple[str, str], ...]:
        try:
            names = os.listxattr(fd)
            if not names:
                return ()
            names = sorted(name for name in names if name.startswith("user."))
            return tuple((name, base64.b64encode(os.getxattr(fd, name)).decode("ascii")) for name in names)
        except OSError as error:
            if error.errno == errno.ENODATA:
                raise Changed from error
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS):
                raise
            self._with_xattrs = False
            return ()

    def _dressed(self, entry: Entry, fd: int, before: State) -> Entry:
        """Add what is not content: attributes, and by what an unchanged file is known the next time."""
        try:
            xattrs = self.xattrs(fd)
        except OSError as error:
            raise Unreadable(f"its attributes cannot be read: {(error.strerror or '').lower()}") from error
        if not entry.sqlite and clock.now() - max(before.st_mtime, before.st_ctime) >= TRUST_S:
            return entry._replace(xattrs=xattrs, inode=before.st_ino, ctime_ns=before.st_ctime_ns)
        return entry._replace(xattrs=xattrs, inode=0, ctime_ns=0) if xattrs or entry.inode else entry

    def _share_twin(self, path: str, known: Entry) -> Entry | None:
        """Share with an earlier path of this snapshot that is the same file: a hard link."""
        self.store.remove(path)
        folder, name = self.store.at(known.path)
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
        return known._replace(path=path, hardlink=known.path)

    def _copy(self, path: str, fd: int, before: State) -> Entry:
        old = self.previous.entries.get(path) if self.previous else None
        if old is not None and _is_unchanged(old, before):
            entry = entry_of(path, before, sha256=old.sha256, size=old.size, linked=True)
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
                return entry._replace(linked=True)
            os.lseek(fd, 0, os.SEEK_SET)
        folder, _, name = path.rpartition("/")
        out = self._create(path, folder, name)
        try:
            entry = self._hash(path, fd, before, out)
        finally:
            os.close(out)
        return entry._replace(linked=True) if self._link(entry) else entry

    def _create(self, path: str, folder: str, name: str) -> int:
        try:
            return os.open(name, _CREATING, 0o600, dir_fd=self.store.folder(folder))
        except FileExistsError:
            self.store.remove(path)
            return os.open(name, _CREATING, 0o600, dir_fd=self.store.folder(folder))

    def _hash(self, path: str, fd: int, before: State, out: int | None) -> Entry:
        # Before the reading: how long that takes must not make a young file look old.
        hot = clock.now() - before.st_mtime < HOT_S
        try:
            if out is None:
                size, digest = copy_hashed(fd, None, before.st_size)
            else:
                size, digest = large.copy_hashed(fd, out, before.st_size)
            if hot:
                self.sleep(HOT_S)
                os.lseek(fd, 0, os.SEEK_SET)
                if copy_hashed(fd, None, size)[1] != digest:
                    raise Changed
        except ReadError as error:
            raise Unreadable(f"cannot be read: {(error.strerror or '').lower()}") from error
        if state_of(os.fstat(fd)) != before or size != before.st_size:
            raise Changed
        return entry_of(path, before, sha256=digest, size=size)

    def _copy_database(self, path: str, fd: int, before: State) -> Entry:
        try:
            copy = sqlite.copy_database(self.source, path, fd, self._workbench())
        except sqlite.Unstable as error:
            raise Changed from error
        copy.chmod(0o600)
        self.store.remove(path)
        folder, name = self.store.at(path)
        os.rename(copy, name, dst_dir_fd=folder)
        stored = self.store.open(path, os.O_RDONLY)
        try:
            size, digest = copy_hashed(stored, None)
        finally:
            os.close(stored)
        entry = entry_of(path, before, sha256=digest, size=size, sqlite=True)
        return entry._replace(linked=True) if self._link(entry) else entry

    def _link(self, entry: Entry) -> bool:
        """Put the previous snapshot's file in place of a copy of the same content; tell whether that was possible."""
        if self.previous is None or not entry.same_content(self.previous.entries.get(entry.path)):
            return False
        folder, _, name = entry.path.rpartition("/")
        if self._link_new(folder, name):
            return True
        spare = self._workbench() / "link"
        try:
            old_folder, new_folder = self.previous.files.folder(folder), self.store.folder(folder)
            # Linked under a spare name first: if the previous snapshot's file is gone, the copy is still there.
            spare.unlink(missing_ok=True)
            os.link(name, spare, src_dir_fd=old_folder, follow_symlinks=False)
        except OSError as error:
            if error.errno in _NO_LINK:
                return False
            raise
        os.rename(spare, name, dst_dir_fd=new_folder)
        return True

    def _workbench(self) -> Path:
        """Return a folder beside the store, for this process alone."""
        folder = self.scratch.with_name(f"{self.scratch.name}-{os.getpid()}")
        folder.mkdir(0o700, exist_ok=True)
        return folder


def _beginning(fd: int) -> bytes:
    try:
        return os.pread(fd, 20, 0)
    except OSError as error:
        raise Unreadable(f"cannot be read: {(error.strerror or '').lower()}") from error


def is_small(listed: State, now: float) -> bool:
    """Tell whether the short way may be tried: a small file at rest, with one name."""
    return listed.st_size <= SMALL_BYTES and listed.st_nlink == 1 and now - listed.st_mtime >= HOT_S


def kind_of(info: State) -> Kind | None:
    """Return what an entry calls it, or None for a socket, a pipe or a device."""
    if stat.S_ISREG(info.st_mode):
        return "file"
    if stat.S_ISDIR(info.st_mode):
        return "dir"
    return "link" if stat.S_ISLNK(info.st_mode) else None


def entry_of(
    path: str,
    info: State,
    *,
    size: int,
    sha256: str | None = None,
    target: str | None = None,
    sqlite: bool = False,
    linked: bool = False,
    xattrs: tuple[tuple[str, str], ...] = (),
) -> Entry:
    """Return the entry of a file, folder or link with the state `info`."""
    kind = kind_of(info)
    assert kind is not None, "special files never get here"
    return Entry(
        path, kind, size, stat.S_IMODE(info.st_mode), info.st_mtime_ns, info.st_uid, info.st_gid, sha256=sha256,
        target=target, sqlite=sqlite, linked=linked, xattrs=xattrs,
    )  # fmt: skip


def _is_unchanged(old: Entry, info: State) -> bool:
    """Tell by inode, size and times, where they can be trusted, that the file is what it was."""
    return (
        old.ctime_ns != 0
        and old.ctime_ns == info.st_ctime_ns
        and old.inode == info.st_ino
        and old.size == info.st_size
        and old.mtime_ns == info.st_mtime_ns
        and old.kind == "file"
    )
