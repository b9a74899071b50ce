"""Which scheduled snapshots are due: a pure answer from the configuration, what was made, and the time.

A tier is due for its newest fire time that has passed, for every agent that has no snapshot in that slot. So a run
missed while everything was down is made up once (the newest only), and a new agent gets its first snapshot at once.
Fire times follow Debian's cron through both changes of daylight saving: a run at a time that the clock skips comes
right after the gap, a run at a time that the clock shows twice comes once.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from cronsim import CronSim

from backup_worker.config import Config, Tier

Made = Callable[[str, str, str], bool] | Container[tuple[str, str, str]]
"""Tells whether the snapshot of (tier, slot, agent) exists."""


@dataclass(frozen=True, slots=True)
class Due:
    """A snapshot that should exist and does not; `fire_at` (Unix seconds) is when it became due."""

    tier: str
    slot: str
    agent: str
    fire_at: float


def due(config: Config, made: Made, now: float) -> list[Due]:
    """Return what is due at `now`, agent by agent in the order of the configuration, tier by tier."""
    exists = made if callable(made) else lambda *key: key in made
    zone = config.schedule.timezone
    found: list[Due] = []
    for name, tier in config.schedule.tiers.items():
        if tier.cron is None:
            continue
        fire_at = previous_run(tier, zone, now)
        slot = slot_name(tier, zone, fire_at)
        found += [Due(name, slot, agent, fire_at) for agent in config.agents if not exists(name, slot, agent)]
    return found


def previous_run(tier: Tier, timezone: str, now: float) -> float:
    """Return the newest fire time of a tier with a cron expression that is not later than `now`."""
    return previous_fire(_cron(tier), timezone, now)


def previous_fire(cron: str, timezone: str, now: float) -> float:
    """Return the newest fire time of `cron` that is not later than `now`."""
    here = _local(now, timezone)
    # Backwards iteration leaves out a fire time that is exactly the one it starts from; a microsecond brings it in.
    candidate = next(CronSim(cron, here.replace(microsecond=here.microsecond or 1), reverse=True)).timestamp()
    # In the hour that the clock shows twice, a time of day before now can be one that has already passed: cronsim
    # walks back by the clock on the wall and misses it. Walking forward again finds it.
    for fire in CronSim(cron, _local(candidate, timezone)):
        if not candidate < fire.timestamp() <= now:
            break
        candidate = fire.timestamp()
    return candidate


def next_run(tier: Tier, timezone: str, now: float) -> float:
    """Return the first fire time of a tier with a cron expression that is later than `now`."""
    return next(at for fire in CronSim(_cron(tier), _local(now, timezone)) if (at := fire.timestamp()) > now)


def slot_name(tier: Tier, timezone: str, at: float) -> str:
    """Return the name of the slot that a run at `at` fills, in the schedule's time zone.

    Where the clock shows an hour twice and the tier runs in both, the second run's name ends in `-2`, unless the
    pattern tells them apart.
    """
    local = _local(at, timezone)
    name = local.strftime(tier.slot)
    if tier.cron is None or not local.fold:
        return name
    first = local.replace(fold=0).timestamp()
    runs_twice = all(previous_fire(tier.cron, timezone, fire) == fire for fire in (first, at))
    is_same = _local(first, timezone).strftime(tier.slot) == name
    return f"{name}-2" if runs_twice and is_same else name


def _cron(tier: Tier) -> str:
    if tier.cron is None:
        raise ValueError("the tier has no cron expression")
    return tier.cron


def _local(at: float, timezone: str) -> datetime:
    return datetime.fromtimestamp(at, UTC).astimezone(ZoneInfo(timezone))
