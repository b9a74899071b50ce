"""The calendar of backups: for each tier that has a schedule, its last slots, and what stands in them. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backup_worker import schedule
from backup_worker.config import Config, Tier

if TYPE_CHECKING:
    from backup_worker.snapshots import Head

COLUMNS = 14
_AGAIN = re.compile(r"-\d+$")


@dataclass(frozen=True, slots=True)
class Slot:
    """A column: the slot's name, and when it was (or will be) due, in Unix seconds."""

    name: str
    at: float


@dataclass(frozen=True, slots=True)
class Cell:
    """What stands in a slot for an agent; `missed` if something should and does not."""

    heads: tuple[Head, ...]
    missed: bool


@dataclass(frozen=True, slots=True)
class Calendar:
    """A tier's slots, oldest first, and a row of cells for each agent."""

    tier: str
    config: Tier
    slots: tuple[Slot, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def calendars(config: Config, heads: Iterable[Head], now: float, agents: Sequence[str]) -> list[Calendar]:
    """Return the calendar of every tier that has a cron expression, with a row for each of `agents`."""
    by_tier: dict[str, list[Head]] = {}
    shown = set(agents)
    for head in heads:
        if head.agent not in shown:
            continue
        by_tier.setdefault(head.tier, []).append(head)
    zone = config.schedule.timezone
    return [
        _calendar(name, tier, list(agents), by_tier.get(name, []), zone, now)
        for name, tier in config.schedule.tiers.items()
        if tier.cron is not None
    ]


def past_slots(tier: Tier, zone: str, now: float, count: int = COLUMNS) -> list[Slot]:
    """Return the last `count` slots of `tier` that were due by `now`, oldest first."""
    found: list[Slot] = []
    at = now
    while len(found) < count:
        at = schedule.previous_run(tier, zone, at)
        name = schedule.slot_name(tier, zone, at)
        if not found or found[-1].name != name:
            found.append(Slot(name, at))
        at -= 1
    return found[::-1]


def _calendar(name: str, tier: Tier, agents: list[str], heads: list[Head], zone: str, now: float) -> Calendar:
    slots = past_slots(tier, zone, now)
    # What was made by hand, ahead of the first run of a slot, has a column of its own.
    ahead = schedule.slot_name(tier, zone, now)
    known = {slot.name for slot in slots}
    if ahead not in known and any(_base(head.slot, {ahead}) == ahead for head in heads):
        slots = [*slots[1:], Slot(ahead, now)]
    names = {slot.name for slot in slots}
    inside: dict[tuple[str, str], list[Head]] = {}
    first: dict[str, float] = {}
    for head in heads:
        first.setdefault(head.agent, head.created_at)
        inside.setdefault((head.agent, _base(head.slot, names)), []).append(head)
    rows = []
    for agent in agents:
        cells = []
        for slot in slots:
            found = tuple(inside.get((agent, slot.name), ()))
            missed = not found and first.get(agent, now) < slot.at < now
            cells.append(Cell(found, missed))
        rows.append((agent, tuple(cells)))
    return Calendar(name, tier, tuple(slots), tuple(rows))


def _base(slot: str, names: set[str]) -> str:
    """Return the slot that a repetition (`<slot>-2`) belongs to."""
    without = _AGAIN.sub("", slot)
    return without if slot not in names and without in names else slot
