"""/metrics for Prometheus and /healthz for whoever restarts things.

Numbers that only Redis knows are left out while it is away, and `agent_backup_redis_up` is 0: a graph with a gap is
honest, one with zeroes is not. /healthz needs no login, says nothing but a word, and is 503 while Redis is away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from flask import Flask, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from backup_worker import alerts, timings
from backup_worker.console import fleet
from backup_worker.console.live import View, view
from backup_worker.recovery.incident import ESCALATED, RECOVERED, IncidentStore
from backup_worker.restoring import proofs
from em_bridge import streams
from em_bridge.lag import measure


def mount(app: Flask) -> None:
    """Add the two addresses to `app`."""
    app.add_url_rule("/metrics", "metrics", metrics)
    app.add_url_rule("/healthz", "healthz", healthz)


def healthz() -> tuple[dict[str, str], int]:
    """Tell whether the console can do its work."""
    away = view().redis_problem is not None
    return {"status": "redis is away" if away else "ok"}, 503 if away else 200


def metrics() -> Response:
    """Return everything as Prometheus reads it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Numbers(view()))
    return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)


class _Numbers(Collector):
    """What is known in one request."""

    def __init__(self, here: View) -> None:
        self.view = here

    def collect(self) -> Iterator[Metric]:
        """Yield each number with its labels."""
        now = fleet.look(self.view)
        yield from self._backups(now)
        up = 0 if self.view.redis_problem else 1
        yield _gauge("redis_up", "Whether the console reaches Redis.", [], [([], up)])
        broken = 1 if self.view.config_problem else 0
        yield _gauge(
            "config_broken", "Whether the newest edit of the configuration is refused.", [], [([], broken)]
        )
        if self.view.redis_problem is None:
            yield from self._redis(now)

    def _backups(self, now: fleet.Fleet) -> Iterator[Metric]:
        cells = [(card.name, cell) for card in now.cards for cell in card.tiers]
        yield _gauge(
            "age_seconds", "Age of the newest good snapshot.", ["agent", "tier"],
            [([agent, cell.tier], cell.age_s) for agent, cell in cells if cell.age_s is not None],
        )  # fmt: skip
        yield _gauge(
            "overdue", "Whether a scheduled snapshot is missing beyond the limit.", ["agent", "tier"],
            [([agent, cell.tier], 1 if cell.overdue else 0) for agent, cell in cells],
        )  # fmt: skip
        yield _gauge(
            "failing", "Whether the last backup failed.", ["agent", "tier"],
            [([agent, cell.tier], 1 if cell.failing else 0) for agent, cell in cells],
        )  # fmt: skip
        good = [(agent, cell.tier, cell.good) for agent, cell in cells if cell.good is not None]
        yield _gauge(
            "bytes", "Size of the newest good snapshot.", ["agent", "tier"],
            [([agent, tier], head.bytes) for agent, tier, head in good],
        )  # fmt: skip
        yield _gauge(
            "files", "Files in the newest good snapshot.", ["agent", "tier"],
            [([agent, tier], head.files) for agent, tier, head in good],
        )  # fmt: skip
        limits = {cell.tier: cell.limit_s for _, cell in cells if cell.limit_s}
        yield _gauge(
            "age_limit_seconds", "Age at which a snapshot is overdue.", ["tier"],
            [([tier], limit) for tier, limit in limits.items()],
        )  # fmt: skip
        yield from self._proofs(now)
        counted = Counter((head.tier, fleet.status_of(head)) for head in self.view.heads)
        yield _gauge(
            "snapshots", "Snapshots by tier and status.", ["tier", "status"],
            [([tier, status], count) for (tier, status), count in sorted(counted.items())],
        )  # fmt: skip
        yield _gauge(
            "next_run_timestamp_seconds", "When a tier is due next.", ["tier"],
            [([tier], at) for tier, _, at in now.runs if at is not None],
        )  # fmt: skip

    def _proofs(self, now: fleet.Fleet) -> Iterator[Metric]:
        notes = [(card.name, proofs.note_of(self.view.runtime.repository, card.name)) for card in now.cards]
        proven = [([name], self.view.now - note.proven_at) for name, note in notes if note and note.proven_at]
        yield _gauge("restore_proven_age_seconds", "Time since a restore was last proven.", ["agent"], proven)
        failed = [([name], 0 if note.ok else 1) for name, note in notes if note]
        yield _gauge("restore_drill_failed", "Whether the last drill failed.", ["agent"], failed)

    def _recoveries(self) -> Iterator[Metric]:
        found = self.view.known(lambda client: list(IncidentStore(client).all()), [])
        counted = Counter(one.state for one in found)
        yield _counter(
            "recoveries", "Recoveries by how they ended.", ["state"],
            [([state], counted[state]) for state in (RECOVERED, ESCALATED)],
        )  # fmt: skip
        newest: dict[str, float] = {}
        for one in found:
            if one.closed_at is not None:
                newest.setdefault(one.agent, one.closed_at - one.opened_at)
        yield _gauge(
            "recovery_seconds", "How long the last recovery took.", ["agent"],
            [([agent], took) for agent, took in sorted(newest.items())],
        )  # fmt: skip
        paused = 1 if self.view.pause else 0
        yield _gauge("recovery_paused", "Whether all recoveries are held.", [], [([], paused)])

    def _redis(self, now: fleet.Fleet) -> Iterator[Metric]:
        yield _gauge(
            "agent_state", "1 for the state that an agent is in.", ["agent", "state"],
            [([card.name, card.state], 1) for card in now.cards],
        )  # fmt: skip
        open_incidents = [([card.name], 1 if card.incident else 0) for card in now.cards]
        yield _gauge(
            "open_incidents", "Whether a recovery of the agent is going on.", ["agent"], open_incidents
        )
        yield from self._recoveries()
        took = self.view.known(timings.last, {})
        yield _gauge(
            "duration_seconds", "How long the last backup took.", ["agent", "tier"],
            [([agent, tier], seconds) for (agent, tier), seconds in sorted(took.items())],
        )  # fmt: skip
        if now.dead_letters is not None:
            yield _gauge("dead_letters", "Events that could not be handled.", [], [([], now.dead_letters)])
        by_severity = Counter(alert.severity for alert in self.view.known(alerts.open_alerts, []))
        yield _gauge(
            "open_alerts", "Open alerts.", ["severity"],
            [([severity], by_severity[severity]) for severity in ("info", "warning", "critical")],
        )  # fmt: skip
        yield _gauge(
            "queue_jobs", "Jobs that wait.", ["queue"], [([name], n) for name, n in now.waiting.items()]
        )
        if now.lag_s is not None:
            yield _gauge(
                "oldest_event_seconds", "How long the oldest event waits for a job.", [], [([], now.lag_s)]
            )
        yield from self._streams()

    def _streams(self) -> Iterator[Metric]:
        found = self.view.known(measure, {"streams": [], "inboxes": []})
        rows = [*found["streams"], *map(_as_stream, found["inboxes"])]
        yield _gauge(
            "stream_entries",
            "Length of a stream.",
            ["stream"],
            [([row["stream"]], row["length"]) for row in rows],
        )
        groups = [(row["stream"], group) for row in rows for group in row["groups"]]
        yield _gauge(
            "stream_lag_entries", "Entries that a group was not given yet.", ["stream", "group"],
            [([stream, group["group"]], group["unread"]) for stream, group in groups if group["unread"] is not None],
        )  # fmt: skip
        yield _gauge(
            "stream_pending_entries", "Entries that a group was given and has not finished.", ["stream", "group"],
            [([stream, group["group"]], group["pending"]) for stream, group in groups],
        )  # fmt: skip


def _as_stream(inbox: dict[str, Any]) -> dict[str, Any]:
    return {"stream": streams.inbox(inbox["agent"]), "length": inbox["length"],
            "groups": [inbox | {"group": streams.INBOX_GROUP}]}  # fmt: skip


def _counter(name: str, text: str, labels: list[str], samples: list[Any]) -> Metric:
    family = CounterMetricFamily(f"agent_backup_{name}", text, labels=labels)
    for values, number in samples:
        family.add_metric(values, float(number))
    return family


def _gauge(name: str, text: str, labels: list[str], samples: list[Any]) -> Metric:
    family = GaugeMetricFamily(f"agent_backup_{name}", text, labels=labels)
    for values, number in samples:
        family.add_metric(values, float(number))
    return family
