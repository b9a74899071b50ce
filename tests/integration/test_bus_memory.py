"""Every stream is bounded by time, also where nobody reads it any more, and nothing goes that somebody needs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from em_bridge import Agent, ExecutionManager, em, streams
from em_bridge.events import AgentState, ConfigApproved, DeadLetter, Heartbeat, Message, decode, encode
from em_bridge.expiry import expire
from tests.integration.conftest import ValkeyServer
from tests.integration.processes import eventually

pytestmark = pytest.mark.valkey


def test_what_waited_too_long_for_an_agent_that_is_gone_becomes_a_dead_letter(valkey: ValkeyServer) -> None:
    client = valkey.client()
    stream = streams.inbox("gone")
    assert expire(client, "gone", older_than_s=0) == 0
    streams.ensure_group(client, stream, streams.INBOX_GROUP)
    for number in range(250):
        client.xadd(stream, encode(Message("z", "gone", number, b"%d" % number)))  # type: ignore[arg-type]
    ids = [entry for entry, _ in streams.read_range(client, stream)]
    # The first ten were handed out; of these five were acknowledged, and are behind the agent.
    client.xreadgroup(streams.INBOX_GROUP, "gone", {stream: ">"}, count=10)
    client.xack(stream, streams.INBOX_GROUP, *ids[5:10])
    assert expire(client, "gone", older_than_s=60) == 0
    time.sleep(0.01)
    assert expire(client, "gone", older_than_s=0) == 245
    assert [entry for entry, _ in streams.read_range(client, stream)] == ids[5:10]
    assert client.xpending(stream, streams.INBOX_GROUP)["pending"] == 0
    letters = [decode(fields) for _, fields in streams.read_range(client, streams.DEAD_LETTER)]
    assert [letter.entry for letter in letters if isinstance(letter, DeadLetter)] == ids[:5] + ids[10:]
    first = letters[0]
    assert isinstance(first, DeadLetter) and "“gone” has not received it" in first.reason
    lost = decode({key.encode(): value for key, value in first.raw.items()})
    assert isinstance(lost, Message) and lost.payload == b"0"
    assert expire(client, "gone", older_than_s=0) == 0


def test_the_manager_keeps_every_stream_within_its_time(
    valkey: ValkeyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "TRIM_S": 0.2, "HEARTBEAT_RETENTION_S": 1.0, "INBOX_RETENTION_S": 1.0, "DEAD_LETTER_RETENTION_S": 1.0,
    }.items():  # fmt: skip
        monkeypatch.setattr(em, name, value)
    client = valkey.client()
    client.sadd(streams.SEEN, "gone")
    with (
        ExecutionManager(valkey.url, retention_s=1.0, heartbeat_s=0.1) as manager,
        Agent("z", valkey.url, outbox=tmp_path / "z", heartbeat_s=0.1) as z,
        Agent("jay", valkey.url, outbox=tmp_path / "jay", heartbeat_s=0.1) as jay,
    ):
        assert manager.wait_until_leading(5)
        eventually(lambda: client.sismember(streams.SEEN, "jay"))
        streams.append(client, AgentState("z", "ALIVE"))
        streams.append(client, ConfigApproved("c1", "kari"))
        streams.append(client, Heartbeat("moe", "i", 1))
        for number in range(50):
            z.send("jay" if number % 2 else "gone", b"%d" % number)
        z.send("ghost", b"nobody")
        for number in range(1, 50, 2):
            message = jay.receive(5)
            assert message is not None and message.payload == b"%d" % number
            jay.ack(message)
        eventually(lambda: not client.xlen(streams.inbox("gone")) and client.xlen(streams.DEAD_LETTER) >= 25)

        def quiet() -> bool:
            # A group's last delivered entry stays: the server has no other memory of where the group stands.
            left = [int(client.xlen(name)) for name in (streams.MESSAGES, streams.inbox("jay"))]
            gone = (streams.AGENT_STATE, streams.CONFIG_CHANGE, streams.DEAD_LETTER, streams.inbox("gone"))
            return max(left) <= 1 and not any(client.xlen(name) for name in gone)

        eventually(quiet, 20)
        assert int(client.xlen(streams.HEARTBEATS)) < 60
    keys = {key.partition(b":once:")[1] or key for key in client.scan_iter()}
    assert len(keys) < 25, keys
