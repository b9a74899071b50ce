"""The daily digest: one message that says how the fleet stands, also when nothing is wrong.

That it comes is a sign of life by itself: scheduler, dispatcher, workers and the way to the human all worked. What it
says is `status` in words. Composing it is pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from backup_worker.units import age, counted, moment, size

NAMED = 5
"""How many agents, snapshots or alerts a line names."""

Facts = Mapping[str, Any]


def compose(
    facts: Facts, incidents: Sequence[Facts], free_bytes: int, since: float, zone: str
) -> tuple[str, str]:
    """Return the title and the body.

    `facts` is what `status.overview` returned with Redis there, `incidents` are summaries of those that were opened or
    closed after `since` (Unix seconds), `free_bytes` is the room in the repository.
    """
    lines = [
        *_backups(facts), *_proofs(facts), *_recoveries(facts, incidents, since, zone), *_alerts(facts),
        *_bus(facts), *_room(facts, free_bytes), f"next runs: {_next_runs(facts, zone)}",
    ]  # fmt: skip
    wrong = _wrong(facts)
    agents = len(facts["agents"])
    title = (
        f"all is well with {counted(agents, 'agent')}"
        if not wrong
        else f"{', '.join(wrong)} ({counted(agents, 'agent')})"
    )
    return title, "\n".join(lines)


def _wrong(facts: Facts) -> list[str]:
    """Return in a few words each thing that needs a human."""
    counts = {
        "missing backups": len(facts["overdue"]),
        "stale agents": len({place.partition("/")[2] for place in facts["stale"]}),
        "damaged snapshots": len(facts["scrub"]["damaged"]),
        "overdue drills": len(facts["drills_overdue"]),
        "open recoveries": len(facts["incidents"]),
        "critical alerts": sum(one["severity"] == "critical" for one in facts["alerts"]),
        "receivers not reached": sum(one["failures"] > 0 for one in facts["receivers"]),
    }
    found = [f"{count} {what}" for what, count in counts.items() if count]
    return [*found, *(["recovery is paused"] if facts["recovery_paused"] else [])]


def _backups(facts: Facts) -> Iterator[str]:
    for tier in facts["next_runs"]:
        cells = {row["agent"]: row["tiers"][tier] for row in facts["agents"]}
        ages = {agent: cell["age_s"] for agent, cell in cells.items() if cell["age_s"] is not None}
        line = f"{tier}: {len(ages)} of {len(cells)} agents have a good snapshot"
        if ages:
            oldest = max(ages, key=lambda agent: ages[agent])
            line += f", the newest of each is at most {age(ages[oldest])} old ({oldest})"
        yield line
        if late := [f"{cell['overdue']} of {agent}" for agent, cell in cells.items() if cell["overdue"]]:
            yield f"  MISSING: {_some(late)}"
        if stale := [agent for agent, cell in cells.items() if cell["stale"]]:
            yield f"  STALE (two runs without a good one): {_some(stale)}"


def _proofs(facts: Facts) -> Iterator[str]:
    drills = {row["agent"]: row["drill"] for row in facts["agents"]}
    ages = {agent: one["age_s"] for agent, one in drills.items() if one["age_s"] is not None}
    line = f"restores proven: {len(ages)} of {len(drills)} agents"
    yield line + (f", the oldest {age(max(ages.values()))} ago" if ages else "")
    if failed := [agent for agent, one in drills.items() if one["last_ok"] is False]:
        yield f"  the last drill FAILED: {_some(failed)}"
    if facts["drills_overdue"]:
        yield f"  overdue: {_some(facts['drills_overdue'])}"
    scrub = facts["scrub"]
    oldest = f", the oldest {age(scrub['oldest_age_s'])} ago" if scrub["oldest_age_s"] is not None else ""
    late = f", {scrub['overdue']} overdue" if scrub["overdue"] else ""
    yield f"verified: {counted(scrub['snapshots'], 'snapshot')}{oldest}{late}"
    if scrub["damaged"]:
        yield f"  DAMAGED: {_some(scrub['damaged'])}"


def _recoveries(facts: Facts, incidents: Sequence[Facts], since: float, zone: str) -> Iterator[str]:
    states = Counter(one["state"] for one in incidents)
    counted = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none"
    yield f"recoveries since {moment(since, zone)}: {counted}"
    for one in incidents[-NAMED:]:
        yield f"  {one['agent']}: {one['state']} ({one['id']}): {one['reason']}"
    if len(incidents) > NAMED:
        yield f"  and {len(incidents) - NAMED} earlier: backup-worker incidents"
    if facts["recovery_paused"]:
        yield "  RECOVERY IS PAUSED: dead agents stay dead"


def _alerts(facts: Facts) -> Iterator[str]:
    rows = [one for one in facts["alerts"] if one["severity"] != "info"]
    seen = sum(one["acknowledged_by"] is not None for one in rows)
    yield f"open alerts: {len(rows)}, of which {seen} were acknowledged"
    for one in rows[:NAMED]:
        yield f"  [{one['severity']}] {one['title']}" + (" (silent)" if one["silenced_by"] else "")
    if len(rows) > NAMED:
        yield f"  and {len(rows) - NAMED} more: backup-worker alerts"
    for one in facts["receivers"]:
        if one["failures"]:
            yield f"  NOT REACHED: {one['receiver']}, {counted(one['failures'], 'time')}: {one['last_failure']}"


def _bus(facts: Facts) -> Iterator[str]:
    waiting = ", ".join(f"{name} {count}" for name, count in facts["queues"].items())
    yield f"jobs waiting: {waiting}; dead letters: {facts['dead_letters']}"


def _room(facts: Facts, free_bytes: int) -> Iterator[str]:
    memory = facts["memory"]
    used = ""
    if memory:
        limit = f" of {size(memory['limit_bytes'])}" if memory["limit_bytes"] else ""
        used = f"; Redis uses {size(memory['used_bytes'])}{limit}"
    yield f"free in the repository: {size(free_bytes)}{used}"


def _next_runs(facts: Facts, zone: str) -> str:
    return ", ".join(f"{tier} {moment(at, zone)}" for tier, at in facts["next_runs"].items() if at) or "none"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED])
    return shown + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
