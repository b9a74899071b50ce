"""The digest, the test page, and the pings outward: when they come, and what they say."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakeredis
import pytest

from backup_worker import alerts, backups
from backup_worker.maintenance import digest, maintain, notices, pings
from backup_worker.maintenance.pings import Ping, State
from backup_worker.queueing import due
from backup_worker.runtime import Runtime
from em_bridge import clock, events, streams
from tests.receivers import Phone, WebHook
from tests.small_fleet import SmallFleet

SEVEN = 1795417200.0  # 2026-11-23 07:00 UTC, when the daily tier fires
HOUR = 3600.0
DAY = 86400.0


@pytest.fixture
def client() -> Any:
    return fakeredis.FakeRedis()


@pytest.fixture
def fleet(tmp_path: Path) -> SmallFleet:
    return SmallFleet(tmp_path, ("z", "jay"), limits={"overdue_minutes": 60, "reserve_bytes": 0})


@pytest.fixture
def runtime(fleet: SmallFleet, client: Any) -> Runtime:
    return fleet.runtime(client)


@pytest.fixture
def switch(fleet: SmallFleet) -> Iterator[WebHook]:
    with WebHook() as server:
        url = f"http://{server.place}/s3cret"
        fleet.edit("backup_schedule.json", lambda document: document["tiers"]["daily"].update(ping=url))
        yield server


def at(monkeypatch: pytest.MonkeyPatch, now: float) -> float:
    monkeypatch.setattr(clock, "now", lambda: now)
    return now


def tasks(client: Any) -> list[str]:
    rows = streams.read_range(client, due.STREAM)
    return [event.task for _, row in rows if isinstance(event := events.decode(row), due.MaintenanceDue)]


# -- by the clock ---------------------------------------------------------------------------------------------


def test_the_digest_and_the_test_page_come_at_their_times_in_the_configured_zone(
    fleet: SmallFleet, client: Any
) -> None:
    fleet.edit("backup_schedule.json", lambda document: document.update(timezone="Europe/Oslo"))
    schedule = fleet.config.schedule
    # In Oslo it is an hour later: the digest of 08:00 comes at 07:00 UTC. The first look only takes note.
    assert notices.announce(client, schedule, SEVEN - HOUR) == []
    assert notices.announce(client, schedule, SEVEN - 1) == []
    assert notices.announce(client, schedule, SEVEN) == ["digest"]
    assert notices.announce(client, schedule, SEVEN + 1) == []
    first_of_december = SEVEN + 8 * DAY + HOUR
    assert notices.announce(client, schedule, first_of_december) == ["digest", "test-page"]
    assert tasks(client) == ["digest", "digest", "test-page"]


def test_what_was_missed_while_everything_was_down_is_made_up_for_once(
    fleet: SmallFleet, client: Any
) -> None:
    schedule = fleet.config.schedule
    notices.announce(client, schedule, SEVEN)
    assert notices.announce(client, schedule, SEVEN + 5 * DAY) == ["digest"]
    assert notices.announce(client, schedule, SEVEN + 5 * DAY + 60) == []


def test_many_schedulers_announce_each_once_and_none_announces_what_is_switched_off(
    fleet: SmallFleet, client: Any
) -> None:
    fleet.edit("backup_schedule.json", lambda document: document.update(paging={"test": None}))
    schedule = fleet.config.schedule
    for now in (SEVEN, SEVEN + 40 * DAY):
        for _ in range(3):
            # As if each had looked at the same instant, before the others have written it down.
            last = client.hgetall(notices.LAST)
            notices.announce(client, schedule, now)
            if last:
                client.hset(notices.LAST, mapping=last)
    assert tasks(client) == ["digest"]


def test_the_test_page_reaches_everybody_and_is_over_then(
    fleet: SmallFleet, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = ["a://x", {"url": "b://x", "min_severity": "critical"}]
    fleet.edit("backup_schedule.json", lambda document: document.update(alerts=to))
    runtime, phone = fleet.runtime(client), Phone()
    maintain.run(runtime, "test-page", now=at(monkeypatch, SEVEN))
    alerts.deliver_due(client, runtime.config.schedule.alerts, runtime.history, SEVEN + 10, send=phone)
    assert [(url, title) for url, title, _ in phone.got] == [
        ("a://x", f"[test] {notices.TEST_TITLE}"), ("b://x", f"[test] {notices.TEST_TITLE}"),
    ]  # fmt: skip
    assert alerts.open_alerts(client) == []


# -- the digest -----------------------------------------------------------------------------------------------


def test_the_digest_of_a_fleet_that_is_well_says_so_with_figures(
    fleet: SmallFleet, runtime: Runtime, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for agent in ("z", "jay"):
        backups.scheduled(runtime, agent, "daily", "2026-11-23", now=SEVEN)
    maintain.run(runtime, "digest", now=at(monkeypatch, SEVEN + HOUR))
    (one,) = alerts.open_alerts(client)
    assert (one.key, one.title) == ("digest/2026-11-23-0800", "all is well with 2 agents")
    lines = one.body.splitlines()
    assert "daily: 2 of 2 agents have a good snapshot, the newest of each is at most 60 min old (z)" in lines
    assert "recoveries since 2026-11-22 08:00:00: none" in lines
    assert "open alerts: 0, of which 0 were acknowledged" in lines
    assert "next runs: daily 2026-11-24 07:00:00" in lines
    assert any(line.startswith("free in the repository: ") for line in lines)


def test_the_digest_of_a_fleet_in_trouble_names_the_trouble(
    fleet: SmallFleet, runtime: Runtime, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backup_worker.recovery.incident import IncidentStore

    backups.scheduled(runtime, "z", "daily", "2026-11-22", now=SEVEN - DAY)
    runtime.alert("missing/daily/jay", "critical", "no backup of jay", "b", agent="jay")
    IncidentStore(client).open("z", token="t", now=SEVEN, reason="no heartbeat", beat_mark="0-0")
    maintain.run(runtime, "digest", now=at(monkeypatch, SEVEN + 2 * HOUR))
    (one,) = [one for one in alerts.open_alerts(client) if one.key.startswith("digest/")]
    assert one.title == "2 missing backups, 1 open recoveries, 1 critical alerts (2 agents)"
    assert "  MISSING: 2026-11-23 of z, 2026-11-23 of jay" in one.body.splitlines()
    assert "  [critical] no backup of jay" in one.body.splitlines()
    assert "z: open" in one.body


def test_the_digest_of_a_large_fleet_stays_short(runtime: Runtime) -> None:
    from backup_worker.status import overview

    facts = overview(runtime, SEVEN + 2 * HOUR)
    facts["agents"] = [{**facts["agents"][0], "agent": f"a{number}"} for number in range(500)]
    incident = {"agent": "z", "state": "recovered", "id": "z-1", "reason": "r", "opened_at": 1.0}
    body = digest.compose(facts, [incident] * 500, 0, SEVEN, "UTC")[1]
    assert len(body) < 4000
    assert "and 495 more" in body


# -- pings outward ---------------------------------------------------------------------------------------------


def planned(fleet: SmallFleet, now: float, said: str = "", *, failed: tuple[str, ...] = ()) -> list[str]:
    states = {"daily": State("2026-11-23", said)} if said else {}
    heads = fleet.repository.snapshots()
    return [ping.signal for ping in pings.plan(fleet.config, heads, failed, states, now)]


def test_success_is_told_only_when_every_agent_s_snapshot_of_the_round_is_there_and_good(
    fleet: SmallFleet, runtime: Runtime, switch: WebHook
) -> None:
    assert planned(fleet, SEVEN + 1) == ["start"]
    assert planned(fleet, SEVEN + 1, "start") == []
    backups.scheduled(runtime, "z", "daily", "2026-11-23", now=SEVEN + 2)
    assert planned(fleet, SEVEN + 3, "start") == []
    backups.scheduled(runtime, "jay", "daily", "2026-11-23", now=SEVEN + 4)
    assert planned(fleet, SEVEN + 5, "start") == ["success"]
    assert planned(fleet, SEVEN + 5, "success") == []
    assert planned(fleet, SEVEN + DAY, "success") == ["start"]


def test_a_suspect_snapshot_a_failed_try_and_a_missing_one_are_a_failure_until_made_good(
    fleet: SmallFleet, runtime: Runtime, switch: WebHook
) -> None:
    assert planned(fleet, SEVEN + 1, "start", failed=("daily/2026-11-23/z",)) == ["fail"]
    assert planned(fleet, SEVEN + HOUR + 1, "start") == ["fail"]
    assert planned(fleet, SEVEN + HOUR + 1, "fail") == []
    (fleet.root("z") / "SOUL.md").write_text("")
    backups.scheduled(runtime, "z", "daily", "2026-11-23", now=SEVEN + 2)
    backups.scheduled(runtime, "jay", "daily", "2026-11-23", now=SEVEN + 2)
    assert planned(fleet, SEVEN + 3, "start") == ["fail"]
    (fleet.root("z") / "SOUL.md").write_text("I am z.\n")
    backups.by_hand(runtime, "z", "daily", now=SEVEN + 4)
    assert planned(fleet, SEVEN + 5, "fail") == ["success"]


def test_a_switch_is_told_over_http_in_the_protocol_and_without_its_secret_in_the_record(
    fleet: SmallFleet, client: Any, switch: WebHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = fleet.runtime(client)
    now = at(monkeypatch, SEVEN + 1)
    maintain.run(runtime, "watch", now=now)
    assert tasks(client) == ["ping"]
    maintain.run(runtime, "ping", now=now)
    for agent in ("z", "jay"):
        backups.scheduled(runtime, agent, "daily", "2026-11-23", now=SEVEN + 2)
    maintain.run(runtime, "ping", now=at(monkeypatch, SEVEN + 60))
    maintain.run(runtime, "ping", now=at(monkeypatch, SEVEN + 61))
    (_, start, _), (_, success, body) = switch.requests
    assert start.split("?")[0] == "/s3cret/start"
    assert success.split("?")[0] == "/s3cret"
    assert start.split("?rid=")[1] == success.split("?rid=")[1]
    assert body.decode().startswith("daily 2026-11-23: 2 snapshots, ")
    assert [(line["signal"], line["ok"]) for line in fleet.history("ping")] == [
        ("start", True),
        ("success", True),
    ]
    assert "s3cret" not in (fleet.folder / "history.jsonl").read_text()


def test_a_ping_that_fails_is_on_the_record_is_tried_again_and_alerts_when_it_keeps_failing(
    fleet: SmallFleet, client: Any, switch: WebHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = fleet.runtime(client)
    switch.mode = "error"
    tried, now = [], SEVEN
    while now < SEVEN + 600:
        at(monkeypatch, now)
        if pings.due(runtime, [], now):
            tried.append(now - SEVEN)
            assert maintain.run(runtime, "ping", now=now) == {"pings": {"daily": False}}
        now += 10
    assert tried == [0, 60, 180, 420]
    assert [line["error"] for line in fleet.history("ping")] == ["it answered 500"] * 4
    assert [one.key for one in alerts.open_alerts(client)] == ["ping/daily"]
    switch.mode = "ok"
    maintain.run(runtime, "ping", now=at(monkeypatch, SEVEN + HOUR / 2))
    assert alerts.open_alerts(client) == []
    everything = (fleet.folder / "history.jsonl").read_text() + str(client.hgetall("backup:alerts"))
    assert "s3cret" not in everything


@pytest.mark.parametrize("mode", ["close", "hang"])
def test_a_switch_that_hangs_or_hangs_up_was_not_told(
    switch: WebHook, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(pings, "TIMEOUT_S", 0.2)
    switch.mode = mode
    problem = pings.post(f"http://{switch.place}/s3cret", Ping("daily", "s", "success", "b"))
    assert problem is not None
    assert "s3cret" not in problem


def test_a_check_that_is_not_there_any_more_was_not_told_though_it_answers_200() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\nOK (not found)")

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x"
        assert pings.post(url, Ping("daily", "s", "success", "b")) == "it answered “not found”"
        thread.join()


def test_a_tier_without_a_switch_asks_for_nothing(fleet: SmallFleet, runtime: Runtime) -> None:
    assert pings.due(runtime, [], SEVEN + 1) == []
    assert pings.host_of("https://hc-ping.com/s3cret") == "hc-ping.com"


def test_a_test_page_by_hand_says_of_each_receiver_whether_it_took_it(fleet: SmallFleet) -> None:
    to = ["a://x", {"url": "b://x", "min_severity": "critical"}]
    fleet.edit("backup_schedule.json", lambda document: document.update(alerts=to))
    rows = notices.try_receivers(Runtime(fleet.config), SEVEN, send=Phone(broken={"b://x"}))
    assert rows == [
        {"receiver": "a://x", "ok": True, "detail": "SUCCESS", "severities": ["info", "warning", "critical"]},
        {"receiver": "b://x", "ok": False, "detail": "FAILURE", "severities": ["critical"]},
    ]
    (line,) = fleet.history("alert-delivery")
    assert (line["told"], line["failed"]) == (["a://x"], ["b://x: FAILURE"])
