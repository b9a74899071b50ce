"""What is sent to the execution manager itself is said in its log, and waits for nobody."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from em_bridge import Agent, ExecutionManager, streams
from em_bridge.events import Message, encode
from em_bridge.letterbox import SHOWN, Letterbox
from em_bridge.messages import send_once
from em_bridge.streams import INBOX_GROUP
from tests.integration.conftest import ValkeyServer
from tests.integration.processes import em_bridge, eventually

pytestmark = pytest.mark.valkey

INBOX = streams.inbox("em")


def waiting(client: Any) -> int:
    pending = client.xpending(INBOX, INBOX_GROUP)["pending"]
    [group] = client.xinfo_groups(INBOX)
    return int(pending + group["lag"])


def test_the_small_em_says_what_it_is_sent_and_lives_with_whatever_lies_there(
    valkey: ValkeyServer, tmp_path: Path
) -> None:
    client = valkey.client()
    client.set(INBOX, "no stream")
    with em_bridge(tmp_path, "em", valkey.url, "em") as em:
        eventually(lambda: "errorstat_WRONGTYPE" in client.info("errorstats"))
        client.delete(INBOX)
        client.xadd(INBOX, {"type": "message", "body": b"\xc1"})
        eventually(lambda: client.exists(streams.MESSAGES))
        client.sadd(streams.SEEN, "em")
        send_once(client, "rick", "em", b"two\nlines", at=1e9)
        eventually(lambda: "message 1 from rick: 'two\\nlines'" in em.err.read_text())
        eventually(lambda: waiting(client) == 0)
        assert client.xlen(streams.DEAD_LETTER) == 1
        # Again on a server that has lost everything.
        client.flushall()
        eventually(lambda: client.sismember(streams.SEEN, "em"))
        send_once(client, "rick", "em", b"again", at=1e9)
        eventually(lambda: "'again'" in em.err.read_text())
        assert em.process.poll() is None


def test_what_a_killed_process_had_read_is_said_by_the_next(
    valkey: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    client = valkey.client()
    streams.ensure_group(client, INBOX, INBOX_GROUP)
    for text in (b"first", b"x" * (SHOWN + 1)):
        fields = encode(Message("rick", "em", 1, text))
        client.xadd(INBOX, dict(fields))
    client.xreadgroup(INBOX_GROUP, "em", {INBOX: ">"}, count=1)
    with caplog.at_level(logging.INFO, logger="em_bridge"):
        letterbox = Letterbox(client, "em")
        assert [letterbox.step() for _ in range(4)] == [1, 0, 1, 0]
    said = [record.getMessage() for record in caplog.records]
    assert said == ["message 1 from rick: 'first'", f"message 1 from rick: {'x' * SHOWN + '…'!r}"]
    assert waiting(client) == 0


def test_an_em_with_a_program_of_its_own_keeps_its_messages_for_that(
    valkey: ValkeyServer, tmp_path: Path
) -> None:
    with ExecutionManager(valkey.url) as manager, Agent("em", valkey.url, outbox=tmp_path / "em") as me:
        assert manager.wait_until_leading(10)
        send_once(valkey.client(), "rick", "em", b"hello", at=1e9)
        message = me.receive(10)
        assert message is not None and message.payload == b"hello"
