"""A full queue: events wait on their stream, a human hears of it, and hears that it is over. On a real server."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis import Redis

from backup_worker import alerts
from backup_worker.dispatcher import Dispatcher
from backup_worker.maintenance import maintain
from backup_worker.runtime import Runtime
from backup_worker.status import overview
from em_bridge import clock, events, streams
from em_bridge.connection import connect
from tests.integration.conftest import ValkeyServer
from tests.integration.test_dispatcher import publish, unfinished
from tests.small_fleet import ON_CHANGE, SmallFleet

pytestmark = pytest.mark.valkey


def is_open(client: Redis) -> bool:
    return any(alert.key == "lag" for alert in alerts.open_alerts(client))


def test_events_that_wait_for_a_full_queue_reach_a_human_and_the_end_of_it_too(
    valkey: ValkeyServer, tmp_path: Path
) -> None:
    fleet = SmallFleet(tmp_path, tiers={"on-change": ON_CHANGE}, limits={"queue_jobs": 2})
    client = valkey.client()
    runtime = Runtime(fleet.config, client)
    one = Dispatcher(connect(valkey.url, retrying=False), limits=lambda: runtime.config.schedule.limits)
    one.prepare()
    client.sadd("rq:queues", "rq:queue:backup")
    client.rpush("rq:queue:backup", "stuck-1", "stuck-2", "stuck-3")
    changes: list[events.Event] = [events.ConfigApproved(f"c{number}", "kari") for number in range(5)]
    jobs = publish(client, changes)
    assert one.step(block_ms=1) == 0
    # It has not lasted long enough to wake anybody.
    maintain.watch(runtime, clock.now())
    assert not is_open(client)

    much_later = clock.now() + maintain.LAG_ALERT_S + 5
    maintain.watch(runtime, much_later)
    maintain.watch(runtime, much_later + 60)
    assert is_open(client)
    assert [row["key"] for row in fleet.history("alert")].count("lag") == 1, "told once"
    shown = overview(runtime, clock.now())
    assert shown["held"] == {streams.CONFIG_CHANGE: "backup"}
    assert unfinished(client) == 5, "nothing is lost meanwhile"

    client.delete("rq:queue:backup")
    while one.step(block_ms=1):
        pass
    assert [raw.decode() for raw in client.lrange("rq:queue:backup", 0, -1)] == jobs
    maintain.watch(runtime, clock.now())
    assert not is_open(client)
    assert "lag" in [row["key"] for row in fleet.history("alert-resolved")]
