"""Large files: copied and read back by two threads, past the page cache; not a byte differs from the short way."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from pathlib import Path

import pytest

from backup_worker.snapshots import large, verify_snapshot
from backup_worker.snapshots.content import CHUNK_BYTES, ReadError
from tests.agent_on_disk import NOON, Place, coreutils_proves

SIZES = [
    large.FROM_BYTES - 1,
    large.FROM_BYTES,
    large.FROM_BYTES + 1,
    5 * CHUNK_BYTES + 4096,
    9 * CHUNK_BYTES - 3,
]


def copied(source: Path, target: Path, size: int) -> tuple[int, str]:
    reading = os.open(source, os.O_RDONLY)
    writing = os.open(target, os.O_WRONLY | os.O_CREAT)
    try:
        return large.copy_hashed(reading, writing, size)
    finally:
        os.close(reading)
        os.close(writing)


def plainly_copied(source: Path, target: Path, size: int) -> None:
    reading = os.open(source, os.O_RDONLY)
    writing = os.open(target, os.O_WRONLY | os.O_CREAT)
    try:
        large.copy(reading, writing, size)
    finally:
        os.close(reading)
        os.close(writing)


def hashed(path: Path, size: int) -> tuple[int, str]:
    fd = os.open(path, os.O_RDONLY)
    try:
        return large.hash_from_disk(fd, size)
    finally:
        assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT, "whoever reads on would need aligned buffers"
        os.close(fd)


def refuse_direct(monkeypatch: pytest.MonkeyPatch, *, when_used: bool) -> None:
    """Make the kernel refuse direct I/O as some file systems do: at once, or only at the first read and write."""
    real_fcntl, real_pwrite, real_preadv, real_readv = fcntl.fcntl, os.pwrite, os.preadv, os.readv

    def refusing(fd: int, command: int, flags: int = 0) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return real_fcntl(fd, command, flags)

    def check(fd: int) -> None:
        if real_fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "not so small")

    def pwrite(fd: int, data: memoryview, at: int) -> int:
        check(fd)
        return real_pwrite(fd, data, at)

    def preadv(fd: int, blocks: list[memoryview], at: int) -> int:
        check(fd)
        return real_preadv(fd, blocks, at)

    def readv(fd: int, blocks: list[memoryview]) -> int:
        check(fd)
        return real_readv(fd, blocks)

    monkeypatch.setattr(os, "readv", readv)
    if not when_used:
        monkeypatch.setattr(fcntl, "fcntl", refusing)
    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize("disk", ["direct", "refuses direct", "refuses such units"])
@pytest.mark.parametrize("size", SIZES)
def test_a_large_file_is_copied_and_read_back_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, disk: str
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(size))
    if disk != "direct":
        refuse_direct(monkeypatch, when_used=disk == "refuses such units")
    expected = size, hashlib.sha256(source.read_bytes()).hexdigest()
    assert copied(source, target, size) == expected
    assert target.read_bytes() == source.read_bytes()
    assert hashed(target, size) == expected
    plainly_copied(source, tmp_path / "again", size)
    assert (tmp_path / "again").read_bytes() == source.read_bytes()


def test_blocks_of_zeros_become_holes_also_at_the_end(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(
        b"x" * CHUNK_BYTES + bytes(3 * CHUNK_BYTES) + b"y" * CHUNK_BYTES + bytes(2 * CHUNK_BYTES)
    )
    size = source.stat().st_size
    assert copied(source, target, size)[0] == size
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks * 512 <= 3 * CHUNK_BYTES
    for number, holey in enumerate((source, target)):
        again = tmp_path / f"again-{number}"
        plainly_copied(holey, again, size)
        assert again.read_bytes() == source.read_bytes()
        assert again.stat().st_blocks * 512 <= 3 * CHUNK_BYTES


@pytest.mark.parametrize("by", [-CHUNK_BYTES - 5, CHUNK_BYTES + 5])
def test_a_file_of_another_size_than_was_said_shows_as_such(tmp_path: Path, by: int) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(6 * CHUNK_BYTES))
    said = 6 * CHUNK_BYTES + by
    assert copied(source, target, said)[0] == 6 * CHUNK_BYTES
    assert target.read_bytes() == source.read_bytes()
    plainly_copied(source, tmp_path / "again", said)
    assert (tmp_path / "again").read_bytes() == source.read_bytes()
    assert hashed(source, said)[0] == 6 * CHUNK_BYTES


def test_an_error_of_the_source_and_one_of_the_target_are_told_apart(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(6 * CHUNK_BYTES))
    fine, unreadable = os.open(source, os.O_RDONLY), os.open(source, os.O_WRONLY)
    out = os.open(tmp_path / "target", os.O_WRONLY | os.O_CREAT)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(ReadError):
            large.copy_hashed(unreadable, out, 6 * CHUNK_BYTES)
        with pytest.raises(OSError, match="No space") as caught:
            large.copy_hashed(fine, full, 6 * CHUNK_BYTES)
        assert not isinstance(caught.value, ReadError)
    finally:
        for fd in (fine, unreadable, out, full):
            os.close(fd)


def test_a_bit_flipped_in_a_large_file_is_found(tmp_path: Path) -> None:
    place = Place(tmp_path).fill()
    place.write("memory/large.bin", os.urandom(large.FROM_BYTES + 12345))
    made = place.take()
    assert coreutils_proves(place.repo.path(made.id))
    for at in (0, 2 * CHUNK_BYTES + 7, large.FROM_BYTES + 12344):
        fd = os.open(place.stored(made.id, "memory/large.bin"), os.O_RDWR)
        byte = os.pread(fd, 1, at)
        os.pwrite(fd, bytes([byte[0] ^ 1]), at)
        assert [problem.path for problem in verify_snapshot(place.repo, made.id, NOON)] == [
            "memory/large.bin"
        ]
        os.pwrite(fd, byte, at)
        os.close(fd)
        assert verify_snapshot(place.repo, made.id, NOON) == []
