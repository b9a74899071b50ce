"""What a restore has cost: content that is in no backup, and approved changes that are newer than the state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backup_worker.approval import changes
from backup_worker.recovery.incident import Missed
from backup_worker.units import counted
from em_bridge import streams

if TYPE_CHECKING:
    from backup_worker.snapshots import Head, RestorePlan


@dataclass(frozen=True, slots=True)
class Loss:
    """`state_at`: when the newest part of the state was stored; `lost`: paths, or None if it is not known."""

    state_at: float | None
    lost: tuple[str, ...] | None
    missed: tuple[Missed, ...] = ()

    def __str__(self) -> str:
        """Say what the state lacks, in a few words."""
        paths = (
            "what is lost is not known" if self.lost is None else f"lost: {counted(len(self.lost), 'path')}"
        )
        if self.lost == ():
            paths = "nothing is lost"
        return paths + (f", not in it: {counted(len(self.missed), 'approved change')}" if self.missed else "")


def missed_changes(
    plan: RestorePlan, heads: Iterable[Head], known: Iterable[changes.Change], *, until: float
) -> tuple[Missed, ...]:
    """Return the approved changes up to `until` (Unix seconds) that the state of `plan` does not hold, oldest first.

    One counts as held if, for each of its paths, the snapshot that decides is not older than the change. Approvals are
    those in the inbox, and those that a snapshot on change notes (the EM's own word).
    """
    mine = [head for head in heads if head.agent == plan.agent.name]
    stored = {head.id: head.created_at for head in mine}
    made = [head for head in mine if head.approved and head.event is not None]
    applied = [
        one for one in known if one.applied_at is not None and one.agent.lower() == plan.agent.name.lower()
    ]
    found: list[tuple[float, Missed]] = []
    for change in applied:
        at = change.applied_at or 0.0
        if at > until or change.decision != changes.APPROVED or _holds(plan, change.paths, at, stored):
            continue
        why = f": {change.reason}" if change.reason else ""
        text = f"{change.change} ({', '.join(change.paths)}), approved by {change.decided_by}{why}"
        snapshot = next((head.id for head in made if _is_of(head, change)), "")
        found.append((at, Missed(text, change.change, snapshot, change.paths, change.decided_by)))
    named = {missed.snapshot for _, missed in found}
    newest = stored.get(plan.state, 0.0)
    for head in made:
        if head.id in named or not newest < head.created_at <= until:
            continue
        of = next((change for change in applied if _is_of(head, change)), None)
        who, why = head.approved_by or "somebody", f": {head.reason}" if head.reason else ""
        text = f"{head.id}, approved by {who}{why}"
        missed = Missed(text, of.change if of else "", head.id, of.paths if of else (), who)
        found.append((_applied_at(head), missed))
    return tuple(missed for _, missed in sorted(found, key=lambda one: (one[0], one[1].text)))


def _is_of(head: Head, change: changes.Change) -> bool:
    """Tell whether the snapshot was made of the change: of its event, or when its content was put back."""
    words = head.reason.split(":")[0].split()
    is_its_event = words[:1] == ["config.applied"] and _applied_at(head) == change.applied_at
    return change.change in words and (is_its_event or words[:1] == ["re-applied"])


def _applied_at(head: Head) -> float:
    """Return when the change was applied that the snapshot notes as its event, `stream/entry`."""
    entry = (head.event or "").rpartition("/")[2]
    return streams.entry_time(entry) if entry.partition("-")[0].isdecimal() else head.created_at


def _holds(plan: RestorePlan, paths: Iterable[str], at: float, stored: Mapping[str, float]) -> bool:
    sources = {piece.entry.path: piece.source for piece in plan.pieces}
    return all(stored.get(sources.get(path, plan.state), 0.0) >= at for path in paths)
