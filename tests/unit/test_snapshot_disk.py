"""What every byte of a snapshot goes through: copying and hashing by descriptor."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from backup_worker.snapshots.content import CHUNK_BYTES, copy_hashed


@pytest.mark.parametrize("hint", [0, 10, CHUNK_BYTES, 4 * CHUNK_BYTES])
def test_a_file_larger_than_was_expected_is_read_in_blocks_and_not_byte_by_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hint: int
) -> None:
    content = os.urandom(3 * CHUNK_BYTES + 7)
    (tmp_path / "source").write_bytes(content)
    reads: list[int] = []
    read = os.read

    def counting(fd: int, size: int) -> bytes:
        reads.append(size)
        return read(fd, size)

    monkeypatch.setattr(os, "read", counting)
    source = os.open(tmp_path / "source", os.O_RDONLY)
    target = os.open(tmp_path / "target", os.O_WRONLY | os.O_CREAT)
    try:
        assert copy_hashed(source, target, hint) == (len(content), hashlib.sha256(content).hexdigest())
    finally:
        os.close(source)
        os.close(target)
    assert (tmp_path / "target").read_bytes() == content
    assert len(reads) <= 7
