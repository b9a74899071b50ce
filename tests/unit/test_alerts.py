"""Alerts: told once, repeated until somebody knows, and never taken for told when nobody was."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import fakeredis
import pytest
from redis import Redis

from backup_worker import alerts, receivers
from backup_worker.alerts import Alert, acknowledge, deliver_due, open_alerts, raise_alert, resolve
from backup_worker.history import History
from backup_worker.receivers import Sent
from em_bridge.errors import NotFound

MINUTE = 60.0
DEAD = Alert("missing/daily/z", "critical", "no backup of z", "slot 2026-11-23 is missing", agent="z")


@pytest.fixture
def client() -> Redis:
    return fakeredis.FakeRedis()


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "history.jsonl")


@dataclass
class Phone:
    """Receivers that write down what arrives, and of which some are out of order."""

    broken: set[str] = field(default_factory=set)
    got: list[tuple[str, str]] = field(default_factory=list)

    def __call__(self, url: str, title: str, body: str, severity: str) -> Sent:
        if url in self.broken:
            return Sent(False, url, "FAILURE")
        self.got.append((url, title))
        return Sent(True, url, "SUCCESS")

    def titles(self) -> list[str]:
        titles = [title for _, title in self.got]
        self.got.clear()
        return titles


@pytest.fixture
def phone() -> Phone:
    return Phone()


@pytest.fixture
def deliver(client: Redis, history: History, phone: Phone) -> Any:
    def run(now: float, urls: tuple[str, ...] = ("a://",)) -> list[str]:
        deliver_due(client, urls, history, now, send=phone)
        return phone.titles()

    return run


def test_an_alert_is_news_once(client: Redis) -> None:
    assert raise_alert(client, DEAD, now=0)
    assert not raise_alert(client, DEAD, now=1)
    (one,) = open_alerts(client)
    assert (one.count, one.opened_at, one.last_at) == (2, 0, 1)


def test_an_alert_is_told_at_once_and_again_every_hour_until_resolved(client: Redis, deliver: Any) -> None:
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


def test_the_pause_between_repetitions_is_the_configured_one(
    client: Redis, history: History, phone: Phone
) -> None:
    raise_alert(client, DEAD, now=0)
    for now in (0, 4 * MINUTE, 5 * MINUTE):
        deliver_due(client, ["a://"], history, now, repeat_s=5 * MINUTE, send=phone)
    assert len(phone.got) == 2


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
    assert pauses[:4] == [30, 60, 120, 240]
    assert max(pauses) == 3600
    assert all(line["failed"] == ["a://: FAILURE"] and line["told"] == [] for line in history.read())
    assert open_alerts(client)[0].last_failure == "a://: FAILURE"
    phone.broken.clear()
    assert deliver(now + 3600) == ["[critical] no backup of z"]
    assert open_alerts(client)[0].failures == 0


def test_a_receiver_that_is_down_does_not_make_the_others_hear_it_twice(
    client: Redis, deliver: Any, phone: Phone
) -> None:
    raise_alert(client, DEAD, now=0)
    phone.broken = {"b://"}
    both = ("a://", "b://")
    assert len(deliver(0, both)) == 1
    phone.broken.clear()
    deliver_due_at_30 = deliver(30, both)
    assert len(deliver_due_at_30) == 1
    assert len(deliver(30 + 60 * MINUTE, both)) == 2


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
        assert deliver_due(client, [], history, 0) == 0
    assert "no backup of z" in caplog.text
    assert next(history.read())["failed"] == ["no receiver is configured"]
    (one,) = open_alerts(client)
    assert one.told_at is None
    assert one.next_at == 3600


def test_a_receiver_whose_plugin_raises_stops_no_other(client: Redis, history: History) -> None:
    arrived = []

    def send(url: str, title: str, body: str, severity: str) -> Sent:
        if url == "bad://secret":
            raise RuntimeError("secret")
        arrived.append(url)
        return Sent(True, url, "SUCCESS")

    raise_alert(client, DEAD, now=0)
    assert deliver_due(client, ["bad://secret", "good://"], history, 0, send=send) == 1
    assert arrived == ["good://"]
    assert "secret" not in history.path.read_text()


def test_a_record_that_cannot_be_written_stops_no_delivery(client: Redis, phone: Phone) -> None:
    raise_alert(client, DEAD, now=0)
    assert deliver_due(client, ["a://"], History(Path("/dev/full")), 0, send=phone) == 1


def test_two_deliverers_at_once_send_one_message(client: Redis, history: History) -> None:
    raise_alert(client, DEAD, now=0)
    sent = []

    def send(url: str, title: str, body: str, severity: str) -> Sent:
        sent.append(url)
        if len(sent) == 1:
            deliver_due(client, ["a://"], history, 1, send=send)
        return Sent(True, url, "SUCCESS")

    deliver_due(client, ["a://"], history, 0, send=send)
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
        deliver_due(client, ["a://"], history, 0, send=die)
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

    deliver_due(client, ["a://"], history, 0, send=send)
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


def test_without_redis_everything_is_news_and_can_be_told_at_once(history: History, phone: Phone) -> None:
    assert raise_alert(None, DEAD, now=0)
    assert not resolve(None, DEAD.key, now=0)
    assert alerts.tell(["a://"], DEAD, history, 0, send=phone)
    assert phone.titles() == ["[critical] no backup of z"]
    assert not alerts.tell([], DEAD, history, 0, send=phone)


class Receiver(BaseHTTPRequestHandler):
    """A web hook as people run them."""

    got: list[dict[str, Any]]
    status = 200

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        type(self).got.append(json.loads(self.rfile.read(length)))
        self.send_response(type(self).status)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def web_hook() -> Iterator[tuple[str, type[Receiver]]]:
    handler = type("Hook", (Receiver,), {"got": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"json://me:hunter2@127.0.0.1:{server.server_port}/alerts", handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_web_hook_gets_the_real_message(
    client: Redis, history: History, web_hook: tuple[str, type[Receiver]]
) -> None:
    url, hook = web_hook
    raise_alert(client, DEAD, now=0)
    assert deliver_due(client, [url], history, 0) == 1
    (message,) = hook.got
    assert message["title"] == "[critical] no backup of z"
    assert message["message"] == "slot 2026-11-23 is missing"
    assert message["type"] == "failure"
    record = history.path.read_text()
    assert "127.0.0.1" in record
    assert "hunter2" not in record


def test_a_web_hook_that_answers_with_an_error_was_not_told(
    client: Redis, history: History, web_hook: tuple[str, type[Receiver]]
) -> None:
    url, hook = web_hook
    hook.status = 500
    raise_alert(client, DEAD, now=0)
    assert deliver_due(client, [url], history, 0) == 0
    assert open_alerts(client)[0].failures == 1
    assert "hunter2" not in history.path.read_text() + str(open_alerts(client))


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
