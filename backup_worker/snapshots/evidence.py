"""Keep what stands in a folder before it is replaced: evidence for whoever asks afterwards what happened.

The copy appears whole, by one rename, and synced, or not at all; then the caller must not change anything.
"""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
from collections.abc import Container
from pathlib import Path

from backup_worker.snapshots import disk
from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.errors import NoSpace, SnapshotError, from_os_error
from backup_worker.snapshots.exact_copy import as_folder, copy_any, dress
from backup_worker.snapshots.scope import AgentFiles, Scope
from backup_worker.snapshots.sqlite import COMPANIONS
from backup_worker.snapshots.together import Sync, Work, alone


def keep_evidence(agent: AgentFiles, root: Path, destination: Path, *, also: Container[str] = ()) -> Path:
    """As `keeping`, alone."""
    return alone(keeping(agent, root, destination, also=also))


def keeping(agent: AgentFiles, root: Path, destination: Path, *, also: Container[str] = ()) -> Work[Path]:
    """Copy what stands in `root` to `destination` (`-2` and so on if it is taken) and return where it is.

    Excluded paths stay out, because a restore carries them over, save those in `also`, and a database's log. Appears
    by one rename, synced. Raises SnapshotError where anything cannot be read or kept. A work that can share its wait.
    """
    root = Path(os.path.realpath(root))
    building = destination.parent / f".{destination.name}.{uuid.uuid4().hex}"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.mkdir(building, 0o700)
        try:
            with Tree(building) as new:
                yield Sync(new.fd, weight=_copy_evidence(agent, root, new, also))
            return _appear(building, destination)
        except BaseException:
            with contextlib.suppress(OSError), Tree(building.parent) as parent:
                parent.remove(building.name)
            raise
    except OSError as error:
        failure = from_os_error(f"keeping what stands in “{root}” as evidence", error)
        kind = NoSpace if isinstance(failure, NoSpace) else SnapshotError
        raise kind(f"{failure.message}; nothing was changed", hint=failure.hint) from error


def _copy_evidence(agent: AgentFiles, root: Path, new: Tree, also: Container[str]) -> int:
    """Copy, and return how many files that were."""
    scope = Scope(("**",), tuple(agent.exclude))
    folders, count = [], 0
    with Tree(root) as old:
        for path, info in disk.walk(old):
            if scope.excludes(path) and not (path in also or path.endswith(COMPANIONS)):
                continue
            new.make_folders(path.rpartition("/")[0])
            if stat.S_ISDIR(info.st_mode):
                new.make_folders(path)
                folders.append(as_folder(path, info))
            else:
                copy_any(old, new, path, info)
                count += 1
        dress(new, folders)
    return count


def _appear(building: Path, destination: Path) -> Path:
    place, number = destination, 1
    while os.path.lexists(place):
        number += 1
        place = destination.with_name(f"{destination.name}-{number}")
    os.rename(building, place)
    disk.sync_folder(place.parent)
    return place
