"""Is there room for the next backups? Asked before they fail, while there is still time to do something about it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from backup_worker.config import Config
from backup_worker.runtime import Runtime
from backup_worker.snapshots import Head
from backup_worker.units import size

KEY = "space"
"""Key of the alert."""

MARGIN = 2.0
"""Free space below this multiple of `limits.reserve_bytes` is little."""

CALM = 1.1
"""How much more than that must be free before the alert is closed: one that comes and goes is soon ignored."""


def tell(runtime: Runtime, heads: Sequence[Head]) -> int:
    """Open or close the alert about little space in the repository; return the bytes that are free."""
    free = free_bytes(runtime.config.schedule.repository)
    reserve = runtime.config.schedule.limits.reserve_bytes
    wanted = wanted_bytes(runtime.config, heads)
    if free < wanted:
        fails = free < reserve
        title = "backups fail: the repository is full" if fails else "the repository is getting full"
        body = (
            f"{size(free)} are free in {runtime.config.schedule.repository}; the reserve is {size(reserve)}, and with "
            f"the next backups {size(wanted)} are needed: free some space, or keep fewer snapshots"
        )
        runtime.alert(KEY, "critical" if fails else "warning", title, body)
    elif free >= wanted * CALM:
        runtime.resolve(KEY)
    return free


def wanted_bytes(config: Config, heads: Sequence[Head]) -> int:
    """Return how much should be free: the reserve with a margin, and room for the largest round of whole copies.

    A round is one snapshot of each agent in a tier; where unchanged files are linked, it takes next to nothing.
    """
    newest = {(head.tier, head.agent): head.bytes for head in heads if head.agent in config.agents}
    rounds = [
        sum(bytes_ for (tier, _), bytes_ in newest.items() if tier == name)
        for name, one in config.schedule.tiers.items()
        if one.unchanged == "copy"
    ]
    reserve = config.schedule.limits.reserve_bytes
    return max(int(reserve * MARGIN), reserve + max(rounds, default=0))


def free_bytes(place: Path) -> int:
    """Return how many bytes may still be written below `place`, which need not exist yet."""
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free
