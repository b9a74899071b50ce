"""The one place that walks, makes, syncs, renames and removes files.

Every path is reached name by name through folder descriptors that refuse symbolic links, so that it cannot leave its
root, not even when a folder is replaced by a link while we work. What is written is on the disk only after `sync_all`
or `sync_folder` returned; both raise OSError when the disk says no.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SAFELY = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_libc = ctypes.CDLL(None, use_errno=True)


class Tree:
    """A folder, and everything below it by relative path; a context manager.

    The descriptor of the folder used last is kept, so that going through sorted paths costs one `openat` a folder.
    """

    def __init__(self, path: Path | str, *, dir_fd: int | None = None, follow: bool = False) -> None:
        self.path = str(path)
        flags = _FOLDER & ~os.O_NOFOLLOW if follow else _FOLDER
        self.fd = os.open(path, flags, dir_fd=dir_fd)
        self._cached = ("", self.fd)
        self._quiet = True

    def __enter__(self) -> Tree:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptors."""
        self._forget()
        os.close(self.fd)

    def _forget(self) -> None:
        if self._cached[1] != self.fd:
            os.close(self._cached[1])
        self._cached = ("", self.fd)

    def folder(self, path: str) -> int:
        """Return a descriptor of the folder `path` ("" or "." is the root), valid until the next call.

        Raises OSError, among them NotADirectoryError or ELOOP where a name on the way is not a folder (any more).
        """
        path = "" if path == "." else path
        known, fd = self._cached
        if known == path:
            return fd
        below = known == "" or path.startswith(known + "/")
        rest = path[len(known) :] if below else path
        if not below:
            self._forget()
        for name in rest.split("/"):
            if name in ("", "."):
                continue
            if name == "..":
                raise PermissionError(errno.EPERM, "path leaves its root", path)
            inner = os.open(name, _FOLDER, dir_fd=self._cached[1])
            if self._cached[1] != self.fd:
                os.close(self._cached[1])
            self._cached = (f"{self._cached[0]}/{name}".lstrip("/"), inner)
        return self._cached[1]

    def at(self, path: str) -> tuple[int, str]:
        """Return the descriptor of the folder that holds `path`, and the last name."""
        folder, _, name = path.rpartition("/")
        if name in ("", ".."):
            raise PermissionError(errno.EPERM, "path leaves its root", path)
        return self.folder(folder), name

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        """Open the file `path`, never through a link, never blocking on a pipe."""
        folder, name = self.at(path)
        return os.open(name, flags | _SAFELY, mode, dir_fd=folder)

    def open_quietly(self, path: str) -> int:
        """Open the file `path` for reading as `open` does, and leave its time of access alone where that is allowed.

        That time would be written to the disk, and only whoever owns the file may spare it.
        """
        if self._quiet:
            try:
                return self.open(path, os.O_RDONLY | os.O_NOATIME)
            except PermissionError as error:
                if error.errno != errno.EPERM:
                    raise
                self._quiet = False
        return self.open(path, os.O_RDONLY)

    def lstat(self, path: str) -> os.stat_result:
        """Return what `path` itself is; links are not followed."""
        if path == ".":
            return os.fstat(self.fd)
        folder, name = self.at(path)
        return os.stat(name, dir_fd=folder, follow_symlinks=False)

    def find(self, path: str) -> os.stat_result | None:
        """Return what `path` is, or None where there is nothing."""
        try:
            return self.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                return None
            raise

    def make_folders(self, path: str, mode: int = 0o700) -> None:
        """Make the folder `path` and those above it, as far as they are missing."""
        made = ""
        for name in path.split("/"):
            if name in ("", "."):
                continue
            folder = self.folder(made)
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, mode, dir_fd=folder)
            made = f"{made}/{name}".lstrip("/")

    def remove(self, path: str) -> None:
        """Remove the file, link or whole folder `path`; nothing there is fine."""
        try:
            folder, name = self.at(path)
            remove_at(folder, name)
        except (FileNotFoundError, NotADirectoryError):
            return
        finally:
            self._forget()

    def read_bytes(self, path: str) -> bytes:
        """Return the content of the file `path`."""
        with open(self.open(path, os.O_RDONLY), "rb", buffering=0) as file:
            return file.readall()


def order(path: str) -> str:
    """Return a sort key that puts a folder right before what it holds."""
    return path.replace("/", "\0")


def walk(tree: Tree, folder: str = ".") -> Iterator[tuple[str, os.stat_result]]:
    """Yield every path below `folder` with its lstat, folders before what they hold; unreadable folders raise."""
    pending = [folder]
    while pending:
        here = pending.pop()
        with os.scandir(tree.folder(here)) as listing:
            names = sorted(listing, key=lambda entry: entry.name)
            found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in names]
        folders = []
        for name, info in found:
            path = name if here == "." else f"{here}/{name}"
            yield path, info
            if stat.S_ISDIR(info.st_mode):
                folders.append(path)
        pending += reversed(folders)


def write_file(tree: Tree, path: str, content: bytes, mode: int = 0o600, *, sync: bool = True) -> None:
    """Write a new file and bring it to the disk; without `sync` that is left to the caller."""
    fd = tree.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(fd, "wb") as file:
        file.write(content)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def replace_file(
    tree: Tree, path: str, content: bytes, *, mode: int = 0o600, owner: tuple[int, int] | None = None
) -> None:
    """Put `content` under the name `path` in one step, on the disk before this returns; `owner` is uid and gid."""
    fresh = path + ".new"
    tree.remove(fresh)
    write_file(tree, fresh, content, sync=False)
    fd = tree.open(fresh, os.O_RDONLY)
    try:
        if owner is not None and os.geteuid() == 0:
            os.fchown(fd, *owner)
        os.fchmod(fd, mode)
        os.fsync(fd)
    finally:
        os.close(fd)
    folder, name = tree.at(path)
    os.rename(name + ".new", name, src_dir_fd=folder, dst_dir_fd=folder)
    os.fsync(folder)


def replace_own(path: Path, content: bytes) -> None:
    """Do as `replace_file` with a file of ours, for its owner alone; a link to its folder is followed."""
    with Tree(path.parent, follow=True) as tree:
        replace_file(tree, path.name, content)


def sync_all(fd: int) -> None:
    """Bring everything written to the file system of `fd` to the disk; write errors raise (since Linux 5.8)."""
    if _libc.syncfs(fd) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def sync_folder(path: Path | str) -> None:
    """Bring the names in a folder to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def exchange(one: Path | str, other: Path | str) -> None:
    """Swap two names in one system call. Raises OSError (EINVAL, ENOSYS, EXDEV, EBUSY: not possible here)."""
    result = _libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(other))


def remove_at(folder: int, name: str) -> None:
    """Remove `name` in the folder `folder` with all it holds, without following any link, however deep."""
    try:
        os.unlink(name, dir_fd=folder)
        return
    except (IsADirectoryError, PermissionError):
        # Linux says EISDIR, POSIX says EPERM; a real refusal comes back from `rmdir` below.
        pass
    try:
        os.rmdir(name, dir_fd=folder)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    _remove_full(folder, name)


def _remove_full(folder: int, name: str) -> None:
    with contextlib.suppress(PermissionError):
        os.chmod(name, 0o700, dir_fd=folder)
    with Tree(name, dir_fd=folder) as tree:
        paths = []
        for path, info in walk_writable(tree):
            if stat.S_ISDIR(info.st_mode):
                paths.append(path)
            else:
                inner, last = tree.at(path)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(last, dir_fd=inner)
        for path in reversed(paths):
            inner, last = tree.at(path)
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(last, dir_fd=inner)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(name, dir_fd=folder)


def walk_writable(tree: Tree) -> Iterator[tuple[str, os.stat_result]]:
    """Walk `tree`, giving the owner full rights on each folder first, so that what it holds can be removed."""
    os.fchmod(tree.fd, 0o700)
    for path, info in walk(tree):
        if stat.S_ISDIR(info.st_mode) and info.st_mode & 0o700 != 0o700:
            folder, name = tree.at(path)
            os.chmod(name, 0o700, dir_fd=folder)
        yield path, info


@contextlib.contextmanager
def locked(fd: int, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold the kernel's lock on an open file or folder; yields whether it was got (always, with `wait`).

    The kernel drops the lock when its holder dies, so that a stale lock cannot exist.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        yield False
        return
    try:
        yield True
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)
