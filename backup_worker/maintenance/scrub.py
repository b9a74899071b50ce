"""The rolling verification: every snapshot is read again within `scrub.days`, oldest first, a share in each run.

What is damaged is healed from sound copies of the same content, if there are any, and people are told so. What cannot
be healed is named, recorded and alerted, and tried again each day; once it proves whole, the alert is resolved. Damage
that somebody else came upon (a backup that shares files with it, a restore) is alerted from here too. If the runs
cannot keep up, that alerts as well: it is never said that something was verified which was not.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

from backup_worker import alerts
from backup_worker.maintenance import rolling
from backup_worker.runtime import Runtime
from backup_worker.snapshots import (
    Head,
    Healed,
    Problem,
    SnapshotError,
    Sources,
    heal_snapshot,
    verify_snapshot,
)
from em_bridge import clock
from em_bridge.errors import NotFound

log = logging.getLogger(__name__)

RUN_S = 20.0
BEHIND_RUN_S = 120.0
"""After how many seconds a run begins no further snapshot, and if some are about to be overdue: other maintenance
waits meanwhile."""

OVERDUE = "scrub-overdue"
"""Key of the alert that snapshots were not read again in time."""


def period_s(runtime: Runtime) -> float:
    """Return within how many seconds every snapshot is read again."""
    return runtime.config.schedule.scrub.days * 86400


def plan(runtime: Runtime, heads: Sequence[Head], *, now: float, every_s: float) -> list[str]:
    """Return the ids of the snapshots to read in a run at `now`; `heads` are all that are readable."""
    repo, period = runtime.repository, period_s(runtime)
    told = _open_keys(runtime)
    items = []
    for head in heads:
        if not head.damaged:
            items.append(rolling.after_success(head.id, head.verified_at or head.created_at, period))
        elif f"rot/{head.id}" not in told:
            # Somebody came upon the damage, and nobody was told of it yet.
            items.append(rolling.Item(head.id, 0.0, period * rolling.SPREAD))
        else:
            items.append(rolling.after_failure(head.id, repo.damaged_at(head.id) or 0.0, period))
    readable = {head.id for head in heads}
    items += [
        rolling.after_failure(identifier, repo.damaged_at(identifier) or 0.0, period)
        for identifier in repo.ids()
        if identifier not in readable
    ]
    return rolling.choose(items, now=now, every_s=every_s)


def run(runtime: Runtime, now: float, *, every_s: float) -> dict[str, Any]:
    """Read the share of one run; return how many snapshots were `verified`, and the ids of the `bad` ones."""
    heads = runtime.repository.snapshots()
    behind = any(now - (head.verified_at or head.created_at) > period_s(runtime) * 0.95 for head in heads)
    limit_s = BEHIND_RUN_S if behind else RUN_S
    started = clock.monotonic()
    verified, bad, sources = 0, [], Sources(runtime.repository)
    for identifier in plan(runtime, heads, now=now, every_s=every_s):
        if clock.monotonic() - started > limit_s:
            break
        try:
            sound = verify(runtime, identifier, now, sources)
        except NotFound:
            continue  # pruned meanwhile
        verified += 1
        if not sound:
            bad.append(identifier)
    _let_go(runtime, except_for=bad)
    return {"verified": verified, "bad": bad}


def verify(runtime: Runtime, identifier: str, now: float, sources: Sources | None = None) -> bool:
    """Read one snapshot again and heal it (from `sources`) if need be; record the result, open or close its alert.

    Returns whether it is whole. Raises NotFound.
    """
    problems, healed = _prove(runtime, identifier, now, sources)
    agent = identifier.rpartition("/")[2]
    for one in healed:
        runtime.record("heal", id=identifier, agent=agent, **one.as_json())
    named = [problem.as_json() for problem in problems]
    runtime.record("verify", id=identifier, agent=agent, ok=not problems, problems=named)
    key = f"rot/{identifier}"
    if problems:
        body = "; ".join(f"{problem['path']}: {problem['problem']}" for problem in named[:10])
        runtime.alert(key, "critical", f"snapshot {identifier} is damaged", body, agent=agent)
        return False
    runtime.resolve(key)
    if healed:
        mended = ", ".join(f"{one.as_json()['path']} (from {one.source})" for one in healed[:10])
        body = f"{mended}; a disk on which this happens should be checked"
        runtime.alert(
            f"healed/{identifier}", "info", f"rot in snapshot {identifier} was healed", body, agent=agent
        )
    return True


def _prove(
    runtime: Runtime, identifier: str, now: float, sources: Sources | None
) -> tuple[list[Problem], list[Healed]]:
    try:
        return heal_snapshot(runtime.repository, identifier, now, sources)
    except SnapshotError as error:
        # A repository that is full, or mounted read-only, can be read all the same.
        log.error("snapshot %s cannot be healed: %s", identifier, error.message)
        return verify_snapshot(runtime.repository, identifier, now), []


def overdue(runtime: Runtime, heads: Sequence[Head], now: float) -> list[Head]:
    """Return what was not proven within the time, longest first. Damaged snapshots have alerts of their own."""
    limit_s = period_s(runtime)
    late = [h for h in heads if not h.damaged and now - (h.verified_at or h.created_at) > limit_s]
    return sorted(late, key=lambda head: head.verified_at or head.created_at)


def tell_of_overdue(runtime: Runtime, heads: Sequence[Head], now: float) -> list[str]:
    """Open or close the alert about overdue verifications; return the ids."""
    late = overdue(runtime, heads, now)
    if late:
        days = runtime.config.schedule.scrub.days
        body = f"{len(late)} were not read again within {days:g} days, the oldest is {late[0].id}"
        runtime.alert(OVERDUE, "warning", "the verification of snapshots is overdue", body)
    else:
        runtime.resolve(OVERDUE)
    return [head.id for head in late]


def _open_keys(runtime: Runtime) -> set[str]:
    return {one.key for one in alerts.open_alerts(runtime.client)} if runtime.client is not None else set()


def _let_go(runtime: Runtime, *, except_for: Collection[str]) -> None:
    """Close the alerts about snapshots that are no more, or that somebody else proved whole again."""
    repo = runtime.repository
    for key in _open_keys(runtime):
        kind, _, identifier = key.partition("/")
        if kind != "rot" or identifier in except_for:
            continue
        try:
            over = not repo.path(identifier).is_dir() or not repo.get_head(identifier).damaged
        except NotFound:
            over = False  # it is there, and cannot be read
        if over:
            runtime.resolve(key)
