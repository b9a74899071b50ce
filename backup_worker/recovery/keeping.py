"""How long evidence is kept: within `limits.evidence_days` and `limits.evidence_bytes`, the oldest goes first.

Never removed: the evidence of an open incident, and what came to be within the last hour (a restore may be about to
swap on the strength of it). So the limit of bytes may be exceeded for a while; it is never kept by losing what is in
use. Every removal is on the record.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from backup_worker.recovery.incident import IncidentStore
from backup_worker.runtime import Runtime
from backup_worker.snapshots.disk import Tree

FRESH_S = 3600.0
BY_HAND = "restore-"
"""What the names of evidence begin with that a restore by hand has kept; the others are those of incidents."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One folder of evidence: its name, since when it is there (Unix seconds), and its size."""

    name: str
    since: float
    bytes: int


@dataclass(frozen=True, slots=True)
class Removal:
    """A folder that is to go, and why."""

    kept: Kept
    reason: str


def plan(
    found: Iterable[Kept], *, now: float, max_bytes: int, max_days: float, in_use: Collection[str]
) -> list[Removal]:
    """Return what has to go, the oldest first. Pure."""
    removals = []
    oldest_first = sorted(found, key=lambda one: (one.since, one.name))
    total = sum(one.bytes for one in oldest_first)
    for one in oldest_first:
        if one.name in in_use or now - one.since < FRESH_S:
            continue
        if now - one.since > max_days * 86400:
            removals.append(Removal(one, f"older than {max_days:g} days"))
        elif total > max_bytes:
            removals.append(Removal(one, f"{total} bytes of evidence are more than {max_bytes}"))
        else:
            continue
        total -= one.bytes
    return removals


def look(folder: Path) -> list[Kept]:
    """Return the evidence below `folder`."""
    try:
        with os.scandir(folder) as listing:
            names = [entry.name for entry in listing if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    # The change time cannot be set back, as the time of modification is by a restore.
    return [Kept(name, (folder / name).stat().st_ctime, _size(folder / name)) for name in names]


def _size(folder: Path) -> int:
    return sum((Path(place) / name).lstat().st_size for place, _, names in os.walk(folder) for name in names)


def prune(runtime: Runtime, now: float) -> list[str]:
    """Remove what the limits say, and return the names of the folders that are gone.

    Of closed incidents Redis lets go at the same age; what they did stays in the record. Without Redis nobody can say
    which incidents are open: then only what restores by hand have kept is removed.
    """
    folder, limits = runtime.config.schedule.state / "evidence", runtime.config.schedule.limits
    found = look(folder)
    if runtime.client is None:
        in_use = {one.name for one in found if not one.name.lstrip(".").startswith(BY_HAND)}
    else:
        store = IncidentStore(runtime.client)
        store.forget(now, max_age_s=limits.evidence_days * 86400)
        in_use = set(store.open_ids().values())
    removals = plan(
        found, now=now, max_bytes=limits.evidence_bytes, max_days=limits.evidence_days, in_use=in_use
    )
    for removal in removals:
        with Tree(folder) as tree:
            tree.remove(removal.kept.name)
        runtime.record(
            "prune", evidence=str(folder / removal.kept.name), bytes=removal.kept.bytes, reason=removal.reason
        )
    return [removal.kept.name for removal in removals]
