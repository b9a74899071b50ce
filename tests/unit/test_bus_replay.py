"""The short look at a message of the log that its recipient has: it may never count what `decode` would refuse."""

from __future__ import annotations

import math
from typing import Any

import fakeredis
import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from em_bridge import replay, streams
from em_bridge.errors import AgentBackupError, InvalidEvent
from em_bridge.events import MAX_PAYLOAD_BYTES, Message, decode, encode
from em_bridge.replay import Plan, plan_replay

HAS = 100
GOOD = {"from": "z", "to": "jay", "seq": 7, "payload": b"hello", "at": 1e9}

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, HAS + 3),
    st.floats(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.lists(st.integers(-(1 << 63), (1 << 64) - 1), max_size=2),
    st.sampled_from(["z", "jay", "ghost", 1e12, -0.5, math.nan, 7.0]),
)
bodies = st.builds(
    lambda good, changes, gone, more: {k: v for k, v in {**good, **changes, **more}.items() if k not in gone},
    st.just(GOOD),
    st.dictionaries(st.sampled_from(sorted(GOOD)), odd, max_size=2),
    st.sets(st.sampled_from(sorted(GOOD)), max_size=1),
    st.dictionaries(st.sampled_from(["log", "new", "seq"]), odd, max_size=1),
)


def census(*, recipient: str | None = None) -> Any:
    client: Any = fakeredis.FakeRedis()
    client.hset("em:last-seen:jay", mapping={"-": 0, "z": HAS, "no agent id": HAS})
    found = replay._Census(client, Plan("-", "+"), {"jay", "rick"}, recipient)
    found.consider("1-1", Message("z", "jay", 1, b""))
    return found


def row(raw: bytes, *, kind: bytes = b"message") -> streams.Row:
    return b"5-0", [b"type", kind, b"body", raw]


def counts(one: streams.Row) -> bool:
    looked = census()
    rest = looked.leave_out_known([one])
    assert rest in ([], [one])
    assert sum(looked._counted.values()) == 1 - len(rest)
    return not rest


def allowed(one: streams.Row) -> bool:
    """Say the same by the long way: a valid message that jay has."""
    try:
        message = decode(streams.entry_of(one)[1], stream=streams.MESSAGES)
    except InvalidEvent:
        return False
    assert isinstance(message, Message)
    return message.to == "jay" and message.sender == "z" and message.seq <= HAS


@given(bodies)
@example({**GOOD, "seq": True})
@example({**GOOD, "payload": "text"})
@example({**GOOD, "at": math.inf})
@example({**GOOD, "from": "no agent id"})
@example({**GOOD, "seq": -1})
def test_nothing_counts_as_received_that_is_no_valid_message(body: dict[str, Any]) -> None:
    one = row(msgpack.packb(body))
    assert not counts(one) or allowed(one)


@given(st.data())
def test_bytes_changed_anywhere_count_only_if_they_still_are_a_valid_message(data: st.DataObject) -> None:
    raw = bytearray(msgpack.packb(GOOD))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    one = row(bytes(raw))
    assert not counts(one) or allowed(one)


def test_the_plain_case_is_counted_without_the_long_way() -> None:
    assert counts(row(encode(Message("z", "jay", HAS, b"x", 1e9))[b"body"]))
    assert not counts(row(encode(Message("z", "jay", HAS + 1, b"x", 1e9))[b"body"]))


@pytest.mark.parametrize(
    "one",
    [
        row(msgpack.packb(GOOD), kind=b"heartbeat"),
        row(b"\x86" + msgpack.packb(GOOD)[1:] + msgpack.packb("seq") + msgpack.packb(8)),
        row(msgpack.packb({**GOOD, "payload": bytes(MAX_PAYLOAD_BYTES)})),
        (b"5-0", [b"body", msgpack.packb(GOOD), b"type", b"message"]),
        (b"5-0", [b"type", b"message"]),
        (b"5-0", []),
        row(b""),
        row(b"\x85"),
        row(b"\xc1"),
        row(b"\x91" * 100_000),
    ],
)
def test_what_looks_otherwise_goes_the_long_way(one: streams.Row) -> None:
    assert not counts(one)


def test_what_waits_in_the_inbox_is_never_taken_for_received() -> None:
    client: Any = fakeredis.FakeRedis()
    streams.ensure_group(client, streams.inbox("jay"), streams.INBOX_GROUP)
    # An agent of another make does not say what it has: what was delivered and does not wait counts as dealt with.
    client.hset("em:delivered:jay", mapping={"z": "9 9-0"})
    client.xadd(streams.inbox("jay"), encode(Message("z", "jay", 5, b"waits", 1.0)))
    assert replay._Knowledge(client, "jay").settled() == {"z": 4}


@pytest.fixture
def log() -> Any:
    """Return a server whose log holds ten messages from z to jay and ten to rick, all routed."""
    client: Any = fakeredis.FakeRedis()
    client.sadd(streams.SEEN, "jay", "rick")
    for number in range(1, 11):
        for name in ("jay", "rick"):
            client.xadd(streams.MESSAGES, encode(Message("z", name, number, b"x", 1.0)))
    streams.ensure_group(client, streams.MESSAGES, streams.ROUTER_GROUP)
    client.xgroup_setid(streams.MESSAGES, streams.ROUTER_GROUP, "$")
    for name in ("jay", "rick"):
        client.hset(f"em:last-seen:{name}", mapping={"-": 0, "z": 8})
    return client


def test_a_plan_says_of_every_message_who_has_it(log: Any) -> None:
    log.xadd(streams.MESSAGES, {"type": "message", "body": b"\xc1"})
    plan = plan_replay(log).as_dict()
    assert (plan["messages"], plan["already_there"], plan["redelivered"]) == (20, 16, 4)
    assert [(row["agent"], row["already_there"]) for row in plan["agents"]] == [("jay", 8), ("rick", 8)]


def test_a_plan_for_one_recipient_counts_no_other(log: Any) -> None:
    plan = plan_replay(log, recipient="rick").as_dict()
    assert (plan["messages"], plan["already_there"], plan["redelivered"]) == (10, 8, 2)


def test_a_part_of_the_log_is_split_where_the_router_stands(log: Any) -> None:
    entries = [raw for raw, _ in log.xrange(streams.MESSAGES)]
    log.xgroup_setid(streams.MESSAGES, streams.ROUTER_GROUP, entries[9])
    for start, end, routed, ahead in ((0, 19, 10, 10), (4, 14, 6, 5), (12, 19, 0, 8), (2, 6, 5, 0)):
        plan = plan_replay(log, entries[start].decode(), entries[end].decode()).as_dict()
        assert (plan["messages"], plan["not_yet_routed"]) == (routed + ahead, ahead)


def test_more_missing_than_can_be_moved_is_said_before_it_fills_the_memory(
    log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "MAX_MESSAGES", 1)
    with pytest.raises(AgentBackupError, match="lacks more than 1 messages"):
        plan_replay(log)
