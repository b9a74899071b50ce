"""Large files: read or hashed by one thread while another one writes or reads them, past the page cache.

Hashing and the kernel's input and output all run without the interpreter's lock, so that a large file takes as long as
the slowest of them. Direct I/O spares the copy into the page cache, which costs more processor time than the hash;
and what it reads comes from the disk for certain. Where a file system has no direct I/O, the page cache is used. Memory
is constant. Raises ReadError where the source cannot be read, any other OSError where the target cannot be written.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle

from backup_worker.snapshots import content
from backup_worker.snapshots.content import CHUNK_BYTES, ReadError

FROM_BYTES = 4 << 20
"""Below this, a thread costs more than it brings."""
_BUFFERS = 4
_READERS = 2
_ALIGNED_BYTES = 4096
_ZEROS = bytes(CHUNK_BYTES)


def copy_hashed(source: int, target: int, size: int) -> tuple[int, str]:
    """Copy from the beginning to the end; return the size and SHA-256 of what was read. Blocks of zeros become holes.

    As `content.copy_hashed`, which does it for files that are small or have holes already.
    """
    if size < FROM_BYTES or _has_holes(source):
        return content.copy_hashed(source, target, size)
    digest = hashlib.sha256()
    return _pump(source, target, digest.update), digest.hexdigest()


def copy(source: int, target: int, size: int) -> None:
    """Copy from the beginning to the end without hashing; for what is read back and compared afterwards.

    As `content.copy_content`, which does it for files that are small or have holes already.
    """
    if size < FROM_BYTES or _has_holes(source):
        content.copy_content(source, target, size)
        return
    # A living agent's file is in the page cache as a rule, a snapshot's is not.
    _set_direct(source, True)
    _pump(source, target, None)


def _has_holes(source: int) -> bool:
    info = os.fstat(source)
    return info.st_blocks * 512 < info.st_size


def _pump(source: int, target: int, look: Callable[[memoryview], object] | None) -> int:
    """Copy, show each block to `look`, and return how many bytes there were."""
    position, hole = 0, False
    _set_direct(target, True)
    with ThreadPoolExecutor(1) as writer:
        writing: deque[Future[None]] = deque()
        for block in cycle(_ring()):
            if len(writing) == _BUFFERS:
                writing.popleft().result()
            count = _read(source, block)
            if not count:
                break
            hole = not block[0] and block[:count] == _ZEROS[:count]
            writing.append(writer.submit(_write, target, block[: 0 if hole else count], position))
            if look:
                look(block[:count])
            position += count
        for each in writing:
            each.result()
    if hole:
        os.ftruncate(target, position)
    return position


def hash_from_disk(fd: int, size: int) -> tuple[int, str]:
    """Return the size and SHA-256 of a file as the disk has it; `size` is what it should have."""
    if size >= FROM_BYTES and os.fstat(fd).st_size == size and _set_direct(fd, True):
        try:
            digest = _hash_direct(fd, size)
        finally:
            _set_direct(fd, False)
        if digest is not None:
            return size, digest
    return content.hash_from_disk(fd)


def _hash_direct(fd: int, size: int) -> str | None:
    """Return the SHA-256 of the first `size` bytes; None if direct I/O did not give exactly these."""
    digest, done = hashlib.sha256(), 0
    positions = iter(range(0, size, CHUNK_BYTES))
    with ThreadPoolExecutor(_READERS) as reader:
        asked = deque(
            (reader.submit(os.preadv, fd, [block], at), block)
            for block, at in zip(_ring(), positions, strict=False)
        )
        while asked:
            answer, block = asked.popleft()
            try:
                count = answer.result()
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                return None
            if count != min(CHUNK_BYTES, size - done):
                return None
            digest.update(block[:count])
            done += count
            if (at := next(positions, None)) is not None:
                asked.append((reader.submit(os.preadv, fd, [block], at), block))
    return digest.hexdigest()


def _ring() -> list[memoryview]:
    """Return buffers that begin at a page, as direct I/O wants them."""
    memory = memoryview(mmap.mmap(-1, _BUFFERS * CHUNK_BYTES))
    return [memory[at : at + CHUNK_BYTES] for at in range(0, len(memory), CHUNK_BYTES)]


def _set_direct(fd: int, on: bool) -> bool:
    """Switch direct I/O on or off; tell whether the file system has it."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError:
        return False
    return True


def _is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def _read(source: int, block: memoryview) -> int:
    try:
        return os.readv(source, [block])
    except OSError as error:
        if error.errno == errno.EINVAL and _is_direct(source):
            # The end of a file is rarely at the end of a sector, and not every file system answers there.
            _set_direct(source, False)
            return _read(source, block)
        raise ReadError(error.errno, error.strerror) from error


def _write(target: int, block: memoryview, at: int) -> None:
    if (len(block) | at) % _ALIGNED_BYTES:
        _set_direct(target, False)
    while block:
        try:
            count = os.pwrite(target, block, at)
        except OSError as error:
            if error.errno != errno.EINVAL or not _is_direct(target):
                raise
            # This device wants larger units than are usual.
            _set_direct(target, False)
            continue
        block, at = block[count:], at + count
