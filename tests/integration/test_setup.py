"""doctor against a real server, and alerts on one: what fakes cannot show."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from backup_worker.alerts import Alert, acknowledge, deliver_due, open_alerts, raise_alert
from backup_worker.alerts.receivers import Sent
from backup_worker.config import Receiver
from backup_worker.discovery import starter
from backup_worker.doctor import Check, examine
from backup_worker.history import History
from em_bridge.connection import connect
from tests.integration.conftest import ValkeyServer
from tests.small_fleet import until


def server_checks(home: Path, url: str) -> dict[str, Check]:
    starter.write(home / "config", starter.contents(home / "config", [], "UTC"))
    now = float(connect(url).time()[0])
    return {one.check: one for one in examine(home / "config", url, now=now) if one.check.startswith("redis")}


def test_doctor_finds_nothing_wrong_with_a_durable_server(valkey: ValkeyServer, tmp_path: Path) -> None:
    assert {one.status for one in server_checks(tmp_path, valkey.url).values()} == {"ok"}


def test_doctor_sees_a_server_that_forgets(valkey: ValkeyServer, tmp_path: Path) -> None:
    client = valkey.client()
    client.config_set("appendonly", "no")
    client.config_set("maxmemory-policy", "allkeys-lru")
    found = server_checks(tmp_path, valkey.url)
    assert found["redis durability"].status == "fail"
    assert found["redis memory"].status == "fail"
    assert "allkeys-lru" in found["redis memory"].detail


def raise_many(url: str, count: int) -> None:
    client = connect(url)
    for number in range(count):
        raise_alert(client, Alert(f"key-{number % 5}", "critical", "t", "b"), now=float(number))


def deliver(url: str, path: Path) -> None:
    def send(url: str, title: str, body: str, severity: str) -> Sent:
        return Sent(True, url, "SUCCESS")

    deliver_due(connect(url), [Receiver(url="a://")], History(path), 100.0, send=send)


def test_alerts_raised_by_many_processes_at_once_are_all_counted_and_told_once(
    valkey: ValkeyServer, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    raisers = [context.Process(target=raise_many, args=(valkey.url, 25)) for _ in range(3)]
    for one in raisers:
        one.start()
    for one in raisers:
        one.join(60)
    client = valkey.client()
    assert [one.count for one in open_alerts(client)] == [15] * 5
    history = tmp_path / "history.jsonl"
    deliverers = [context.Process(target=deliver, args=(valkey.url, history)) for _ in range(3)]
    for one in deliverers:
        one.start()
    for one in deliverers:
        one.join(60)
    (line,) = History(history).read()
    assert sorted(line["keys"]) == [f"key-{number}" for number in range(5)]


def test_open_alerts_survive_a_killed_server(valkey: ValkeyServer) -> None:
    raise_alert(valkey.client(), Alert("k", "critical", "t", "b"), now=0)
    acknowledge(valkey.client(), "k", "kari", 1)
    # A busy disk holds up the writing of the append-only file, for as long as a sync of it lasts.
    until(lambda: valkey.client().info("persistence")["aof_buffer_length"] == 0)
    valkey.kill()
    valkey.restart()
    (one,) = open_alerts(valkey.client())
    assert one.acknowledged_by == "kari"
