"""Private folders to try something in: nobody else's, and gone afterwards, also if their owner was killed.

The owner holds a kernel lock on the folder, which ends with it at the latest; whoever comes next removes what nobody
holds any more.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from backup_worker.snapshots import disk
from backup_worker.snapshots.disk import Tree
from em_bridge import clock


@contextlib.contextmanager
def folder(parent: Path) -> Iterator[Path]:
    """Yield a fresh private folder in `parent`, removed in the end; removes first what killed processes left there."""
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    sweep(parent)
    place = parent / uuid.uuid4().hex
    # Made under another name and taken before it gets its own: no sweep can come in between.
    making = parent / f".{place.name}"
    making.mkdir(mode=0o700)
    fd = os.open(making, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with disk.locked(fd):
            try:
                os.rename(making, place)
                yield place
            finally:
                with Tree(parent) as tree:
                    tree.remove(place.name)
    finally:
        os.close(fd)


def sweep(parent: Path) -> int:
    """Remove the scratch folders in `parent` whose owner is dead (the kernel knows); return how many."""
    swept = 0
    with Tree(parent) as tree:
        for name in os.listdir(tree.fd):
            try:
                fd = os.open(
                    name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=tree.fd
                )
            except (FileNotFoundError, NotADirectoryError):
                continue
            try:
                with disk.locked(fd, wait=False) as free:
                    if free and not (name.startswith(".") and _is_fresh(fd)):
                        tree.remove(name)
                        swept += 1
            finally:
                os.close(fd)
    return swept


def _is_fresh(fd: int) -> bool:
    """Tell whether the folder may have been made this moment, by somebody who has not taken it yet."""
    return clock.now() - os.fstat(fd).st_ctime < 60.0
