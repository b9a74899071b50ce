"""Parts with nothing to do ask for little: what idles on every machine is paid for on every machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backup_worker.approval import changes
from backup_worker.config import ConfigWatch
from backup_worker.dispatcher import Dispatcher
from backup_worker.queueing import due
from backup_worker.running.services import Scheduler
from backup_worker.worker import make_worker
from em_bridge import streams
from em_bridge.connection import connect
from em_bridge.events import ConfigApplied
from tests.integration.conftest import ValkeyServer
from tests.small_fleet import SmallFleet

pytestmark = pytest.mark.valkey


def calls(client: Any) -> int:
    return sum(row["calls"] for row in client.info("commandstats").values())


def test_an_idle_scheduler_announces_each_round_once_and_then_hardly_asks(
    valkey: ValkeyServer, tmp_path: Path
) -> None:
    client = valkey.client()
    scheduler = Scheduler(connect(valkey.url), ConfigWatch(SmallFleet(tmp_path).config_dir))
    scheduler.step()
    announced = client.xlen(due.STREAM)
    assert announced > 0
    before = calls(client)
    for _ in range(10):
        scheduler.step()
    # A round of maintenance may begin meanwhile.
    assert calls(client) - before < 60
    assert client.xlen(due.STREAM) <= announced + 4


def test_a_change_that_was_taken_in_is_asked_for_in_three_commands(valkey: ValkeyServer) -> None:
    client = valkey.client()
    streams.append(client, ConfigApplied("c1", "z", ("weights.json",), "em", "kari"))
    assert changes.get(client, "c1").agent == "z"
    before = calls(client)
    assert changes.get(client, "c1").agent == "z"
    # One of what was asked for is the statistics themselves.
    assert calls(client) - before <= 3 + 1


def test_an_idle_dispatcher_asks_four_things_a_second(valkey: ValkeyServer) -> None:
    client = valkey.client()
    one = Dispatcher(connect(valkey.url, retrying=False))
    one.prepare()
    one.step(block_ms=1)
    before = calls(client)
    for _ in range(10):
        one.step(block_ms=1)
    # The lengths of three queues and one reading each; claims come once a second.
    assert calls(client) - before <= 10 * 4 + 8


def test_an_idle_worker_asks_four_things_between_two_cleanings(valkey: ValkeyServer) -> None:
    client = valkey.client()
    one = make_worker("backup", client, lambda job, error: None)
    one.run_maintenance_tasks()
    before = calls(client)
    for _ in range(10):
        one.run_maintenance_tasks()
    # The lock and its release, what runs and has expired, what lies between queue and worker.
    assert calls(client) - before <= 10 * 4 + 1
