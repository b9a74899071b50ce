"""Maintenance: deliver alerts and notices, look for what is missing, prune, scrub, drill, trim.

Each task may run at any time, twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from backup_worker import alerts, backups, schedule
from backup_worker.approval import approvals, changes, forgetting, guard_rounds
from backup_worker.config import Config
from backup_worker.maintenance import drill as drills
from backup_worker.maintenance import lookout, notices, pings, record_watch, space
from backup_worker.maintenance import scrub as scrubbing
from backup_worker.queueing import due
from backup_worker.recovery import keeping
from backup_worker.recovery.service import RecoveryService
from backup_worker.runtime import Runtime
from em_bridge import streams
from em_bridge.errors import NotFound

LAG_ALERT_S = 60.0
WATCHED_AT = "backup:watched-at"
"""Key: when `watch` last looked at everything, Unix seconds. If it gets old, the scheduler alerts."""

DEAD_LETTERS = "dead-letter"
TOLD_LETTER = "backup:dead-letter-told"
"""Key: the newest dead letter that the alert told of."""

STREAMS = (streams.AGENT_STATE, streams.CONFIG_CHANGE, due.STREAM, streams.DEAD_LETTER)


def run(runtime: Runtime, task: str, *, now: float, host: str | None = None) -> dict[str, Any]:
    """Run `task` (a key of `TASKS`) at `now`, Unix seconds, or the part of it that `host` has; raises NotFound."""
    if task not in TASKS:
        raise NotFound(f"there is no maintenance task “{task}”", hint=f"known: {', '.join(TASKS)}")
    if task == guard_rounds.TASK:
        return guard_rounds.run(runtime, now, host=host)
    return TASKS[task](runtime, now)


def deliver(runtime: Runtime, now: float) -> dict[str, Any]:
    """Send the alerts that are due, and note which silences are over."""
    for silence in alerts.silences.take_ended(runtime.redis, now):
        runtime.record("silence-ended", **silence.as_json() | {"by": "its time was over"})
    receivers = runtime.config.schedule.alerts
    sent = alerts.deliver_due(runtime.redis, receivers, runtime.history, now, policy=runtime.policy)
    return {"sent": sent}


def watch(runtime: Runtime, now: float) -> dict[str, Any]:
    """Alert what is missing or stuck: overdue backups and proofs, little space, dead letters, events nobody takes."""
    record_watch.write_kept(runtime, now)
    heads = runtime.repository.snapshots()
    overdue = lookout.missing_backups(runtime, now, heads)
    for (tier, agent), late in overdue.items():
        title, body = f"{tier} backup of {agent} is missing", f"slot {late.slot} was due and is not there"
        runtime.alert(f"missing/{tier}/{agent}", "critical", title, body, agent=agent)
    result = {
        "overdue": [f"{tier}/{agent}" for tier, agent in overdue],
        "unverified": scrubbing.tell_of_overdue(runtime, heads, now),
        "undrilled": drills.tell_of_overdue(runtime, heads, now),
        "free_bytes": space.tell(runtime, heads),
        "dead_letters": _tell_of_dead_letters(runtime),
        **lookout.look(runtime, heads, now),
    }
    if pings.due(runtime, heads, now):
        # By a job of its own: a switch that does not answer must not hold up this look.
        streams.append(runtime.redis, due.MaintenanceDue(pings.TASK))
    _let_go(runtime, overdue)
    # While nobody dies, nobody else looks whether a pause is over.
    RecoveryService(runtime).end_pause_in_time()
    waiting_s = lookout.oldest_waiting(runtime, now)
    if waiting_s > LAG_ALERT_S:
        runtime.alert(
            "lag", "critical", "events are not taken", f"the oldest has waited for {waiting_s:.0f} s"
        )
    else:
        runtime.resolve("lag")
    runtime.redis.set(WATCHED_AT, now)
    return result


def _let_go(runtime: Runtime, overdue: Mapping[tuple[str, str], schedule.Due]) -> None:
    """Close what is no longer missing, and what was opened about agents that are no longer configured."""
    for alert in alerts.open_alerts(runtime.redis):
        kind, *names = alert.key.split("/")
        if kind == "missing" and tuple(names) not in overdue:
            runtime.resolve(alert.key)
        if kind in ("drill", "drill-overdue") and names[-1] not in runtime.config.agents:
            runtime.resolve(alert.key)


def _tell_of_dead_letters(runtime: Runtime) -> int:
    """Alert that there are dead letters, anew if one came behind an acknowledgement; return how many there are."""
    letters = int(runtime.redis.xlen(streams.DEAD_LETTER))
    last = streams.last_id(runtime.redis, streams.DEAD_LETTER)
    told: Any = runtime.redis.get(TOLD_LETTER)
    is_news = streams.id_order(last) > streams.id_order((told or b"0-0").decode())
    seen = any(
        alert.key == DEAD_LETTERS and alert.acknowledged_at for alert in alerts.open_alerts(runtime.redis)
    )
    if not letters or (seen and is_news):
        runtime.resolve(DEAD_LETTERS)
    if letters:
        body = f"{letters} events could not be handled; the last one is {last} on “{streams.DEAD_LETTER}”"
        runtime.alert(DEAD_LETTERS, "warning", "there are dead letters", body)
        runtime.redis.set(TOLD_LETTER, last)
    return letters


def prune(runtime: Runtime, now: float) -> dict[str, Any]:
    """Apply retention everywhere, to evidence too, and sweep what killed processes left."""
    runtime.repository.sweep()
    deleted = backups.keep_within(runtime, None, None, now)
    return {"deleted": deleted, "evidence": keeping.prune(runtime, now)}


def scrub(runtime: Runtime, now: float) -> dict[str, Any]:
    """Read again the snapshots that were not proven for the longest time: see `backup_worker.maintenance.scrub`."""
    return scrubbing.run(runtime, now, every_s=EVERY_S["scrub"])


def drill(runtime: Runtime, now: float) -> dict[str, Any]:
    """Rehearse the restores that were not rehearsed for the longest time: see `backup_worker.maintenance.drill`."""
    return drills.scheduled(runtime, now, every_s=EVERY_S["drill"])


def trim(runtime: Runtime, now: float) -> dict[str, Any]:
    """Shorten the streams that the dispatcher reads, and the inbox; the message log is the EM's own."""
    older_than_s = runtime.config.schedule.limits.log_days * 86400
    changes.fold(runtime.redis)
    trimmed = {stream: streams.trim(runtime.redis, stream, older_than_s=older_than_s) for stream in STREAMS}
    return trimmed | {"changes": forgetting.forget(runtime.redis, approvals.rules(runtime.config, now), now)}


TASKS: dict[str, Callable[[Runtime, float], dict[str, Any]]] = {
    "deliver": deliver,
    "watch": watch,
    "prune": prune,
    "scrub": scrub,
    "drill": drill,
    "trim": trim,
    guard_rounds.TASK: guard_rounds.run,
    record_watch.TASK: record_watch.run,
    pings.TASK: pings.run,
    **notices.TASKS,
}
EVERY_S = {
    "deliver": 30.0,
    "watch": 60.0,
    "prune": 3600.0,
    "scrub": 600.0,
    "drill": 600.0,
    "trim": 3600.0,
    guard_rounds.TASK: 300.0,
    record_watch.TASK: record_watch.EVERY_S,
}
"""How often the scheduler asks for each task."""


def periods(config: Config) -> dict[str, float]:
    """Return how often the scheduler asks for each task under `config`, in seconds."""
    return {**EVERY_S, guard_rounds.TASK: config.schedule.approvals.scan_minutes * 60}
