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
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from backup_worker import alerts
from backup_worker.console import fleet, traffic
from backup_worker.console.live import View, view


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
        counted = Counter((head.tier, fleet.status_of(head)) for head in self.view.heads)
        yield _gauge(
            "snapshots", "Snapshots by tier and status.", ["tier", "status"],
            [([tier, status], count) for (tier, status), count in sorted(counted.items())],
        )  # fmt: skip
        yield _gauge(
            "next_run_timestamp_seconds", "When a tier is due next.", ["tier"],
            [([tier], at) for tier, _, at in now.runs if at is not None],
        )  # fmt: skip

    def _redis(self, now: fleet.Fleet) -> Iterator[Metric]:
        yield _gauge(
            "agent_state", "1 for the state that an agent is in.", ["agent", "state"],
            [([card.name, card.state], 1) for card in now.cards],
        )  # fmt: skip
        open_incidents = [([card.name], 1 if card.incident else 0) for card in now.cards]
        yield _gauge(
            "open_incidents", "Whether a recovery of the agent is going on.", ["agent"], open_incidents
        )
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
        found = self.view.known(traffic.look, [])
        yield _gauge(
            "stream_entries", "Length of a stream.", ["stream"], [([one.name], one.length) for one in found]
        )
        groups = [(one.name, group) for one in found for group in one.groups]
        yield _gauge(
            "stream_lag_entries", "Entries that a group was not given yet.", ["stream", "group"],
            [([stream, group.name], group.lag) for stream, group in groups if group.lag is not None],
        )  # fmt: skip
        yield _gauge(
            "stream_pending_entries", "Entries that a group was given and has not finished.", ["stream", "group"],
            [([stream, group.name], group.pending) for stream, group in groups],
        )  # fmt: skip


def _gauge(name: str, text: str, labels: list[str], samples: list[Any]) -> Metric:
    family = GaugeMetricFamily(f"agent_backup_{name}", text, labels=labels)
    for values, number in samples:
        family.add_metric(values, float(number))
    return family
