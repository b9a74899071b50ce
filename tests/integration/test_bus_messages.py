"""Messages on a real Valkey: exactly once and in order, through crashes of everybody."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from em_bridge import Agent, ExecutionManager, messages, replay, streams
from em_bridge.connection import connect
from em_bridge.errors import AgentBackupError, InvalidEvent, LeaseLost
from em_bridge.events import MAX_BODY_BYTES, DeadLetter, Heartbeat, Message, decode, encode
from em_bridge.lease import Lease
from em_bridge.outbox import Outbox
from em_bridge.router import Router
from tests.integration.conftest import ValkeyServer, free_port
from tests.integration.processes import em_bridge, eventually, python
from tests.integration.wire import ReplyThief

pytestmark = pytest.mark.valkey


@pytest.fixture
def em(valkey: ValkeyServer) -> Iterator[ExecutionManager]:
    with ExecutionManager(valkey.url) as manager:
        assert manager.wait_until_leading(5)
        yield manager


def make_known(client: redis.Redis, *names: str) -> None:
    client.sadd(streams.SEEN, *names)


def receive_all(agent: Agent, number: int, *, timeout_s: float = 15.0) -> list[bytes]:
    """Receive and acknowledge until `number` messages are there, and then look whether more come."""
    found: list[bytes] = []
    deadline = time.monotonic() + timeout_s
    while len(found) < number and time.monotonic() < deadline:
        message = agent.receive(0.5)
        if message:
            found.append(message.payload)
            agent.ack(message)
    while message := agent.receive(0.3):
        found.append(message.payload)
    return found


def numbers(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


def log_of(client: redis.Redis) -> list[Message]:
    found = [decode(fields) for _, fields in streams.read_range(client, streams.MESSAGES)]
    assert all(isinstance(event, Message) for event in found)
    return found  # type: ignore[return-value]


def letters(client: redis.Redis) -> list[DeadLetter]:
    return [decode(fields) for _, fields in streams.read_range(client, streams.DEAD_LETTER)]  # type: ignore[misc]


# sending


def test_messages_arrive_once_and_in_order(
    valkey: ValkeyServer, em: ExecutionManager, tmp_path: Path
) -> None:
    with (
        Agent("z", valkey.url, outbox=tmp_path / "z") as z,
        Agent("jay", valkey.url, outbox=tmp_path / "jay") as jay,
    ):
        make_known(valkey.client(), "jay")
        sent = [z.send("jay", payload) for payload in numbers(300)]
        assert sent == list(range(1, 301))
        assert receive_all(jay, 300) == numbers(300)
        assert jay.last_seen("z") == 300


def test_a_message_sent_while_redis_is_away_leaves_when_it_is_back(
    valkey: ValkeyServer, tmp_path: Path
) -> None:
    valkey.kill()
    begun = time.monotonic()
    with Agent("z", valkey.url, outbox=tmp_path / "z") as z:
        assert z.send("jay", b"one") == 1
        assert z.receive(0.2) is None
        assert time.monotonic() - begun < 3
        valkey.start()
        eventually(lambda: z.waiting() == 0)
    assert [m.payload for m in log_of(valkey.client())] == [b"one"]


def test_a_message_survives_the_sender_that_never_met_redis(valkey: ValkeyServer, tmp_path: Path) -> None:
    code = (
        "import os,sys\nfrom em_bridge import Agent\n"
        "me = Agent('z', sys.argv[1], outbox=sys.argv[2]); me.open()\n"
        "for i in range(5): me.send('jay', b'%d' % i)\n"
        "os.kill(os.getpid(), 9)"
    )
    with python(tmp_path, "sender", code, f"redis://127.0.0.1:{free_port()}", str(tmp_path / "z")) as sender:
        assert sender.process.wait(10) == -9
    with Agent("z", valkey.url, outbox=tmp_path / "z") as z:
        z.send("jay", b"5")
        eventually(lambda: z.waiting() == 0)
    assert [(m.seq, m.payload) for m in log_of(valkey.client())] == [(i + 1, b"%d" % i) for i in range(6)]


def test_a_lost_reply_does_not_double_a_message(valkey: ValkeyServer, tmp_path: Path) -> None:
    with ReplyThief(valkey.port) as thief, Agent("z", thief.url, outbox=tmp_path / "z") as z:
        z.send("jay", b"0")
        eventually(lambda: z.waiting() == 0)
        thief.steal_replies_of("em:messages", times=3)
        for payload in numbers(10)[1:]:
            z.send("jay", payload)
        eventually(lambda: z.waiting() == 0)
        assert thief.stolen == 3
    assert [m.payload for m in log_of(valkey.client())] == numbers(10)


def test_nothing_is_lost_or_doubled_when_the_server_is_killed_while_sending(
    valkey: ValkeyServer, em: ExecutionManager, tmp_path: Path
) -> None:
    with (
        Agent("z", valkey.url, outbox=tmp_path / "z") as z,
        Agent("jay", valkey.url, outbox=tmp_path / "jay") as jay,
    ):
        make_known(valkey.client(), "jay")
        for number, payload in enumerate(numbers(600)):
            z.send("jay", payload)
            if number in (200, 400):
                valkey.kill()
            if number in (300, 500):
                valkey.start()
        assert receive_all(jay, 600, timeout_s=30) == numbers(600)
    assert [m.payload for m in log_of(valkey.client())] == numbers(600)


def test_what_a_server_lost_of_its_last_second_is_sent_again(valkey: ValkeyServer, tmp_path: Path) -> None:
    client = valkey.client()
    with Agent("z", valkey.url, outbox=tmp_path / "z") as z:
        z.send("jay", b"0")
        eventually(lambda: z.waiting() == 0)
        # As after a power cut: the server is back without what it had acknowledged, and nobody noticed a broken
        # connection.
        before = {key: client.dump(key) for key in (streams.MESSAGES, messages.sender_key("z"))}
        for payload in numbers(4)[1:]:
            z.send("jay", payload)
        eventually(lambda: z.waiting() == 0)
        for key, dump in before.items():
            assert isinstance(dump, bytes)
            client.restore(key, 0, dump, replace=True)
        z.send("jay", b"4")
        eventually(lambda: len(log_of(client)) == 5)
        eventually(lambda: z.waiting() == 0)
    assert [m.payload for m in log_of(client)] == numbers(5)


# numbers that collide


def test_a_restored_outbox_neither_repeats_nor_drops_a_message(valkey: ValkeyServer, tmp_path: Path) -> None:
    away = f"redis://127.0.0.1:{free_port()}"
    with Agent("z", away, outbox=tmp_path / "z") as z:
        for payload in numbers(3):
            z.send("jay", payload)
    shutil.copytree(tmp_path, tmp_path / "backup")
    with Agent("z", valkey.url, outbox=tmp_path / "z") as z:
        for payload in numbers(6)[3:]:
            z.send("jay", payload)
        eventually(lambda: z.waiting() == 0)
    for file in tmp_path.glob("z*"):
        file.unlink()
    for file in (tmp_path / "backup").glob("z*"):
        shutil.copy(file, tmp_path)
    # It still holds 1 to 3, which were sent, and counts from 4, as the other three messages did. In its first life
    # after the restore it does not even meet the server.
    with Agent("z", away, outbox=tmp_path / "z") as z:
        assert z.send("jay", b"6") == 4
    with Agent("z", valkey.url, outbox=tmp_path / "z") as z:
        z.send("jay", b"7")
        eventually(lambda: z.waiting() == 0)
    found = log_of(valkey.client())
    assert [m.payload for m in found] == numbers(8)
    assert [m.seq for m in found] == sorted({m.seq for m in found})


def test_a_new_outbox_goes_on_above_the_old_ones_numbers(valkey: ValkeyServer, tmp_path: Path) -> None:
    for life in range(3):
        with Agent("z", valkey.url, outbox=tmp_path / f"z{life}") as z:
            z.send("jay", b"%d" % (2 * life))
            z.send("jay", b"%d" % (2 * life + 1))
            eventually(lambda z=z: z.waiting() == 0)  # type: ignore[misc]
    assert [(m.seq, m.payload) for m in log_of(valkey.client())] == [(i + 1, b"%d" % i) for i in range(6)]


def test_a_message_sent_by_hand_for_a_running_agent_costs_it_none(
    valkey: ValkeyServer, em: ExecutionManager, tmp_path: Path
) -> None:
    client = valkey.client()
    make_known(client, "jay")
    with (
        Agent("z", valkey.url, outbox=tmp_path / "z") as z,
        Agent("jay", valkey.url, outbox=tmp_path / "jay") as jay,
    ):
        for payload in numbers(20):
            if int(payload) % 3 == 2:
                messages.send_once(client, "z", "jay", payload, at=1.0)
            else:
                z.send("jay", payload)
                eventually(lambda: z.waiting() == 0)
        assert receive_all(jay, 20) == numbers(20)


def test_one_message_by_hand_is_repeated_without_doubling(valkey: ValkeyServer) -> None:
    client = valkey.client()
    assert [messages.send_once(client, "z", "jay", b"x", at=1.0, line="same") for _ in range(3)] == [1, 1, 1]
    assert messages.send_once(client, "z", "jay", b"x", at=1.0) == 2
    assert len(log_of(client)) == 2


def test_many_lives_of_a_sender_do_not_fill_the_server(valkey: ValkeyServer) -> None:
    client = valkey.client()
    for number in range(messages.MAX_LINES * 2):
        assert messages.send_once(client, "z", "jay", b"x", at=1.0) == number + 1
    assert int(client.hlen(messages.sender_key("z"))) <= messages.MAX_LINES + 1


# receiving


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


def test_an_acknowledgement_while_redis_is_away_counts(
    valkey: ValkeyServer, em: ExecutionManager, tmp_path: Path
) -> None:
    make_known(valkey.client(), "jay")
    with Agent("jay", valkey.url, outbox=tmp_path / "jay") as jay:
        messages.send_once(valkey.client(), "z", "jay", b"0", at=1.0)
        message = jay.receive(5)
        assert message is not None
        valkey.kill()
        jay.ack(message)
    valkey.start()
    messages.send_once(valkey.client(), "z", "jay", b"1", at=1.0)
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


# routing


def router(valkey: ValkeyServer, holder: str = "one", ttl_s: float = 5.0) -> Router:
    lease = Lease(valkey.client(), "em", holder=holder, ttl_s=ttl_s)
    epoch = lease.acquire()
    assert epoch is not None
    return Router(connect(valkey.url, retrying=False), consumer=holder, epoch=epoch)


def drain(routing: Router) -> None:
    idle = 0
    while idle < 2:
        idle = 0 if routing.step(0.01) else idle + 1


def inbox_of(client: redis.Redis, agent: str) -> list[bytes]:
    found = [decode(fields) for _, fields in streams.read_range(client, streams.inbox(agent))]
    return [event.payload for event in found if isinstance(event, Message)]


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


# replay


def test_a_replay_gives_nobody_a_message_twice(
    valkey: ValkeyServer, em: ExecutionManager, tmp_path: Path
) -> None:
    client = valkey.client()
    make_known(client, "jay")
    for payload in numbers(10):
        messages.send_once(client, "z", "jay", payload, at=1.0)
    with Agent("jay", valkey.url, outbox=tmp_path / "jay") as jay:
        found = []
        for _ in range(5):
            message = jay.receive(5)
            assert message is not None
            jay.ack(message)
            found.append(message.payload)
        eventually(lambda: int(client.xlen(streams.inbox("jay"))) == 10)
        plan = replay.execute(client, replay.plan_replay(client))
        assert plan.as_dict()["redelivered"] == 0
        assert (plan.as_dict()["already_there"], plan.as_dict()["waiting_in_inbox"]) == (5, 5)
        assert found + receive_all(jay, 5) == numbers(10)


def test_a_replay_gives_a_restored_agent_what_came_after_its_backup_and_in_order(
    valkey: ValkeyServer, em: ExecutionManager, tmp_path: Path
) -> None:
    client = valkey.client()
    make_known(client, "jay")

    def send(start: int, end: int) -> None:
        for number in range(start, end):
            messages.send_once(client, "z", "jay", b"%d" % number, at=1.0)

    send(0, 3)
    with Agent("jay", valkey.url, outbox=tmp_path / "jay") as jay:
        assert receive_all(jay, 3) == numbers(3)
    shutil.copytree(tmp_path, tmp_path / "backup")
    send(3, 6)
    with Agent("jay", valkey.url, outbox=tmp_path / "jay") as jay:
        assert receive_all(jay, 3) == numbers(6)[3:]
    for file in tmp_path.glob("jay*"):
        file.unlink()
    for file in (tmp_path / "backup").glob("jay*"):
        shutil.copy(file, tmp_path)
    send(6, 8)
    eventually(lambda: int(client.xlen(streams.inbox("jay"))) == 8)
    with Agent("jay", valkey.url, outbox=tmp_path / "jay") as jay:
        eventually(lambda: client.hget("em:last-seen:jay", "z") == b"3")
        # It lacks 3 to 5, and 6 and 7 wait already: they must come after.
        plan = replay.plan_replay(client)
        assert plan.as_dict()["redelivered"] == 3
        replay.execute(client, plan)
        assert receive_all(jay, 5) == numbers(8)[3:]


def test_a_replay_leaves_unrouted_messages_to_the_router(valkey: ValkeyServer) -> None:
    client = valkey.client()
    make_known(client, "jay")
    messages.send_once(client, "z", "jay", b"0", at=1.0)
    assert replay.plan_replay(client).as_dict()["not_yet_routed"] == 1
    routing = router(valkey)
    drain(routing)
    messages.send_once(client, "z", "jay", b"1", at=1.0)
    messages.send_once(client, "z", "ghost", b"2", at=1.0)
    plan = replay.execute(client, replay.plan_replay(client)).as_dict()
    assert (plan["not_yet_routed"], plan["waiting_in_inbox"], plan["redelivered"]) == (2, 1, 0)
    drain(routing)
    assert replay.plan_replay(client).as_dict()["unknown_recipient"] == 1
    assert inbox_of(client, "jay") == [b"0", b"1"]


# the whole


SENDER = """
import sys, time
from em_bridge import Agent
name, url, outbox, to, count = sys.argv[1:]
with Agent(name, url, outbox=outbox) as me:
    for number in range(int(count)):
        me.send(to, b"%d" % number)
        time.sleep(0.003)
    while me.waiting():
        time.sleep(0.05)
"""


def test_the_em_is_killed_while_agents_send_and_every_message_arrives_once_in_order(
    valkey: ValkeyServer, tmp_path: Path
) -> None:
    count = 400
    make_known(valkey.client(), "jay", "rick")
    receivers = {
        name: em_bridge(
            tmp_path, name, valkey.url, "agent", name, "--json", "--outbox", str(tmp_path / f"{name}.outbox")
        )
        for name in ("jay", "rick")
    }
    em = em_bridge(tmp_path, "em", valkey.url, "em")
    senders = [
        python(tmp_path, name, SENDER, name, valkey.url, str(tmp_path / name), to, str(count))
        for name, to in (("z", "jay"), ("leroy", "jay"), ("moe", "rick"))
    ]
    for life in range(4):
        time.sleep(0.5)
        em.kill()
        em = em_bridge(tmp_path, f"em{life}", valkey.url, "em")
    with em, receivers["jay"], receivers["rick"], senders[0], senders[1], senders[2]:
        for sender in senders:
            assert sender.process.wait(60) == 0
        expected = {"jay": 2 * count, "rick": count}
        for name, receiver in receivers.items():
            eventually(lambda n=name, r=receiver: len(r.lines()) >= expected[n], 30)  # type: ignore[misc]
        time.sleep(0.3)
        for name, receiver in receivers.items():
            rows = [json.loads(line) for line in receiver.lines()]
            assert len(rows) == expected[name]
            for sender_name in {row["from"] for row in rows}:
                got = [row["payload"] for row in rows if row["from"] == sender_name]
                assert got == [str(number) for number in range(count)]
        assert em.end() == 0
    assert valkey.client().xpending(streams.MESSAGES, streams.ROUTER_GROUP)["pending"] == 0


def test_of_two_managers_one_routes_and_the_other_takes_over(valkey: ValkeyServer, tmp_path: Path) -> None:
    client = valkey.client()
    make_known(client, "jay")
    with em_bridge(tmp_path, "em1", valkey.url, "em") as one:
        eventually(lambda: "leading" in one.err.read_text())
        with em_bridge(tmp_path, "em2", valkey.url, "em") as two:
            eventually(lambda: "waiting" in two.err.read_text())
            assert "leading" not in two.err.read_text()
            messages.send_once(client, "z", "jay", b"0", at=1.0)
            eventually(lambda: inbox_of(client, "jay") == [b"0"])
            one.kill()
            killed = time.monotonic()
            messages.send_once(client, "z", "jay", b"1", at=1.0)
            eventually(lambda: inbox_of(client, "jay") == [b"0", b"1"])
            assert time.monotonic() - killed < 2, "on the same host a killed EM's lease need not run out"
            assert two.end() == 0
    assert client.get("em:lease:em") is None


def test_a_frozen_manager_that_wakes_up_writes_nothing(valkey: ValkeyServer, tmp_path: Path) -> None:
    client = valkey.client()
    make_known(client, "jay")
    with em_bridge(tmp_path, "em1", valkey.url, "em") as one:
        eventually(lambda: "leading" in one.err.read_text())
        one.process.send_signal(signal.SIGSTOP)
        with ExecutionManager(valkey.url, lease_ttl_s=2) as two:
            assert two.wait_until_leading(10)
            for payload in numbers(5):
                messages.send_once(client, "z", "jay", payload, at=1.0)
            one.process.send_signal(signal.SIGCONT)
            eventually(lambda: "newer holder" in one.err.read_text() or "was lost" in one.err.read_text())
            eventually(lambda: inbox_of(client, "jay") == numbers(5))
            assert two.leading
