"""Alerts to a real HTTP receiver and a real SMTP server: what arrives, and what is made of one that does not answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakeredis
import pytest

from backup_worker.alerts import (
    Alert,
    Policy,
    deliver_due,
    open_alerts,
    raise_alert,
    receiver_states,
    receivers,
    resolve,
)
from backup_worker.config import Receiver
from backup_worker.history import History
from tests.receivers import MailServer, WebHook

AT_ONCE = Policy(group_s=0)
DEAD = Alert("missing/daily/z", "critical", "no backup of z", "slot 2026-11-23 is missing", agent="z")


@pytest.fixture
def client() -> Any:
    return fakeredis.FakeRedis()


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "history.jsonl")


@pytest.fixture
def hook() -> Iterator[WebHook]:
    with WebHook() as server:
        yield server


@pytest.fixture
def mail() -> Iterator[MailServer]:
    with MailServer() as server:
        yield server


def deliver(client: Any, history: History, now: float, *urls: str) -> int:
    to = [Receiver(url=url) for url in urls]
    return deliver_due(client, to, history, now, policy=AT_ONCE)


def test_a_web_hook_gets_the_message(client: Any, history: History, hook: WebHook) -> None:
    raise_alert(client, DEAD, now=0)
    assert deliver(client, history, 0, hook.url) == 1
    (message,) = hook.got
    assert (message["title"], message["type"]) == ("[critical] no backup of z", "failure")
    assert message["message"].startswith("slot 2026-11-23 is missing\n\nlook:")
    record = history.path.read_text()
    assert "127.0.0.1" in record
    assert "hunter2" not in record


def test_a_mail_arrives_whole_and_with_one_subject(client: Any, history: History, mail: MailServer) -> None:
    odd = Alert("job/1", "warning", "job “1”\r\nBcc: you@example.com", "line\n.\nafter a lone dot: æøå ✓")
    raise_alert(client, odd, now=0)
    assert deliver(client, history, 0, mail.url) == 1
    (got,) = mail.mails
    assert " ".join(got["Subject"].split()) == "[warning] job “1” Bcc: you@example.com"
    assert (got["To"], got["Bcc"]) == ("kari@example.com", None)
    body = got.get_body(("plain", "html"))
    assert body is not None
    assert "after a lone dot: æøå ✓" in body.get_content()
    assert "docs/runbook.md#job" in body.get_content()


def test_fifty_deaths_are_one_mail_and_one_call_and_their_ends_too(
    client: Any, history: History, mail: MailServer, hook: WebHook
) -> None:
    for number in range(50):
        raise_alert(
            client, Alert(f"recovery/a{number}", "warning", f"a{number} is dead", "", f"a{number}"), now=0
        )
    assert deliver(client, history, 0, mail.url, hook.url) == 2
    for number in range(50):
        resolve(client, f"recovery/a{number}", now=60)
    assert deliver(client, history, 60, mail.url, hook.url) == 2
    assert [got["Subject"].split(":")[0] for got in mail.mails] == [
        "[warning] 50 times",
        "[resolved] 50 times",
    ]
    assert all(f"a{number} is dead" in hook.got[0]["message"] for number in range(50))


@pytest.mark.parametrize("mode", ["error", "close", "hang"])
def test_a_receiver_that_fails_in_any_way_was_not_told_and_is_tried_again(
    client: Any, history: History, hook: WebHook, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(receivers, "SEND_TIMEOUT_S", 0.5)
    hook.mode = mode
    raise_alert(client, DEAD, now=0)
    began = time.monotonic()
    assert deliver(client, history, 0, hook.url) == 0
    assert time.monotonic() - began < 10
    (state,) = receiver_states(client).values()
    assert (state.failures, state.retry_at, state.shown.startswith("json://")) == (1, 30, True)
    assert "hunter2" not in history.path.read_text() + str(open_alerts(client)) + str(state)
    (line,) = history.read(kind="alert-delivery")
    assert line["told"] == [] and len(line["failed"]) == 1
    hook.mode = "ok"
    hook.release.set()
    assert deliver(client, history, 30, hook.url) == 1


def test_a_mail_server_that_refuses_was_not_told(client: Any, history: History, mail: MailServer) -> None:
    mail.refuses = True
    raise_alert(client, DEAD, now=0)
    assert deliver(client, history, 0, mail.url) == 0
    mail.refuses = False
    assert deliver(client, history, 30, mail.url) == 1


def test_a_receiver_that_hangs_does_not_keep_the_others_from_hearing_at_once(
    client: Any, history: History, hook: WebHook, mail: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receivers, "SEND_TIMEOUT_S", 3.0)
    hook.mode = "hang"
    raise_alert(client, DEAD, now=0)
    arrived: list[float] = []
    began = time.monotonic()

    class Watched(list[Any]):
        def append(self, one: Any) -> None:
            arrived.append(time.monotonic() - began)
            super().append(one)

    mail.mails = Watched()
    assert deliver(client, history, 0, hook.url, mail.url) == 1
    assert arrived[0] < 2.5
    assert len(open_alerts(client)[0].told) == 1
