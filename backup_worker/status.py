"""Is everything as it should be? One answer for the command line, the console and the metrics.

Read-only. What Redis knows is left out, not guessed, while Redis is away; the answer is then not `ok`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError

from backup_worker import alerts, schedule
from backup_worker.alerts.receivers import scheme_of
from backup_worker.config import SEVERITIES
from backup_worker.maintenance import drill, lookout, scrub
from backup_worker.queueing import backpressure
from backup_worker.recovery import breakers
from backup_worker.recovery.incident import IncidentStore
from backup_worker.restoring import proofs
from backup_worker.runtime import Runtime
from backup_worker.snapshots import Head, newest
from em_bridge import streams
from em_bridge.monitor import read_states

if TYPE_CHECKING:
    from redis import Redis

ALERT_KEYS = (
    "key", "severity", "title", "body", "agent", "opened_at", "count", "told_at", "last_failure", "acknowledged_at",
    "acknowledged_by",
)  # fmt: skip


def overview(runtime: Runtime, now: float) -> dict[str, Any]:
    """Return newest good snapshots with their ages and limits, next runs, queues, lag, memory, incidents and alerts.

    `held` says of each stream that is not read for now which queue is full. `overdue` lists what is missing, `stale`
    what has had two runs without a good snapshot; `ok` is False if anything is, or if Redis cannot be reached.
    """
    config = runtime.config
    zone = config.schedule.timezone
    heads = runtime.repository.snapshots()
    overdue = lookout.missing_backups(runtime, now, heads)
    stale = lookout.stale_backups(config, heads, now)
    undrilled = drill.overdue(config, runtime.repository, heads, now)
    result: dict[str, Any] = {
        "at": now,
        "agents": _agents(runtime, heads, overdue, stale, undrilled, now),
        "next_runs": {
            name: schedule.next_run(tier, zone, now) if tier.cron else None
            for name, tier in config.schedule.tiers.items()
        },
        "overdue": sorted(f"{tier}/{late.slot}/{agent}" for (tier, agent), late in overdue.items()),
        "stale": sorted(f"{tier}/{agent}" for tier, agent in stale),
        "drills_overdue": sorted(undrilled),
        "scrub": _scrubbed(runtime, heads, now),
        "redis": runtime.client is not None,
        "queues": None,
        "held": None,
        "lag_s": None,
        "memory": None,
        "dead_letters": None,
        "recovery_paused": None,
        "incidents": None,
        "alerts": None,
        "receivers": None,
    }
    if runtime.client is not None:
        result |= _live(runtime, now)
    still = result["redis"] and result["recovery_paused"] is None
    result["ok"] = still and not is_late(result) and not result["scrub"]["damaged"]
    return result


def is_late(facts: dict[str, Any]) -> bool:
    """Tell whether a backup, the proof of a restore or a verification is overdue in what `overview` returned."""
    return bool(facts["overdue"] or facts["stale"] or facts["drills_overdue"] or facts["scrub"]["overdue"])


def _agents(
    runtime: Runtime,
    heads: Sequence[Head],
    overdue: Mapping[tuple[str, str], schedule.Due],
    stale: Collection[tuple[str, str]],
    undrilled: Collection[str],
    now: float,
) -> list[dict[str, Any]]:
    """Return each agent with how it is judged, its newest good snapshot in each tier, and its last drill."""
    newest_good = newest(head for head in heads if head.is_good)
    states = read_states(runtime.client) if runtime.client is not None else {}
    agents = []
    for agent in runtime.config.agents:
        tiers = {}
        for name in runtime.config.schedule.tiers:
            good = newest_good.get((name, agent))
            late = overdue.get((name, agent))
            tiers[name] = {
                "newest_good": good.id if good else None,
                "age_s": now - good.created_at if good else None,
                "overdue": late.slot if late else None,
                "stale": (name, agent) in stale,
            }
        drilled = _drilled(runtime, agent, now) | {"overdue": agent in undrilled}
        state = states.get(agent.lower(), {}).get("state")
        agents.append({"agent": agent, "state": state, "tiers": tiers, "drill": drilled})
    return agents


def _drilled(runtime: Runtime, agent: str, now: float) -> dict[str, Any]:
    """Return when a restore of `agent` was last proven, from which state, and whether the last drill succeeded."""
    note = proofs.note_of(runtime.repository, agent)
    proven_at = note.proven_at if note else None
    return {
        "proven_at": proven_at,
        "age_s": now - proven_at if proven_at is not None else None,
        "from": note.proven_from if note else None,
        "last_ok": note.ok if note else None,
    }


def _scrubbed(runtime: Runtime, heads: Sequence[Head], now: float) -> dict[str, Any]:
    """Return how old the oldest verification is, how many are overdue, and which snapshots are damaged."""
    sound = [head.verified_at or head.created_at for head in heads if not head.damaged]
    readable = {head.id for head in heads}
    broken = [identifier for identifier in runtime.repository.ids() if identifier not in readable]
    return {
        "snapshots": len(heads),
        "oldest_verified_at": min(sound, default=None),
        "oldest_age_s": now - min(sound) if sound else None,
        "overdue": len(scrub.overdue(runtime, heads, now)),
        "damaged": [head.id for head in heads if head.damaged] + broken,
    }


def _live(runtime: Runtime, now: float) -> dict[str, Any]:
    client = runtime.redis
    waiting = backpressure.lengths(client)
    pause = breakers.paused(client, now)
    return {
        "recovery_paused": pause.as_json() if pause is not None else None,
        "queues": waiting,
        "held": backpressure.held(waiting, runtime.config.schedule.limits.queue_jobs),
        "lag_s": lookout.oldest_waiting(runtime, now),
        "memory": _memory(client),
        "dead_letters": int(client.xlen(streams.DEAD_LETTER)),
        "incidents": [one.summary() for one in IncidentStore(client).open_incidents()],
        "alerts": open_alerts(client, now),
        "receivers": receivers(runtime),
    }


def _memory(client: Redis) -> dict[str, int] | None:
    """Return what the server uses, and its limit (0: none); None if we may not ask."""
    try:
        info: Any = client.info("memory")
    except ResponseError:
        return None
    return {"used_bytes": int(info["used_memory"]), "limit_bytes": int(info["maxmemory"])}


def open_alerts(client: Redis, now: float) -> list[dict[str, Any]]:
    """Return the alerts that are not resolved: `ALERT_KEYS`, the command to look, and the id of a silence over it."""
    silences = alerts.silences.active(client, now)
    rows = []
    for alert in alerts.open_alerts(client):
        silent = next((one.id for one in silences if one.covers(alert, now)), None)
        kind = alerts.kinds.of(alert.key)
        row = {key: getattr(alert, key) for key in ALERT_KEYS}
        rows.append(
            row | {"kind": kind.name, "look": kind.command(alert.key, alert.agent), "silenced_by": silent}
        )
    return rows


def receivers(runtime: Runtime) -> list[dict[str, Any]]:
    """Return each receiver of alerts without its secrets, what it takes, and whether it could be reached.

    One that was never sent to has `told_at` None and no `failures`.
    """
    states = alerts.receiver_states(runtime.redis)
    rows = []
    for receiver in runtime.config.schedule.alerts:
        state = states.get(alerts.id_of(receiver), alerts.ReceiverState())
        rows.append(
            {
                "receiver": state.shown or scheme_of(receiver.url),
                "severities": [severity for severity in SEVERITIES if receiver.takes(severity)],
                "told_at": state.told_at,
                "failures": state.failures,
                "last_failure": state.last_failure,
                "retry_at": state.retry_at or None,
            }
        )
    return rows
