"""The folders of a repository: listed, made private, emptied. Nothing here knows what a snapshot is.

A folder that is gone meanwhile holds nothing; anything else that the system refuses is raised.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from backup_worker.snapshots import disk
from backup_worker.snapshots.errors import from_os_error


def folders(path: Path, *, hidden: bool = False) -> list[str]:
    """Return the names of the folders in `path`, sorted; without those that begin with a dot, unless `hidden`."""
    try:
        with os.scandir(path) as listing:
            return sorted(
                e.name for e in listing if (hidden or e.name[0] != ".") and e.is_dir(follow_symlinks=False)
            )
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise from_os_error("reading the repository", error) from error


def is_folder(path: Path) -> bool:
    """Tell whether `path` itself is a folder; links are not followed."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise from_os_error("reading the repository", error) from error


def make_private(path: Path, root: Path) -> None:
    """Make the folder `path`, at or below `root`, for its owner alone; on the disk before this returns."""
    if path.is_dir():
        return
    if path == root:
        path.parent.mkdir(parents=True, exist_ok=True)
    else:
        make_private(path.parent, root)
    path.mkdir(exist_ok=True, mode=0o700)
    disk.sync_folder(path.parent)
