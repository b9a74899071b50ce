"""Making snapshots, with everything that belongs to it: the record, the alerts, and retention behind a good one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from backup_worker import timings
from backup_worker.approval import approvals, standing
from backup_worker.approval.approved import ApprovedState, Differences
from backup_worker.config import Tier
from backup_worker.runtime import Runtime
from backup_worker.schedule import slot_name
from backup_worker.snapshots import Manifest, plan_prune, prune, take_snapshot
from backup_worker.snapshots.take import Attest
from em_bridge import clock


def scheduled(runtime: Runtime, agent: str, tier_name: str, slot: str, *, now: float) -> Manifest:
    """Return the scheduled snapshot of `slot`, made now if it is not there yet.

    One that was made by hand in the same period does not stand in for it: the agent has lived on since. Raises NotFound
    for an unknown agent or tier, AgentBackupError if the snapshot cannot be made.
    """
    tier = runtime.config.tier(tier_name)
    return make(
        runtime, agent, tier_name, tier, slot, now, reason="scheduled", on_taken="next",
        event=f"slot/{tier_name}/{slot}/{agent}",
    )  # fmt: skip


def by_hand(runtime: Runtime, agent: str, tier_name: str, *, now: float) -> Manifest:
    """Make a snapshot now; if the slot is taken, it gets the next free name."""
    tier = runtime.config.tier(tier_name)
    slot = slot_name(tier, runtime.config.schedule.timezone, now)
    return make(runtime, agent, tier_name, tier, slot, now, reason="by hand", on_taken="next")


def make(
    runtime: Runtime,
    agent: str,
    tier_name: str,
    tier: Tier,
    slot: str,
    now: float,
    *,
    reason: str,
    on_taken: Literal["next", "return"],
    event: str | None = None,
    approved: bool | None = None,
    approved_by: str | None = None,
    attest: Attest | None = None,
) -> Manifest:
    """Make a snapshot, put it on the record and apply retention; the options are those of `take_snapshot`."""
    begun = clock.monotonic()
    if attest is None and approved is None:
        attest = _standing(runtime, agent, tier)
    snapshot = take_snapshot(
        runtime.repository,
        runtime.config.files_of(agent),
        tier=tier_name,
        slot=slot,
        include=tier.include,
        unchanged=tier.unchanged,
        now=now,
        reason=reason,
        event=event,
        approved=approved,
        approved_by=approved_by,
        attest=attest,
        on_taken=on_taken,
        limits=runtime.config.snapshot_limits(),
    )
    timings.note(runtime.client, tier_name, agent, clock.monotonic() - begun)
    _record(runtime, snapshot)
    keep_within(runtime, agent, tier_name, now)
    return snapshot


def _standing(runtime: Runtime, agent: str, tier: Tier) -> Attest:
    """Return what marks a snapshot `unapproved` if it holds guarded files that nobody has approved."""

    def covered(state: ApprovedState, differing: Differences) -> Collection[str]:
        return approvals.covered(runtime.redis, approvals.rules(runtime.config), state, differing)

    files = runtime.config.files_of(agent)
    known = covered if runtime.client is not None else None
    return standing.attest(runtime.repository, files, tier.include, known)


def _record(runtime: Runtime, snapshot: Manifest) -> None:
    """Put a snapshot on the record once, also if the job that made it was killed right behind the commit."""
    runtime.record_once(
        snapshot.id, "backup", id=snapshot.id, agent=snapshot.agent, tier=snapshot.tier, status=snapshot.status,
        files=snapshot.files, bytes=snapshot.bytes, reason=snapshot.reason, approved=snapshot.approved,
        problems=[problem.as_json() for problem in snapshot.problems],
    )  # fmt: skip
    place = f"{snapshot.tier}/{snapshot.agent}"
    runtime.resolve(f"failed/{place}")
    key = f"suspect/{place}"
    if snapshot.status == "good":
        runtime.resolve(key)
    else:
        why = "; ".join(f"{problem.path}: {problem.problem}" for problem in snapshot.problems[:10])
        title = f"{snapshot.tier} backup of {snapshot.agent} is {snapshot.status}"
        runtime.alert(key, "critical", title, f"{snapshot.id}: {why}", agent=snapshot.agent)
    key = f"damage/{place}"
    if snapshot.warnings:
        # Such as damage found, and healed, in what it shares with the snapshot before it.
        title = f"{snapshot.tier} backup of {snapshot.agent} came upon damage"
        body = f"{snapshot.id}: {'; '.join(snapshot.warnings[:10])}"
        runtime.alert(key, "warning", title, body, agent=snapshot.agent)
    else:
        runtime.resolve(key)


def keep_within(runtime: Runtime, agent: str | None, tier: str | None, now: float) -> list[str]:
    """Apply retention (of one agent and tier, or everywhere) and return the ids that were deleted."""
    plan = plan_prune(runtime.repository, runtime.config.retention(), now=now, agent=agent, tier=tier)
    deleted = prune(runtime.repository, plan)
    for identifier in deleted:
        runtime.record("prune", id=identifier, agent=identifier.rpartition("/")[2])
    return deleted
