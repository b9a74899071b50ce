"""The only functions that a worker runs. Each takes one map of plain values and may safely run twice.

They hold no rules of their own: they fetch what belongs together and call the engine, the inbox or the recovery.
An error that leaves a job is judged by `worker.FailurePolicy`; what ends in failure is recorded and alerted by
`report_failure`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rq import get_current_job
from rq.job import Job

from backup_worker import backups, slots
from backup_worker.alerts import refused_urls
from backup_worker.approval import change_events, changes
from backup_worker.config import ConfigWatch
from backup_worker.maintenance import maintain
from backup_worker.queueing import hosts
from backup_worker.queueing.queues import ForeignJob
from backup_worker.recovery.incident import IncidentStore
from backup_worker.recovery.service import RecoveryService
from backup_worker.restoring.orders import Order, carry_out, preview
from backup_worker.runtime import Runtime
from em_bridge import clock, events, streams
from em_bridge.errors import AgentBackupError, NotFound

_WORK_NAMED_BY = {
    "maintenance": "task", "incident": "incident", "config_change": "entry", "agent_state": "agent",
}  # fmt: skip
"""Which of its arguments says what a job works on, where another job may do the same work."""
_LONGEST_NAME = 100

_watch: ConfigWatch | None = None
"""The configuration, read by the worker before it forks: a job only looks whether it has changed."""


def prepare(config_dir: Path) -> ConfigWatch:
    """Read the configuration for the jobs of this process and its children; raises ConfigError."""
    global _watch
    _watch = ConfigWatch(config_dir, check_alerts=refused_urls)
    return _watch


def _runtime(job: Job | None = None) -> Runtime:
    current = job or get_current_job()
    if _watch is None or current is None:
        raise AgentBackupError("a job function was called outside of a worker")
    _watch.refresh()
    return Runtime(_watch.current, current.connection, os.environ.get("REDIS_URL", ""))


def _passed_on(runtime: Runtime, agent: str | None) -> dict[str, Any] | None:
    """Send the running job to the host of `agent` if it is not here; return the job's result then."""
    job = get_current_job()
    assert job is not None
    queue = hosts.pass_on(runtime.redis, job, agent, hosts.hosts_of(runtime.config))
    return {"passed_on_to": queue} if queue else None


def backup(args: dict[str, Any]) -> dict[str, Any]:
    """Make a scheduled snapshot: `tier`, `slot`, `agent`. The slot is made once."""
    runtime = _runtime()
    agent, tier, slot = args["agent"], args["tier"], args["slot"]
    if passed_on := _passed_on(runtime, agent):
        return passed_on
    snapshot = backups.scheduled(runtime, agent, tier, slot, now=clock.now())
    slots.made(runtime.redis, tier, slot, agent)
    return {"snapshot": snapshot.id, "status": snapshot.status}


def config_change(args: dict[str, Any]) -> dict[str, Any]:
    """Take in a change event (`entry`, `type`): record it, and make the snapshots that its type asks for."""
    runtime = _runtime()
    entry = args["entry"]
    rows: Any = runtime.redis.xrange(streams.CONFIG_CHANGE, entry, entry)
    if not rows:
        raise NotFound(f"the event {entry} is no longer on “{streams.CONFIG_CHANGE}”")
    event = events.decode(rows[0][1], stream=streams.CONFIG_CHANGE)
    if not isinstance(event, changes.ConfigChange):
        raise AgentBackupError(f"the event {entry} is no config change but “{event.type}”")
    agent = getattr(event, "agent", None) or changes.get(runtime.redis, event.change).agent
    if passed_on := _passed_on(runtime, runtime.config.id_of(agent)):
        return passed_on
    snapshots = change_events.handle(runtime, event, entry, now=clock.now())
    runtime.resolve(_failure_key("config_change", args))
    return {"snapshots": [snapshot.id for snapshot in snapshots]}


def agent_state(args: dict[str, Any]) -> dict[str, Any]:
    """Record an agent's state (`agent`, `state`, `reason`, `at`); a DEAD one is recovered."""
    runtime = _runtime()
    agent = runtime.config.id_of(args["agent"])
    if passed_on := _passed_on(runtime, agent):
        return passed_on
    incident = RecoveryService(runtime).on_state(agent, args["state"], args["reason"], args["at"])
    runtime.resolve(_failure_key("agent_state", args))
    return {"incident": incident}


def incident(args: dict[str, Any]) -> dict[str, Any]:
    """Advance the incident `incident` as far as it goes now."""
    runtime = _runtime()
    if passed_on := _passed_on(runtime, IncidentStore(runtime.redis).get(args["incident"]).agent):
        return passed_on
    advanced = RecoveryService(runtime).advance(args["incident"])
    runtime.resolve(_failure_key("incident", args))
    return {"incident": advanced.id, "state": advanced.state, "phase": advanced.phase}


def restore(args: dict[str, Any]) -> dict[str, Any]:
    """Say what a restore of `agent` from the snapshot `from` would do; with a `mark` of what was said, do it.

    `paths` restrict it; `by` and `reason` go on the record; after `until` it is not done. A failure is a result, which
    whoever asked looks at.
    """
    runtime, order = _runtime(), Order.of_args(args)
    if passed_on := _passed_on(runtime, order.agent):
        return passed_on
    if not (mark := args.get("mark")):
        return preview(runtime, order).as_result()
    return carry_out(runtime, order, mark, by=args["by"], reason=args["reason"], until=args["until"])


def maintenance(args: dict[str, Any]) -> dict[str, Any]:
    """Run the maintenance task `task`, or the part of it that `host` has: see `backup_worker.maintenance.maintain`."""
    runtime = _runtime()
    result = maintain.run(runtime, args["task"], now=clock.now(), host=args.get("host"))
    runtime.resolve(_failure_key("maintenance", args))
    return result


def report_failure(job: Job, error: BaseException) -> None:
    """Put a job that failed for good on the record, and tell a human."""
    runtime = _runtime(job)
    name, facts, given = "?", {}, {}
    try:
        name = (job.func_name or "?").rpartition(".")[2]
        # Only what is text: anybody may have written this job.
        given = job.args[0] if job.args and isinstance(job.args[0], dict) else {}
        facts = {key: given[key] for key in ("agent", "tier") if isinstance(given.get(key), str)}
    except ForeignJob as foreign:
        error = foreign
    agent, tier = facts.get("agent"), facts.get("tier")
    why = str(error) or type(error).__name__
    is_backup = name == "backup" and agent and tier
    if is_backup:
        why += _try_slot_again(runtime, given)
    kind = "backup-failed" if is_backup else "job-failed"
    runtime.record(kind, job=job.id, function=name, agent=agent, tier=tier, error=why)
    if is_backup:
        runtime.alert(
            f"failed/{tier}/{agent}", "critical", f"{tier} backup of {agent} failed", why, agent=agent
        )
    else:
        key = _failure_key(name, given) or f"job/{job.id}"
        runtime.alert(key, "critical", f"job {job.id} failed", why, agent=agent)


def _failure_key(name: str, args: dict[str, Any]) -> str:
    """Return the key of the alert that this work failed, the same for each of its jobs; empty if it is not known.

    What comes round again has one alert, not one with each try, and its next success closes it.
    """
    what = args.get(_WORK_NAMED_BY.get(name, ""))
    return f"job/{name}/{what}" if isinstance(what, str) and len(what) <= _LONGEST_NAME else ""


def _try_slot_again(runtime: Runtime, given: dict[str, Any]) -> str:
    """Have the slot of a failed backup tried again, if it is one of ours; return what to say about that."""
    tier, slot, agent = (given.get(key) for key in ("tier", "slot", "agent"))
    attempt = given.get("attempt", 0)
    known = agent in runtime.config.agents and tier in runtime.config.schedule.tiers
    if not known or not isinstance(slot, str) or type(attempt) is not int or attempt < 0:
        return ""
    pause_s = slots.failed(runtime.redis, str(tier), slot, str(agent), attempt=attempt, now=clock.now())
    if pause_s is None:
        return "; it is not tried again before its next slot"
    return f"; it is tried again in {pause_s / 60:.0f} minutes"
