"""Copy single paths with all that they are: content, owner, mode, times and attributes.

Copies are made under new names below a folder that nobody else sees, and what they hold is proven by whoever made them.
Owners are only given where we may (as root); a file system without attributes keeps the content all the same.
"""

from __future__ import annotations

import base64
import errno
import os
import stat
from collections.abc import Iterable

from backup_worker.snapshots import disk, large
from backup_worker.snapshots.content import CHUNK_BYTES, ReadError, write_whole
from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.manifest import Entry

_READING = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_CREATING = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def copy_file(source: Tree, target: Tree, entry: Entry, *, finish: bool) -> None:
    """Copy the file of `entry`; without `finish` its owner, mode and times are left to the caller."""
    folder, _, name = entry.path.rpartition("/")
    # Nobody else sees the folder above, so it may have its rights at once; attributes need the right to write.
    mode = entry.mode & 0o777 if finish and not entry.xattrs else 0o600
    fd = os.open(name, _READING, dir_fd=source.folder(folder))
    try:
        out = os.open(name, _CREATING, mode, dir_fd=target.folder(folder))
        try:
            _copy_content(fd, out, entry.size)
            if finish:
                dress_file(out, entry)
        finally:
            os.close(out)
    finally:
        os.close(fd)


def _copy_content(fd: int, out: int, expected: int) -> None:
    if expected <= CHUNK_BYTES:
        try:
            content = os.read(fd, expected + 1)
        except OSError as error:
            raise ReadError(error.errno, error.strerror) from error
        if len(content) == expected:
            write_whole(out, content)
            return
        os.lseek(fd, 0, os.SEEK_SET)
    large.copy(fd, out, os.fstat(fd).st_size)


def as_folder(path: str, info: os.stat_result) -> Entry:
    """Return the entry of a folder that is not from a snapshot."""
    mode = stat.S_IMODE(info.st_mode)
    return Entry(path, "dir", 0, mode, info.st_mtime_ns, uid=info.st_uid, gid=info.st_gid)


def copy_any(source: Tree, target: Tree, path: str, info: os.stat_result) -> None:
    """Copy a file or link with its mode, owner and times; sockets, pipes and devices are left out."""
    mode = stat.S_IMODE(info.st_mode)
    entry = Entry(path, "file", info.st_size, mode, info.st_mtime_ns, uid=info.st_uid, gid=info.st_gid)
    if stat.S_ISLNK(info.st_mode):
        from_folder, name = source.at(path)
        text = os.readlink(name, dir_fd=from_folder)
        to_folder, _ = target.at(path)
        os.symlink(text, name, dir_fd=to_folder)
        dress(target, [entry._replace(kind="link", target=text)])
    elif stat.S_ISREG(info.st_mode):
        copy_file(source, target, entry, finish=True)


def dress(tree: Tree, entries: Iterable[Entry]) -> None:
    """Give each path its owner (where we may), mode and times; folders last and from the inside out."""
    by_path = {entry.path: entry for entry in entries}
    privileged = os.geteuid() == 0
    for path in sorted(by_path, key=disk.order, reverse=True):
        entry = by_path[path]
        folder, name = (tree.fd, ".") if path == "." else tree.at(path)
        if entry.kind == "link":
            if privileged:
                os.chown(name, entry.uid, entry.gid, dir_fd=folder, follow_symlinks=False)
            os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=folder, follow_symlinks=False)
            continue
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
        try:
            dress_file(fd, entry)
        finally:
            os.close(fd)


def dress_file(fd: int, entry: Entry) -> None:
    """Give an open file or folder its attributes, owner (where we may), mode and times."""
    for name, value in entry.xattrs:
        # A file system without attributes keeps the content all the same.
        try:
            os.setxattr(fd, name, base64.b64decode(value))
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS):
                raise
    info = os.fstat(fd)
    owned = os.geteuid() != 0 or (info.st_uid, info.st_gid) == (entry.uid, entry.gid)
    if not owned:
        os.fchown(fd, entry.uid, entry.gid)
    # A new owner takes bits of the mode away.
    if not owned or stat.S_IMODE(info.st_mode) != entry.mode:
        os.fchmod(fd, entry.mode)
    os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
