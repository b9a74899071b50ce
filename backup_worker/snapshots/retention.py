"""Which snapshots to keep, which to delete, and why: a pure plan, and its thin executor.

Only good snapshots count, per agent and tier. Never deleted are the last good one, a pinned one, one that somebody is
reading, and anything good while the newest backup failed or is suspect. Suspect and partial snapshots push nothing
out; they are bounded among themselves. `prune` looks again at each promise right before it deletes.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from zoneinfo import ZoneInfo

from backup_worker.snapshots.errors import translated
from backup_worker.snapshots.manifest import Head
from backup_worker.snapshots.repository import Repository
from em_bridge.errors import NotFound


@dataclass(frozen=True, slots=True)
class Policy:
    """`keep`: at least so many good snapshots; `days`: and the last good one of each of so many days before today.

    `days` is for tiers that follow events: a burst of changes must not push out all earlier days.
    """

    keep: int
    days: int = 0
    timezone: str = "UTC"


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one snapshot, and every reason for it."""

    id: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """The decisions, oldest snapshot first; printing it is the dry run."""

    keep: tuple[Decision, ...] = field(default=())
    delete: tuple[Decision, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """Return the shape that `backup-worker prune --json` promises."""
        both = (("keep", self.keep), ("delete", self.delete))
        return {
            name: [{"id": d.id, "reasons": list(d.reasons)} for d in decisions] for name, decisions in both
        }


def plan_retention(
    heads: Iterable[Head],
    policies: Mapping[str, Policy],
    *,
    now: float,
    pinned: Collection[str] = (),
    in_use: Collection[str] = (),
    failing: Collection[tuple[str, str]] = (),
) -> RetentionPlan:
    """Decide about every snapshot in `heads`.

    `policies` by tier (a tier without one keeps all); `pinned` (besides what the heads say) and `in_use` are ids;
    `failing` are the (agent, tier) pairs whose last backup failed, as `Repository.failing` gives them.
    """
    groups: dict[tuple[str, str], list[Head]] = {}
    for head in sorted(heads, key=lambda head: head.sort_key):
        groups.setdefault((head.agent, head.tier), []).append(head)
    keep: list[Decision] = []
    delete: list[Decision] = []
    for pair, group in sorted(groups.items()):
        reasons = _reasons(group, policies.get(pair[1]), now=now, failing=pair in failing)
        for head in group:
            why = reasons.get(head.id, [])
            why += ["pinned"] if head.pinned or head.id in pinned else []
            why += ["in use by a restore or a verification"] if head.id in in_use else []
            if why:
                keep.append(Decision(head.id, tuple(why)))
            else:
                delete.append(Decision(head.id, (_why_delete(head, policies[pair[1]]),)))
    return RetentionPlan(tuple(keep), tuple(delete))


@translated("planning retention")
def plan_prune(
    repo: Repository,
    policies: Mapping[str, Policy],
    *,
    now: float,
    agent: str | None = None,
    tier: str | None = None,
) -> RetentionPlan:
    """Plan retention for what the repository holds now (of one agent, or tier), with its pins, readers and failures."""
    heads = repo.snapshots(agent, tier)
    in_use = repo.in_use(head.id for head in heads)
    return plan_retention(heads, policies, now=now, in_use=in_use, failing=repo.failing())


def _reasons(group: list[Head], policy: Policy | None, *, now: float, failing: bool) -> dict[str, list[str]]:
    """Return the reasons to keep, by id; what has none may go. `group` is one agent in one tier, oldest first."""
    reasons: dict[str, list[str]] = {}
    if policy is None:
        return {head.id: [f"the configuration has no tier “{head.tier}”"] for head in group}
    good = [head for head in group if head.is_good]
    doubtful = [head for head in group if not head.is_good]
    for head in good[-1:]:
        reasons.setdefault(head.id, []).append("the last good one")
    newest = good[-policy.keep :] if policy.keep > 0 else []
    for head in newest:
        reasons.setdefault(head.id, []).append(f"one of the newest {policy.keep} good ones")
    for head, day in _last_of_days(good, policy, now):
        reasons.setdefault(head.id, []).append(f"the last good one of {day}")
    if failing or not group[-1].is_good:
        what = "the last backup failed" if failing else f"the newest backup is {_state(group[-1])}"
        for head in good:
            reasons.setdefault(head.id, []).append(f"{what}: nothing good is deleted")
    # Doubtful ones are evidence as long as what they follow is still there, and never more of them than of good ones.
    kept = [head for head in good if head.id in reasons]
    for head in doubtful[-max(policy.keep, 1) :]:
        if not kept or head.sort_key > kept[0].sort_key:
            reasons.setdefault(head.id, []).append(f"{_state(head)}, kept for examination")
    return reasons


def _last_of_days(good: list[Head], policy: Policy, now: float) -> Iterable[tuple[Head, str]]:
    zone = ZoneInfo(policy.timezone)
    today = datetime.datetime.fromtimestamp(now, zone).date()
    last: dict[datetime.date, Head] = {}
    for head in good:
        last[datetime.datetime.fromtimestamp(head.created_at, zone).date()] = head
    for day, head in last.items():
        if 0 < (today - day).days <= policy.days:
            yield head, day.isoformat()


def _state(head: Head) -> str:
    return "damaged" if head.damaged else head.status


def _why_delete(head: Head, policy: Policy) -> str:
    if head.is_good:
        return f"more than {policy.keep} newer good ones" if policy.keep > 1 else "a newer good one is there"
    return f"{_state(head)}, and old"


@translated("pruning")
def prune(repo: Repository, plan: RetentionPlan) -> list[str]:
    """Delete what `plan` says and return the ids deleted.

    Snapshots that were pinned, are being read, or have become the last good one since the plan was made stay. Killed
    anywhere, each snapshot is either whole or gone; the next run continues. Works on a full disk.
    """
    deleted = []
    repo.sweep()
    with repo.lock("prune"):
        for decision in plan.delete:
            try:
                head = repo.get_head(decision.id)
            except NotFound:
                continue
            if head.is_good:
                others = repo.snapshots(head.agent, head.tier)
                if not any(other.is_good and other.sort_key > head.sort_key for other in others):
                    continue
            if repo.delete(decision.id):
                deleted.append(decision.id)
        repo.drop_orphaned_notes()
    return deleted


@translated("forgetting an agent")
def plan_forget(repo: Repository, agent: str) -> RetentionPlan:
    """Plan to delete everything that the repository holds of `agent`, readable or not, save what is held.

    Raises NotFound if that is nothing.
    """
    identifiers = repo.ids(agent)
    if not identifiers:
        raise NotFound(f"there is no snapshot of “{agent}”", hint="see `backup-worker list`")
    pinned = {head.id for head in repo.snapshots(agent) if head.pinned}
    busy = repo.in_use(identifiers)
    keep: list[Decision] = []
    delete: list[Decision] = []
    for identifier in identifiers:
        why = ["pinned"] if identifier in pinned else []
        why += ["in use by a restore or a verification"] if identifier in busy else []
        if why:
            keep.append(Decision(identifier, tuple(why)))
        else:
            delete.append(Decision(identifier, (f"“{agent}” is forgotten",)))
    return RetentionPlan(tuple(keep), tuple(delete))


@translated("forgetting an agent")
def forget(repo: Repository, agent: str, plan: RetentionPlan) -> list[str]:
    """Delete what `plan_forget` planned, also the last good one, and return the ids deleted. Works on a full disk."""
    repo.sweep()
    with repo.lock("prune"):
        deleted = [decision.id for decision in plan.delete if repo.delete(decision.id)]
        repo.drop_orphaned_notes()
    for failed, tier in repo.failing():
        if failed == agent:
            repo.record_success(tier, agent)
    return deleted
