"""One agent, one actor on this host: whoever changes an agent's files or starts its process holds this lock.

It is the kernel's, so it ends with its holder at the latest, and can never be stale.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def acting_on(agent: str, state: Path) -> Iterator[bool]:
    """Hold the lock of `agent` below the state folder, or yield False at once if somebody else has it."""
    folder = state / "locks"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder / f"{agent}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)
