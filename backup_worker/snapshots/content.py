"""What is in files: copied, hashed and read back by descriptor, in constant memory.

A file that is copied is hashed in the same pass; what is read back comes from the disk and not from the page cache's
memory of what was written, and many small files are asked for at once, so that the disk answers them together. Holes
stay holes. Raises ReadError where the source cannot be read, any other OSError where the target cannot be written.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from backup_worker.snapshots.disk import Tree

CHUNK_BYTES = 1 << 20
AHEAD = 64
"""So many files are asked for at once when many are read back."""

_ZEROS = bytes(CHUNK_BYTES)
_AHEAD_BYTES = 2 << 20
_START_WRITING_BYTES = 8 << 20
_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None, use_errno=True)
_NOT_HERE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)

T = TypeVar("T")


class ReadError(OSError):
    """Reading failed, not writing: the fault is on the side of what was copied."""


def copy_hashed(source: int, target: int | None, size_hint: int = CHUNK_BYTES) -> tuple[int, str]:
    """Copy from descriptor to descriptor to the end; return the size and SHA-256 of what was read.

    With `target` None the content is only hashed. Blocks of zeros become holes. `size_hint` is the size that the file
    should have: it spares a small file a large buffer and a second read, and more may come.
    """
    digest = hashlib.sha256()
    size, hole = 0, False
    for start, end in _stretches(source, size_hint):
        if start > size:
            _hash_zeros(digest, start - size)
            size, hole = start, True
            if target is not None:
                os.lseek(target, start, os.SEEK_SET)
        while end is None or size < end:
            asked = _block_size(size_hint - size) if end is None else min(end - size, CHUNK_BYTES)
            chunk = _read_block(source, asked)
            if not chunk:
                break
            digest.update(chunk)
            size += len(chunk)
            if target is not None:
                hole = _write_block(target, chunk)
                _start_writing(target, size)
            if end is None and len(chunk) < asked and size == size_hint:
                # The end, as expected: a second read would only say so again.
                break
    if target is not None and hole:
        os.ftruncate(target, size)
    return size, digest.hexdigest()


def _stretches(source: int, size_hint: int) -> Iterator[tuple[int, int | None]]:
    """Yield where there is data; the end of the last stretch is None: read on, more may have come meanwhile."""
    info = os.fstat(source) if size_hint > CHUNK_BYTES else None
    position = 0
    if info is not None and info.st_blocks * 512 < info.st_size:
        with contextlib.suppress(OSError):
            while position < info.st_size:
                try:
                    start = os.lseek(source, position, os.SEEK_DATA)
                except OSError as error:
                    if error.errno != errno.ENXIO:
                        raise
                    start = info.st_size
                end = os.lseek(source, start, os.SEEK_HOLE) if start < info.st_size else start
                os.lseek(source, start, os.SEEK_SET)
                yield start, end
                position = end
    yield position, None


def _hash_zeros(digest: hashlib._Hash, count: int) -> None:
    while count > 0:
        digest.update(_ZEROS if count >= CHUNK_BYTES else _ZEROS[:count])
        count -= CHUNK_BYTES


def _block_size(expected: int) -> int:
    # One byte above what is expected, so that the read that meets the end is the last one.
    return CHUNK_BYTES if expected < 0 else min(expected + 1, CHUNK_BYTES)


def _read_block(source: int, size: int) -> bytes:
    try:
        return os.read(source, size)
    except OSError as error:
        raise ReadError(error.errno, error.strerror) from error


def write_whole(target: int, content: bytes) -> None:
    """Write all that a new file holds."""
    if content and _write_block(target, content):
        os.ftruncate(target, len(content))


def _write_block(target: int, chunk: bytes) -> bool:
    """Write; tell whether a hole was left instead."""
    if len(chunk) >= 4096 and not chunk[0] and chunk == _ZEROS[: len(chunk)]:
        os.lseek(target, len(chunk), os.SEEK_CUR)
        return True
    written = os.write(target, chunk)
    if written < len(chunk):
        view = memoryview(chunk)[written:]
        while view:
            view = view[os.write(target, view) :]
    return False


def _start_writing(target: int, size: int) -> None:
    # The disk begins with a large file while the rest of it is still being hashed; waiting for it is `sync_all`'s.
    if size >= _START_WRITING_BYTES and size % _START_WRITING_BYTES == 0:
        _libc.sync_file_range(
            target,
            ctypes.c_int64(size - _START_WRITING_BYTES),
            ctypes.c_int64(_START_WRITING_BYTES),
            _SYNC_FILE_RANGE_WRITE,
        )


def copy_content(source: int, target: int, size: int) -> None:
    """Copy without hashing, inside the kernel where it can; for what is read back and compared afterwards."""
    if size <= CHUNK_BYTES:
        while chunk := _read_block(source, size + 1):
            _write_block(target, chunk)
            if len(chunk) == size:
                break
        if os.fstat(target).st_size < size:
            os.ftruncate(target, size)
        return
    end_of_data = 0
    for start, end in _stretches(source, size):
        position = start
        while end is None or position < end:
            count = _copy_range(source, target, (end or max(size, position + 1)) - position, position)
            if not count:
                break
            position += count
        end_of_data = max(end_of_data, position)
    if end_of_data and os.fstat(target).st_size < end_of_data:
        os.ftruncate(target, end_of_data)


def _copy_range(source: int, target: int, count: int, at: int) -> int:
    try:
        return os.copy_file_range(source, target, min(count, 64 << 20), at, at)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
    try:
        chunk = os.pread(source, min(count, CHUNK_BYTES), at)
    except OSError as error:
        raise ReadError(error.errno, error.strerror) from error
    done = 0
    while done < len(chunk):
        done += os.pwrite(target, chunk[done:], at + done)
    return len(chunk)


def hash_from_disk(fd: int) -> tuple[int, str]:
    """Return the size and SHA-256 of a file as the disk has it, not as the page cache remembers it."""
    size = os.fstat(fd).st_size
    forget(fd)
    return copy_hashed(fd, None, size)


def forget(fd: int) -> None:
    """Take what is on the disk already out of the page cache, so that the next read comes from the disk."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def opened_ahead(
    tree: Tree, items: Iterable[T], path: Callable[[T], str], *, from_disk: bool = True
) -> Iterator[tuple[T, int | OSError]]:
    """Yield each item with its file open for reading, or with why it could not be opened.

    The disk is asked for a whole group before the first of it is read; `from_disk`: also for what the page cache still
    holds. The descriptor is closed when the next one is asked for.
    """
    waiting = iter(items)
    while group := list(islice(waiting, AHEAD)):
        opened: list[int | OSError] = []
        try:
            for item in group:
                try:
                    opened.append(tree.open_quietly(path(item)))
                except OSError as error:
                    opened.append(error)
            _ask_ahead([fd for fd in opened if isinstance(fd, int)], from_disk)
            opened.reverse()
            for item in group:
                found = opened[-1]
                yield item, found
                opened.pop()
                if isinstance(found, int):
                    os.close(found)
        finally:
            for found in opened:
                if isinstance(found, int):
                    os.close(found)


def _ask_ahead(fds: Sequence[int], from_disk: bool) -> None:
    """Let the page cache forget what is on the disk already, if it should, and the disk begin to read."""
    advise, forgets, wants = os.posix_fadvise, os.POSIX_FADV_DONTNEED, os.POSIX_FADV_WILLNEED
    # A file system that takes no advice takes none on any file.
    with contextlib.suppress(OSError):
        for fd in fds if from_disk else ():
            advise(fd, 0, 0, forgets)
        for fd in fds:
            advise(fd, 0, _AHEAD_BYTES, wants)
