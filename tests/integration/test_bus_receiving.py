"""From the inbox to the acknowledgement on a real Valkey: what was dealt with never comes again, the rest does."""

from __future__ import annotations

from pathlib import Path

import pytest

from em_bridge import Agent, ExecutionManager, messages, streams
from em_bridge.errors import AgentBackupError, InvalidEvent
from em_bridge.outbox import Outbox
from tests.integration.conftest import ValkeyServer
from tests.integration.processes import eventually, python
from tests.integration.talk import make_known, numbers, receive_all
from tests.integration.wire import ReplyThief

pytestmark = pytest.mark.valkey


def test_what_was_not_acknowledged_comes_again_after_a_crash_and_first(
    valkey: ValkeyServer, em: ExecutionManager, tmp_path: Path
) -> None:
    client = valkey.client()
    make_known(client, "jay")
    for payload in numbers(3):
        messages.send_once(client, "z", "jay", payload, at=1.0)
    code = (
        "import os,sys\nfrom em_bridge import Agent\n"
        "me = Agent('jay', sys.argv[1], outbox=sys.argv[2]); me.open()\n"
        "a = me.receive(5); me.ack(a); b = me.receive(5)\nassert (a.payload, b.payload) == (b'0', b'1')\n"
        "os.kill(os.getpid(), 9)"
    )
    with python(tmp_path, "receiver", code, valkey.url, str(tmp_path / "jay")) as receiver:
        assert receiver.process.wait(10) == -9
    messages.send_once(client, "z", "jay", b"3", at=1.0)
    with Agent("jay", valkey.url, outbox=tmp_path / "jay") as jay:
        assert receive_all(jay, 3) == [b"1", b"2", b"3"]
    assert client.xpending(streams.inbox("jay"), streams.INBOX_GROUP)["pending"] == 0


def test_one_acknowledgement_is_good_for_all_before_it_of_its_sender(
    valkey: ValkeyServer, em: ExecutionManager, tmp_path: Path
) -> None:
    client = valkey.client()
    make_known(client, "jay")
    for number in numbers(10):
        messages.send_once(client, "z", "jay", number, at=1.0)
        messages.send_once(client, "rick", "jay", number, at=1.0)
    with Agent("jay", valkey.url, outbox=tmp_path / "jay") as jay:
        last = {}
        for _ in range(20):
            message = jay.receive(10)
            assert message is not None
            last[message.sender] = message
        jay.ack(last["z"])
        pending = client.xpending_range(streams.inbox("jay"), streams.INBOX_GROUP, "-", "+", 100)
        assert len(pending) == 10
        jay.ack(last["rick"])
        assert client.xpending(streams.inbox("jay"), streams.INBOX_GROUP)["pending"] == 0


def test_an_acknowledgement_while_redis_is_away_counts(
    valkey: ValkeyServer, em: ExecutionManager, tmp_path: Path
) -> None:
    make_known(valkey.client(), "jay")
    # By an outbox: a killed server may forget what it was told while its disk was busy, and with it how far a sender
    # without one had counted.
    with Agent("z", valkey.url, outbox=tmp_path / "z") as z:
        with Agent("jay", valkey.url, outbox=tmp_path / "jay") as jay:
            z.send("jay", b"0")
            message = jay.receive(5)
            assert message is not None
            valkey.kill()
            jay.ack(message)
        valkey.start()
        z.send("jay", b"1")
        with Agent("jay", valkey.url, outbox=tmp_path / "jay") as jay:
            assert receive_all(jay, 1) == [b"1"]


def test_a_lost_reply_does_not_lose_what_was_being_received(
    valkey: ValkeyServer, em: ExecutionManager, tmp_path: Path
) -> None:
    make_known(valkey.client(), "jay")
    with ReplyThief(valkey.port) as thief, Agent("jay", thief.url, outbox=tmp_path / "jay") as jay:
        assert jay.receive(0.1) is None
        for payload in numbers(5):
            messages.send_once(valkey.client(), "z", "jay", payload, at=1.0)
        eventually(lambda: int(valkey.client().xlen(streams.inbox("jay"))) == 5)
        thief.steal_replies_of("XREADGROUP")
        assert receive_all(jay, 5) == numbers(5)
        assert thief.stolen == 1


def test_one_outbox_serves_one_process(valkey: ValkeyServer, tmp_path: Path) -> None:
    with (
        Agent("z", valkey.url, outbox=tmp_path / "z"),
        pytest.raises(AgentBackupError, match="in use by another process"),
    ):
        Agent("z", valkey.url, outbox=tmp_path / "z").open()
    with pytest.raises(AgentBackupError, match="belongs to “z”"):
        Outbox(tmp_path / "z", "jay")


def test_a_message_that_breaks_the_contract_is_refused_by_send(valkey: ValkeyServer, tmp_path: Path) -> None:
    with Agent("z", valkey.url, outbox=tmp_path / "z") as z:
        for to, payload in (("no one", b""), ("jay", "text"), ("jay", b"x" * 1024 * 1024)):
            with pytest.raises(InvalidEvent):
                z.send(to, payload)  # type: ignore[arg-type]
        assert z.waiting() == 0
    with pytest.raises(InvalidEvent):
        Agent("no one", valkey.url, outbox=tmp_path / "x")
