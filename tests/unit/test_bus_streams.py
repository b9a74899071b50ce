"""Streams, lease, publisher and log view on fakeredis: what other units may rely on without a server."""

from __future__ import annotations

import fakeredis
import pytest

from em_bridge import Publisher, logview, streams
from em_bridge.errors import InvalidEvent, LeaseLost, NotFound, UsageError
from em_bridge.events import AgentState, Heartbeat, Message, decode, encode
from em_bridge.lease import Lease, epoch_key
from em_bridge.scripts import Script


@pytest.fixture
def client() -> fakeredis.FakeRedis:
    return fakeredis.FakeRedis(server_type="valkey")


def test_a_publish_stands_on_its_stream(client: fakeredis.FakeRedis) -> None:
    entry = Publisher(client).agent_state("z", "DEAD", reason="gone")
    [(found, fields)] = streams.read_range(client, streams.AGENT_STATE)
    event = decode(fields, stream=streams.AGENT_STATE)
    assert found == entry and isinstance(event, AgentState) and event.at is not None


def test_what_breaks_the_contract_is_not_published(client: fakeredis.FakeRedis) -> None:
    em = Publisher(client)
    with pytest.raises(InvalidEvent):
        em.agent_state("z", "dead")
    with pytest.raises(InvalidEvent):
        em.config_applied("c", "z", ["/etc/passwd"])
    assert client.keys("*") == []


def test_append_once_and_trim_and_groups_work_here_as_well(client: fakeredis.FakeRedis) -> None:
    beat = Heartbeat("z", "i", 1)
    assert streams.append_once(client, beat, once="a") == streams.append_once(client, beat, once="a")
    streams.ensure_group(client, streams.HEARTBEATS, "g")
    streams.ensure_group(client, streams.HEARTBEATS, "g")
    assert streams.trim(client, streams.HEARTBEATS, older_than_s=-60) == 0
    [[_, [(entry, _)]]] = client.xreadgroup("g", "c", {streams.HEARTBEATS: ">"})
    client.xack(streams.HEARTBEATS, "g", entry)
    streams.append(client, beat)
    assert streams.trim(client, streams.HEARTBEATS, older_than_s=-60) == 0
    client.xgroup_destroy(streams.HEARTBEATS, "g")
    assert streams.trim(client, streams.HEARTBEATS, older_than_s=-60) == 2


def test_a_lease_fences_here_as_well(client: fakeredis.FakeRedis) -> None:
    write = Script("return redis.call('SET', KEYS[2], ARGV[2])", fenced=True)
    one, two = (Lease(client, "em", holder=name, ttl_s=60) for name in ("one", "two"))
    epoch = one.acquire()
    assert epoch is not None and two.acquire() is None and two.acquire(gone=lambda holder: holder == "one")
    with pytest.raises(LeaseLost):
        write(client, (epoch_key("em"), "k"), (epoch, "v"))
    assert not one.renew() and client.get("k") is None


@pytest.mark.parametrize(
    ("text", "last", "entry"),
    [
        ("1795400000000-3", False, "1795400000000-3"),
        ("1795400000000", False, "1795400000000"),
        ("1795400000", False, "1795400000000-0"),
        ("1795400000.25", True, "1795400000250"),
        ("2026-11-23T07:00:00Z", False, "1795417200000-0"),
        ("2026-11-23T08:00:00.5+01:00", True, "1795417200500"),
        ("0", False, "0-0"),
    ],
)
def test_a_place_in_the_log_is_an_id_or_a_time(text: str, last: bool, entry: str) -> None:
    assert logview.position(text, last=last) == entry


@pytest.mark.parametrize("text", ["yesterday", "", "1-", "12:00", "-5", "nan", "1e9", "2026-13-01"])
def test_a_place_that_is_neither_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="neither an entry id nor a time"):
        logview.position(text)


def test_nothing_an_agent_wrote_reaches_a_terminal_as_control_characters() -> None:
    entries = [
        encode(Message("z", "jay", 1, b"\x1b[2J\r\n\x9b hidden")),
        encode(AgentState("z", "DEAD", "\x1b]0;title\x07")),
        {b"type": b"\x1b[31m", b"body": b""},
    ]
    for fields in entries:
        line = logview.text_line(logview.entry_row("em:messages", "1-1", fields))
        assert line.isprintable(), line


def test_errors_carry_the_exit_codes_of_the_contract() -> None:
    assert (UsageError("x").exit_code, NotFound("x").exit_code, InvalidEvent("x").exit_code) == (2, 4, 2)
