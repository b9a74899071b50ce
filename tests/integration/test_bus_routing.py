"""From the log into inboxes on a real Valkey: each message once, whatever lies there and whoever leads."""

from __future__ import annotations

import time

import pytest
import redis

from em_bridge import messages, streams
from em_bridge.connection import connect
from em_bridge.errors import LeaseLost
from em_bridge.events import MAX_BODY_BYTES, Heartbeat, Message, encode
from em_bridge.lease import Lease
from em_bridge.router import Router
from tests.integration.conftest import ValkeyServer
from tests.integration.talk import drain, inbox_of, letters, make_known, numbers, router
from tests.integration.wire import ReplyThief

pytestmark = pytest.mark.valkey


def test_invalid_entries_and_unknown_recipients_become_dead_letters(valkey: ValkeyServer) -> None:
    client = valkey.client()
    make_known(client, "jay")
    for fields in (
        {b"type": b"message", b"body": b"\xc1"},
        {b"foo": b"bar"},
        encode(Message("z", "ghost", 1, b"boo")),
    ):
        client.xadd(streams.MESSAGES, fields)  # type: ignore[arg-type]
    client.xadd(streams.MESSAGES, encode(Message("z", "jay", 2, b"fine")))  # type: ignore[arg-type]
    drain(router(valkey))
    assert inbox_of(client, "jay") == [b"fine"]
    reasons = [letter.reason for letter in letters(client)]
    assert reasons[0].startswith("message: the body is not msgpack")
    assert reasons[1:] == ["the entry has no field “type”", "unknown recipient “ghost”"]
    assert letters(client)[1].raw == {"foo": b"bar"}
    assert client.xpending(streams.MESSAGES, streams.ROUTER_GROUP)["pending"] == 0


def test_whoever_has_beaten_gets_messages_though_no_monitor_saw_it_yet(valkey: ValkeyServer) -> None:
    client = valkey.client()
    routing = router(valkey)
    client.xadd(streams.HEARTBEATS, {b"type": b"heartbeat", b"body": b"\xc1"})
    for name in ("node", "deno"):
        streams.append(client, Heartbeat(name, "i1", 0))
        messages.send_once(client, "z", name, name.encode(), at=1.0)
        messages.send_once(client, "z", "ghost", b"boo", at=1.0)
        drain(routing)
        assert inbox_of(client, name) == [name.encode()]
    assert client.smembers(streams.SEEN) == {b"node", b"deno"}
    assert [letter.reason for letter in letters(client)] == ["unknown recipient “ghost”"] * 2


def test_a_message_that_only_just_fits_does_not_stop_the_router(valkey: ValkeyServer) -> None:
    client = valkey.client()
    make_known(client, "jay")
    spare = MAX_BODY_BYTES - len(encode(Message("z", "jay", 1, b"x" * 100_000))[b"body"])
    client.xadd(streams.MESSAGES, encode(Message("z", "jay", 1, b"x" * (100_000 + spare))))  # type: ignore[arg-type]
    client.xadd(streams.MESSAGES, encode(Message("z", "jay", 2, b"fine")))  # type: ignore[arg-type]
    drain(router(valkey))
    assert inbox_of(client, "jay") == [b"fine"]
    [letter] = letters(client)
    assert "the limit is 1048576" in letter.reason and "cut" in letter.reason


def test_a_recipient_of_the_fleet_has_an_inbox_before_it_ever_ran(valkey: ValkeyServer) -> None:
    client = valkey.client()
    client.hset(streams.FLEET, "rick", b"\x80")
    messages.send_once(client, "z", "rick", b"hello", at=1.0)
    drain(router(valkey))
    assert inbox_of(client, "rick") == [b"hello"]
    time.sleep(0.01)
    assert streams.trim(client, streams.inbox("rick"), older_than_s=0) == 0


def test_an_inbox_that_cannot_take_a_message_does_not_hold_up_the_others(valkey: ValkeyServer) -> None:
    client = valkey.client()
    make_known(client, "jay", "rick")
    client.set(streams.inbox("rick"), "a key of another type")
    for payload in numbers(3):
        messages.send_once(client, "z", "rick", payload, at=1.0)
        messages.send_once(client, "z", "jay", payload, at=1.0)
    drain(router(valkey))
    assert inbox_of(client, "jay") == numbers(3)
    assert len(letters(client)) == 3


def test_a_damaged_memory_of_one_recipient_does_not_double_the_others_messages(valkey: ValkeyServer) -> None:
    client = valkey.client()
    make_known(client, "jay", "rick")
    client.set("em:delivered:rick", "a key of another type")
    for payload in numbers(3):
        messages.send_once(client, "z", "jay", payload, at=1.0)
        messages.send_once(client, "z", "rick", payload, at=1.0)
    drain(router(valkey))
    assert inbox_of(client, "jay") == numbers(3) and inbox_of(client, "rick") == []
    assert ["delivered before is unknown" in letter.reason for letter in letters(client)] == [True] * 3


def test_a_message_waits_for_a_server_whose_memory_is_full(valkey: ValkeyServer) -> None:
    client = valkey.client()
    make_known(client, "jay", "rick")
    routing = router(valkey)
    drain(routing)
    for payload in numbers(3):
        messages.send_once(client, "z", "jay", payload, at=1.0)
    client.config_set("maxmemory", "1")
    with pytest.raises(redis.ResponseError):
        drain(routing)
    client.config_set("maxmemory", "0")
    drain(routing)
    assert inbox_of(client, "jay") == numbers(3) and letters(client) == []


def test_a_reply_lost_while_routing_doubles_nothing(valkey: ValkeyServer) -> None:
    client = valkey.client()
    make_known(client, "jay")
    with ReplyThief(valkey.port) as thief:
        lease = Lease(client, "em", holder="one", ttl_s=60)
        epoch = lease.acquire()
        assert epoch is not None
        routing = Router(connect(thief.url, retrying=False), consumer="one", epoch=epoch)
        drain(routing)
        for payload in numbers(5):
            messages.send_once(client, "z", "jay", payload, at=1.0)
            messages.send_once(client, "z", "ghost", payload, at=1.0)
        thief.steal_replies_of("em:inbox:jay")
        with pytest.raises(redis.ConnectionError):
            drain(routing)
        drain(routing)
    assert inbox_of(client, "jay") == numbers(5)
    assert len(letters(client)) == 5


def test_a_deposed_router_neither_writes_nor_takes_entries_away(valkey: ValkeyServer) -> None:
    client = valkey.client()
    make_known(client, "jay")
    old = router(valkey, "old", ttl_s=0.05)
    drain(old)
    time.sleep(0.1)
    new = router(valkey, "new")
    drain(new)
    messages.send_once(client, "z", "jay", b"0", at=1.0)
    with pytest.raises(LeaseLost):
        old.step(0.01)
    assert client.xpending(streams.MESSAGES, streams.ROUTER_GROUP)["pending"] == 0
    drain(new)
    assert inbox_of(client, "jay") == [b"0"]


def test_a_successor_first_routes_what_its_predecessor_left(valkey: ValkeyServer) -> None:
    client = valkey.client()
    make_known(client, "jay")
    for payload in numbers(1200):
        messages.send_once(client, "z", "jay", payload, at=1.0, line="l" + payload.decode())
    streams.ensure_group(client, streams.MESSAGES, streams.ROUTER_GROUP)
    client.xreadgroup(streams.ROUTER_GROUP, "killed", {streams.MESSAGES: ">"}, count=1100)
    drain(router(valkey))
    assert inbox_of(client, "jay") == numbers(1200)
    [consumer] = client.xinfo_consumers(streams.MESSAGES, streams.ROUTER_GROUP)
    assert consumer["name"] == b"one"


def test_a_log_routed_again_from_its_beginning_doubles_nothing(valkey: ValkeyServer) -> None:
    client = valkey.client()
    make_known(client, "jay")
    for payload in numbers(5):
        messages.send_once(client, "z", "jay", payload, at=1.0)
    first = router(valkey)
    drain(first)
    client.xgroup_setid(streams.MESSAGES, streams.ROUTER_GROUP, "0")
    drain(first)
    assert inbox_of(client, "jay") == numbers(5) and letters(client) == []


def test_a_foreign_sender_whose_numbers_start_again_is_not_dropped_silently(valkey: ValkeyServer) -> None:
    client = valkey.client()
    make_known(client, "jay")
    for seq in (1, 2, 1):
        client.xadd(streams.MESSAGES, encode(Message("node", "jay", seq, b"%d" % seq)))  # type: ignore[arg-type]
    drain(router(valkey))
    assert inbox_of(client, "jay") == [b"1", b"2"]
    [letter] = letters(client)
    assert "number 1 does not grow: 2 was delivered before" in letter.reason
