"""What a restore has cost: content that is in no backup, and approved changes that are newer than the state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backup_worker import changes
from em_bridge import streams

if TYPE_CHECKING:
    from backup_worker.snapshots import Head, RestorePlan


@dataclass(frozen=True, slots=True)
class Loss:
    """`state_at`: when the newest part of the state was stored; `lost`: paths, or None if it is not known."""

    state_at: float | None
    lost: tuple[str, ...] | None
    missed: tuple[str, ...] = ()


def missed_changes(
    plan: RestorePlan, heads: Iterable[Head], known: Iterable[changes.Change], *, until: float
) -> tuple[str, ...]:
    """Return, as text, the approved changes up to `until` (Unix seconds) that the state of `plan` does not hold.

    One counts as held if, for each of its paths, the snapshot that decides is not older than the change. Approvals are
    those in the inbox, and those that a snapshot on change notes (the EM's own word).
    """
    mine = [head for head in heads if head.agent == plan.agent.name]
    stored = {head.id: head.created_at for head in mine}
    found: dict[float, str] = {}
    for change in known:
        at = change.applied_at
        if at is None or at > until or change.agent.lower() != plan.agent.name.lower():
            continue
        if change.decision == changes.APPROVED and not _holds(plan, change.paths, at, stored):
            found[at] = f"{change.change} ({', '.join(change.paths)}), approved by {change.decided_by}" + (
                f": {change.reason}" if change.reason else ""
            )
    newest = stored.get(plan.state, 0.0)
    for head in mine:
        if not head.approved or head.event is None or not newest < head.created_at <= until:
            continue
        why = f": {head.reason}" if head.reason else ""
        found.setdefault(_applied_at(head), f"{head.id}, approved by {head.approved_by or 'somebody'}{why}")
    return tuple(found[at] for at in sorted(found))


def _applied_at(head: Head) -> float:
    """Return when the change was applied that the snapshot notes as its event, `stream/entry`."""
    entry = (head.event or "").rpartition("/")[2]
    return streams.entry_time(entry) if entry.partition("-")[0].isdecimal() else head.created_at


def _holds(plan: RestorePlan, paths: Iterable[str], at: float, stored: Mapping[str, float]) -> bool:
    sources = {piece.entry.path: piece.source for piece in plan.pieces}
    return all(stored.get(sources.get(path, plan.state), 0.0) >= at for path in paths)
