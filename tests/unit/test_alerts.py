"""Alerts: told once, repeated until somebody knows, and never taken for told when nobody was."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import fakeredis
import pytest
from redis import Redis

from backup_worker import alerts
from backup_worker.alerts import (
    Alert,
    Policy,
    acknowledge,
    deliver_due,
    open_alerts,
    raise_alert,
    receivers,
    resolve,
)
from backup_worker.alerts.receivers import Sent
from backup_worker.config import Receiver
from backup_worker.history import History
from em_bridge.errors import NotFound
from tests.receivers import Phone

MINUTE = 60.0
HOUR = 3600.0
DEAD = Alert("missing/daily/z", "critical", "no backup of z", "slot 2026-11-23 is missing", agent="z")
AT_ONCE = Policy(group_s=0)


def to(*urls: str) -> list[Receiver]:
    return [Receiver(url=url) for url in urls]


@pytest.fixture
def client() -> Redis:
    return fakeredis.FakeRedis()


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "history.jsonl")


@pytest.fixture
def phone() -> Phone:
    return Phone()


@pytest.fixture
def deliver(client: Redis, history: History, phone: Phone) -> Any:
    def run(now: float, *urls: str) -> list[str]:
        deliver_due(client, to(*urls or ("a://",)), history, now, policy=AT_ONCE, send=phone)
        return phone.titles()

    return run


def test_an_alert_is_news_once(client: Redis) -> None:
    assert raise_alert(client, DEAD, now=0)
    assert not raise_alert(client, DEAD, now=1)
    (one,) = open_alerts(client)
    assert (one.count, one.opened_at, one.last_at) == (2, 0, 1)


def test_an_alert_is_told_at_once_and_again_after_an_hour_until_resolved(client: Redis, deliver: Any) -> None:
    raise_alert(client, DEAD, now=0)
    assert deliver(0) == ["[critical] no backup of z"]
    assert deliver(59 * MINUTE) == []
    raise_alert(client, DEAD, now=59 * MINUTE)
    assert deliver(59.5 * MINUTE) == []
    assert deliver(60 * MINUTE) == ["[critical] no backup of z"]
    assert resolve(client, DEAD.key, now=61 * MINUTE)
    assert deliver(61 * MINUTE) == ["[resolved] no backup of z"]
    assert deliver(500 * MINUTE) == []
    assert open_alerts(client) == []


def test_the_pauses_between_repetitions_double_from_the_configured_one_up_to_a_day(
    client: Redis, history: History, phone: Phone
) -> None:
    raise_alert(client, DEAD, now=0)
    policy = Policy(group_s=0, repeat_s=2 * HOUR)
    told = []
    for hour in range(100):
        if deliver_due(client, to("a://"), history, hour * HOUR, policy=policy, send=phone):
            told.append(hour)
    assert [later - earlier for earlier, later in pairwise(told)] == [2, 4, 8, 16, 24, 24]


def test_an_acknowledged_alert_is_quiet_until_it_is_resolved(client: Redis, deliver: Any) -> None:
    raise_alert(client, DEAD, now=0)
    deliver(0)
    assert acknowledge(client, DEAD.key, "kari", 60).acknowledged_by == "kari"
    assert not raise_alert(client, DEAD, now=70)
    assert deliver(100 * MINUTE) == []
    resolve(client, DEAD.key, now=101 * MINUTE)
    assert deliver(101 * MINUTE) == ["[resolved] no backup of z"]


def test_an_acknowledged_alert_that_gets_worse_is_told_again(client: Redis, deliver: Any) -> None:
    raise_alert(client, Alert("disk", "warning", "little space", ""), now=0)
    deliver(0)
    acknowledge(client, "disk", "kari", 1)
    assert raise_alert(client, Alert("disk", "critical", "no space", ""), now=2)
    assert deliver(2) == ["[critical] no space"]


def test_a_resolved_alert_that_comes_back_is_news_again(client: Redis, deliver: Any) -> None:
    raise_alert(client, DEAD, now=0)
    deliver(0)
    resolve(client, DEAD.key, now=1)
    assert raise_alert(client, DEAD, now=2)
    assert deliver(2) == ["[critical] no backup of z"]


def test_what_is_not_open_cannot_be_resolved_or_acknowledged(client: Redis) -> None:
    assert not resolve(client, "nothing", now=0)
    with pytest.raises(NotFound, match="“nothing”"):
        acknowledge(client, "nothing", "kari", 0)
    raise_alert(client, DEAD, now=0)
    assert resolve(client, DEAD.key, now=1)
    assert not resolve(client, DEAD.key, now=2)


def test_a_notice_is_told_once_and_remembered_so_that_it_is_no_news_again(
    client: Redis, deliver: Any
) -> None:
    notice = Alert("change/c1", "info", "a change waits", "")
    assert raise_alert(client, notice, now=0)
    assert deliver(0) == ["[info] a change waits"]
    assert not raise_alert(client, notice, now=MINUTE)
    assert deliver(600 * MINUTE) == []
    assert resolve(client, notice.key, now=601 * MINUTE)
    assert deliver(601 * MINUTE) == []


def test_a_notice_that_nobody_resolves_is_forgotten_after_a_week(client: Redis, deliver: Any) -> None:
    raise_alert(client, Alert("done", "info", "recovered", ""), now=0)
    deliver(0)
    assert deliver(alerts.INFO_S) == []
    assert open_alerts(client) == []


def test_a_failed_delivery_is_tried_again_with_growing_pauses_and_is_on_the_record(
    client: Redis, deliver: Any, phone: Phone, history: History
) -> None:
    raise_alert(client, DEAD, now=0)
    phone.broken = {"a://"}
    tried, now = [], 0.0
    while now < 4 * 3600:
        before = len(list(history.read()))
        deliver(now)
        if len(list(history.read())) > before:
            tried.append(now)
        now += 10
    pauses = [later - earlier for earlier, later in pairwise(tried)]
    assert pauses[:5] == [30, 60, 120, 240, 480]
    assert max(pauses) == 900
    assert all(line["failed"] == ["a://: FAILURE"] and line["told"] == [] for line in history.read())
    assert open_alerts(client)[0].last_failure == "a://: FAILURE"
    (state,) = alerts.receiver_states(client).values()
    assert (state.shown, state.failures, state.last_failure) == ("a://", len(tried), "FAILURE")
    phone.broken.clear()
    assert deliver(now + 3600) == ["[critical] no backup of z"]
    (state,) = alerts.receiver_states(client).values()
    assert (state.failures, state.last_failure, open_alerts(client)[0].last_failure) == (0, None, None)


def test_a_receiver_that_is_down_does_not_make_the_others_hear_it_twice(
    client: Redis, deliver: Any, phone: Phone
) -> None:
    raise_alert(client, DEAD, now=0)
    phone.broken = {"b://"}
    both = ("a://", "b://")
    assert len(deliver(0, *both)) == 1
    phone.broken.clear()
    assert len(deliver(30, *both)) == 1
    assert len(deliver(30 + 60 * MINUTE, *both)) == 2


def test_a_resolved_notice_that_fails_is_tried_again(client: Redis, deliver: Any, phone: Phone) -> None:
    raise_alert(client, DEAD, now=0)
    deliver(0)
    resolve(client, DEAD.key, now=10)
    phone.broken = {"a://"}
    assert deliver(10) == []
    phone.broken.clear()
    assert deliver(40) == ["[resolved] no backup of z"]


def test_without_a_receiver_the_log_and_the_record_say_that_nobody_was_told(
    client: Redis, history: History, caplog: pytest.LogCaptureFixture
) -> None:
    raise_alert(client, DEAD, now=0)
    with caplog.at_level(logging.ERROR):
        assert deliver_due(client, [], history, 0, policy=AT_ONCE) == 0
    assert "no backup of z" in caplog.text
    assert next(history.read())["failed"] == ["no receiver is configured"]
    (one,) = open_alerts(client)
    assert (one.told_at, one.due_at, one.last_failure) == (None, 3600, "no receiver is configured")


def test_a_receiver_whose_plugin_raises_stops_no_other(client: Redis, history: History) -> None:
    arrived = []

    def send(url: str, title: str, body: str, severity: str) -> Sent:
        if url == "bad://secret":
            raise RuntimeError("secret")
        arrived.append(url)
        return Sent(True, url, "SUCCESS")

    raise_alert(client, DEAD, now=0)
    assert deliver_due(client, to("bad://secret", "good://"), history, 0, policy=AT_ONCE, send=send) == 1
    assert arrived == ["good://"]
    assert "secret" not in history.path.read_text()


def test_a_record_that_cannot_be_written_stops_no_delivery(client: Redis, phone: Phone) -> None:
    raise_alert(client, DEAD, now=0)
    full = History(Path("/dev/full"))
    assert deliver_due(client, to("a://"), full, 0, policy=AT_ONCE, send=phone) == 1


def test_two_deliverers_at_once_send_one_message(client: Redis, history: History) -> None:
    raise_alert(client, DEAD, now=0)
    sent = []

    def send(url: str, title: str, body: str, severity: str) -> Sent:
        sent.append(url)
        if len(sent) == 1:
            deliver_due(client, to("a://"), history, 1, policy=AT_ONCE, send=send)
        return Sent(True, url, "SUCCESS")

    deliver_due(client, to("a://"), history, 0, policy=AT_ONCE, send=send)
    assert sent == ["a://"]


def test_a_deliverer_that_died_while_sending_is_followed_by_another(
    client: Redis, history: History, deliver: Any
) -> None:
    class Killed(BaseException):
        pass

    def die(url: str, title: str, body: str, severity: str) -> Sent:
        raise Killed

    raise_alert(client, DEAD, now=0)
    with pytest.raises(Killed):
        deliver_due(client, to("a://"), history, 0, policy=AT_ONCE, send=die)
    assert deliver(alerts.CLAIM_S - 1) == []
    assert deliver(alerts.CLAIM_S) == ["[critical] no backup of z"]


@pytest.mark.parametrize("what", ["resolve", "acknowledge", "worse"])
def test_what_happens_while_a_message_is_under_way_is_not_lost(
    client: Redis, history: History, deliver: Any, what: str
) -> None:
    raise_alert(client, Alert("k", "warning", "t", ""), now=0)

    def send(url: str, title: str, body: str, severity: str) -> Sent:
        if what == "resolve":
            resolve(client, "k", now=1)
        elif what == "acknowledge":
            acknowledge(client, "k", "kari", 1)
        else:
            raise_alert(client, Alert("k", "critical", "t", ""), now=1)
        return Sent(True, url, "SUCCESS")

    deliver_due(client, to("a://"), history, 0, policy=AT_ONCE, send=send)
    expected = {"resolve": ["[resolved] t"], "acknowledge": [], "worse": ["[critical] t"]}
    assert deliver(2) == expected[what]


def test_the_worst_comes_first(client: Redis) -> None:
    for key, severity, now in (
        ("a", "info", 0),
        ("b", "critical", 2),
        ("c", "warning", 1),
        ("d", "critical", 1),
    ):
        raise_alert(client, Alert(key, severity, key, ""), now=now)  # type: ignore[arg-type]  # a literal, seen as text
    assert [one.key for one in open_alerts(client)] == ["d", "b", "c", "a"]


@pytest.mark.parametrize("url", ["nonsense", "foo://x", "slack://", ""])
def test_a_url_that_apprise_does_not_take_tells_nobody(url: str) -> None:
    assert not receivers.send_with_apprise(url, "t", "b", "info").told
    assert receivers.refused_urls([url, "json://localhost/x"])[0][0] == 0
    assert len(receivers.refused_urls([url, "json://localhost/x"])) == 1


@pytest.mark.parametrize(
    "url",
    [
        "mailtos://me:hunter2@example.com",
        "json://me:hunter2@localhost/x",
        "tgram://123456789:hunter2hunter2hunter2hunter2hunter2xyz/1/",
        "nonsense://hunter2",
    ],
)
def test_a_receiver_is_shown_without_its_secrets(url: str) -> None:
    assert "hunter2" not in receivers.receiver_of(url)
    assert receivers.receiver_of(url).startswith(url.split("://")[0])


def test_an_alert_about_a_file_whose_name_is_no_text_is_raised_and_told_with_and_without_redis(
    client: Redis, history: History, phone: Phone, tmp_path: Path
) -> None:
    odd = Alert("suspect/daily/z", "critical", "daily backup of z is suspect", "rules/\udcff.json is no JSON")
    assert raise_alert(client, odd, now=0.0)
    deliver_due(client, to("a://"), history, 0.0, policy=AT_ONCE, send=phone)
    direct = alerts.Direct(to("a://"), history, tmp_path / "state", AT_ONCE, send=phone)
    assert direct.tell([odd], 0.0) == [odd]
    assert direct.tell([odd], 1.0) == []
    assert ["rules/\\udcff.json is no JSON" in body for _, _, body in phone.got] == [True, True]
