"""What humans are told by the clock: the daily digest, and the monthly test page that proves the way to them.

Each is announced once by any number of schedulers, at the times and in the zone of the configuration; one that was
missed while everything was down is made up for once. They travel as alerts, so one that does not arrive is tried again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final
from zoneinfo import ZoneInfo

from backup_worker import schedule
from backup_worker.alerts import delivery
from backup_worker.alerts.receivers import send_with_apprise
from backup_worker.config import SEVERITIES, Schedule
from backup_worker.maintenance import digest as digests
from backup_worker.maintenance import space
from backup_worker.queueing.due import MaintenanceDue
from backup_worker.recovery.incident import IncidentStore
from backup_worker.runtime import Runtime
from backup_worker.status import overview
from em_bridge import streams

if TYPE_CHECKING:
    from redis import Redis

LAST: Final = "backup:notices"
"""Redis hash: task -> the fire time that was announced last, Unix seconds."""

DAY_S: Final = 86400.0
ONCE_TTL_S: Final = 7 * DAY_S
DIGEST, TEST_PAGE = "digest", "test-page"

TEST_TITLE: Final = "this is a test of the alerts of Agent Backup"
TEST_BODY: Final = "That you read it proves this way to you. Nothing is wrong, and nothing needs to be done."


def announce(client: Redis, schedule_: Schedule, now: float) -> list[str]:
    """Put the notices that are due on the stream; return their tasks. On a new server, each waits for its next time."""
    announced = []
    for task, cron in _times(schedule_).items():
        if cron is None:
            continue
        fire_at = schedule.previous_fire(cron, schedule_.timezone, now)
        last: Any = client.hget(LAST, task)
        if last is None:
            client.hsetnx(LAST, task, fire_at)
        elif fire_at > float(last):
            once = f"notice/{task}/{fire_at:.0f}"
            streams.append_once(client, MaintenanceDue(task), once=once, ttl_s=ONCE_TTL_S)
            client.hset(LAST, task, fire_at)
            announced.append(task)
    return announced


def send_digest(runtime: Runtime, now: float) -> dict[str, Any]:
    """Send the digest."""
    schedule_ = runtime.config.schedule
    since = now - DAY_S
    summaries = (one.summary() for one in IncidentStore(runtime.redis).all())
    recent = [one for one in summaries if max(one["opened_at"], one["closed_at"] or 0.0) > since]
    recent.sort(key=lambda one: one["opened_at"])
    facts = overview(runtime, now)
    free = space.free_bytes(schedule_.repository)
    title, body = digests.compose(facts, recent, free, since, schedule_.timezone)
    runtime.alert(f"digest/{_day(now, schedule_.timezone)}", "info", title, body)
    return {"title": title}


def send_test_page(runtime: Runtime, now: float) -> dict[str, Any]:
    """Send a test page to every receiver, whatever severities it takes."""
    runtime.alert(f"test/{_day(now, runtime.config.schedule.timezone)}", "info", TEST_TITLE, TEST_BODY)
    return {"receivers": len(runtime.config.schedule.alerts)}


def try_receivers(
    runtime: Runtime, now: float, *, send: delivery.Send = send_with_apprise
) -> list[dict[str, Any]]:
    """Send a test page to every receiver at once, without Redis; return, and record, what came of each."""
    rows = []
    for receiver in runtime.config.schedule.alerts:
        sent = delivery.send_one(send, receiver.url, f"[test] {TEST_TITLE}", TEST_BODY, "info")
        severities = [severity for severity in SEVERITIES if receiver.takes(severity)]
        rows.append(
            {"receiver": sent.receiver, "ok": sent.told, "detail": sent.detail, "severities": severities}
        )
    told = [row["receiver"] for row in rows if row["ok"]]
    failed = [f"{row['receiver']}: {row['detail']}" for row in rows if not row["ok"]]
    runtime.record("alert-delivery", keys=["test"], state="open", title=TEST_TITLE, told=told, failed=failed)
    return rows


TASKS: Mapping[str, Callable[[Runtime, float], dict[str, Any]]] = {
    DIGEST: send_digest,
    TEST_PAGE: send_test_page,
}
"""The maintenance tasks of this module, by their names."""


def _times(schedule_: Schedule) -> dict[str, str | None]:
    return {DIGEST: schedule_.paging.digest, TEST_PAGE: schedule_.paging.test}


def _day(now: float, zone: str) -> str:
    return datetime.fromtimestamp(now, ZoneInfo(zone)).strftime("%Y-%m-%d-%H%M")
