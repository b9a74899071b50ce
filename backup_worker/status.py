"""Is everything as it should be? One answer for the command line, the console and the metrics.

Read-only. What Redis knows is left out, not guessed, while Redis is away; the answer is then not `ok`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from backup_worker import alerts, maintain, queues, schedule
from backup_worker.recovery.incident import IncidentStore
from backup_worker.runtime import Runtime
from em_bridge import streams

if TYPE_CHECKING:
    from redis import Redis

ALERT_KEYS = ("key", "severity", "title", "body", "agent", "opened_at", "acknowledged_by")


def overview(runtime: Runtime, now: float) -> dict[str, Any]:
    """Return newest good snapshots with their ages and limits, next runs, queues, lag, open incidents and alerts.

    `overdue` lists what is missing; `ok` is False if anything is, or if Redis cannot be reached.
    """
    config = runtime.config
    zone = config.schedule.timezone
    heads = runtime.repository.snapshots()
    newest: dict[tuple[str, str], Any] = {}
    for head in heads:
        if head.is_good:
            newest[head.agent, head.tier] = head
    overdue = maintain.missing_backups(runtime, now)
    agents = []
    for agent in config.agents:
        tiers = {}
        for name in config.schedule.tiers:
            good = newest.get((agent, name))
            late = overdue.get((name, agent))
            tiers[name] = {
                "newest_good": good.id if good else None,
                "age_s": now - good.created_at if good else None,
                "overdue": late.slot if late else None,
            }
        agents.append({"agent": agent, "tiers": tiers})
    result: dict[str, Any] = {
        "at": now,
        "agents": agents,
        "next_runs": {
            name: schedule.next_run(tier, zone, now) if tier.cron else None
            for name, tier in config.schedule.tiers.items()
        },
        "overdue": sorted(f"{tier}/{late.slot}/{agent}" for (tier, agent), late in overdue.items()),
        "redis": runtime.client is not None,
        "queues": None,
        "lag_s": None,
        "dead_letters": None,
        "incidents": None,
        "alerts": None,
    }
    if runtime.client is not None:
        result |= _live(runtime, now)
    result["ok"] = not result["overdue"] and result["redis"]
    return result


def _live(runtime: Runtime, now: float) -> dict[str, Any]:
    client = runtime.redis
    store = IncidentStore(client)
    return {
        "queues": {name: queues.open_queue(name, client).count for name in queues.QUEUES},
        "lag_s": maintain.oldest_waiting(runtime, now),
        "dead_letters": int(client.xlen(streams.DEAD_LETTER)),
        "incidents": [store.get(incident_id).summary() for incident_id in store.open_ids().values()],
        "alerts": open_alerts(client),
    }


def open_alerts(client: Redis) -> list[dict[str, Any]]:
    """Return the alerts that are not resolved, with the keys `ALERT_KEYS`."""
    return [
        {key: getattr(alert, key) for key in ALERT_KEYS}
        for alert in alerts.open_alerts(client)
        if alert.resolved_at is None
    ]
