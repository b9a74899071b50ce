"""Events: what is accepted, what is refused, and that no bytes get past `decode` as anything but InvalidEvent."""

from __future__ import annotations

import math

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from em_bridge import Publisher, events
from em_bridge.errors import InvalidEvent
from em_bridge.events import (
    AgentState,
    ConfigApplied,
    ConfigApproved,
    ConfigProposed,
    ConfigRejected,
    DeadLetter,
    Heartbeat,
    Message,
    decode,
    encode,
)

EXAMPLES = [
    AgentState("z", "DEAD", "no heartbeat for 60 s", 1.5, "i1"),
    AgentState("z", "ALIVE"),
    ConfigProposed("c1", "z", ("rules/a.md",), "em", proposed={"rules/a.md": b"\xff\0"}),
    ConfigApproved("c1", "kari", signature="-----BEGIN SSH SIGNATURE-----"),
    ConfigRejected("c1", "kari", "too bold", 3.0),
    ConfigApplied("c1", "z", ("priority_weights.json",), "em", "kari"),
    Message("z", "jay", 7, b"\0\xff", 2.0),
    Heartbeat("z", "i1", 9, "ok", 4711),
    DeadLetter(source="em:messages", entry="1-1", reason="why", at=1.0, raw={"type": b"x", "body": b"\xff"}),
]


def entry(kind: str, body: object) -> dict[bytes, bytes]:
    return {b"type": kind.encode(), b"body": msgpack.packb(body)}


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda e: e.type)
def test_what_is_encoded_is_decoded_to_the_same(event: events.Event) -> None:
    assert decode(encode(event)) == event


def test_the_wire_keys_are_those_of_the_contract() -> None:
    body = msgpack.unpackb(encode(Message("z", "jay", 1, b"hi"))[b"body"])
    assert body == {"from": "z", "to": "jay", "seq": 1, "payload": b"hi"}
    body = msgpack.unpackb(encode(EXAMPLES[-1])[b"body"])
    assert body.keys() == {"stream", "entry", "reason", "at", "raw"}


def test_unknown_keys_and_null_options_are_ignored() -> None:
    body = {"agent": "z", "state": "DEAD", "at": None, "reason": None, "new": [1, {2: 3}], 5: "int key"}
    assert decode(entry("agent.state", body)) == AgentState("z", "DEAD")


@pytest.mark.parametrize(
    ("kind", "body", "reason"),
    [
        ("agent.state", {"agent": "z"}, "“state” is missing"),
        ("agent.state", {"agent": "z", "state": "SLEEPY"}, "“SLEEPY”, not one of ALIVE, DEGRADED, DEAD"),
        ("agent.state", {"agent": "../z", "state": "DEAD"}, "not an agent id"),
        ("agent.state", {"agent": "z\n", "state": "DEAD"}, "not an agent id"),
        ("agent.state", {"agent": b"z", "state": "DEAD"}, "“agent” is not text"),
        ("agent.state", {"agent": "z" * 64, "state": "DEAD"}, "not an agent id"),
        ("agent.state", {"agent": "z", "state": "DEAD", "at": math.nan}, "not a finite number"),
        ("agent.state", {"agent": "z", "state": "DEAD", "at": True}, "“at” is not a number"),
        ("agent.state", {"agent": "z", "state": "DEAD", "at": 1.7e12}, "not a time in Unix seconds"),
        ("config.applied", {"change": "c", "agent": "z", "paths": ["/etc/passwd"]}, "an absolute path"),
        ("config.applied", {"change": "c", "agent": "z", "paths": ["a/../../b"]}, "leaves the agent's root"),
        ("config.applied", {"change": "c", "agent": "z", "paths": "a"}, "not a list of paths"),
        ("config.applied", {"change": "", "agent": "z", "paths": ["a"]}, "“change” is empty"),
        ("config.applied", {"change": "c\x1b[2J", "agent": "z", "paths": []}, "control characters"),
        (
            "config.proposed",
            {"change": "c", "agent": "z", "paths": [], "by": "em", "proposed": {"a": "text"}},
            "not bytes",
        ),
        ("message", {"from": "z", "to": "jay", "seq": True, "payload": b""}, "“seq” is not a whole number"),
        ("message", {"from": "z", "to": "jay", "seq": -1, "payload": b""}, "out of range"),
        ("message", {"from": "z", "to": "jay", "seq": 2**63, "payload": b""}, "out of range"),
        ("message", {"from": "z", "to": "jay", "seq": 1, "payload": "text"}, "“payload” is not bytes"),
        ("message", {"from": "z", "to": "jay", "seq": 1}, "“payload” is missing"),
        ("heartbeat", ["z"], "not a map"),
        ("heartbeet", {}, "unknown type “heartbeet”"),
    ],
)
def test_a_body_that_breaks_the_contract_says_where(kind: str, body: object, reason: str) -> None:
    with pytest.raises(InvalidEvent) as caught:
        decode(entry(kind, body))
    assert reason in caught.value.message


def test_the_entry_itself_may_be_broken() -> None:
    deep: object = b"bottom"
    for _ in range(40):
        deep = [deep]
    bodies = {
        b"": "not msgpack",
        b"\xc1": "not msgpack",
        b"\x81\xa1\xff\x01": "not msgpack",
        b"\xdf\xff\xff\xff\xff": "not msgpack",
        b"\x91" * 100_000: "too deep",
        msgpack.packb({"agent": "z", "state": "DEAD"}) + b"\x00": "bytes follow",
        b"\x82\xa5agent\xa1z\xa5agent\xa1z": "stands twice",
        msgpack.packb({"x": deep}): "deeper than",
        b"\x80" + b" " * events.MAX_BODY_BYTES: "the limit is 1048576",
    }
    for body, reason in bodies.items():
        with pytest.raises(InvalidEvent) as caught:
            decode({b"type": b"agent.state", b"body": body})
        assert reason in caught.value.message, (body[:20], caught.value.message)
    for fields in ({}, {b"type": b"message"}, {b"body": b""}, {b"type": b"\xff" * 500, b"body": b"\x80"}):
        with pytest.raises(InvalidEvent):
            decode(fields)


def test_an_event_may_stand_only_on_its_own_stream() -> None:
    fields = encode(Message("z", "jay", 1, b""))
    assert decode(fields, stream="em:messages") == decode(fields, stream="em:inbox:jay")
    with pytest.raises(InvalidEvent, match="does not belong on “em:agent-state”"):
        decode(fields, stream="em:agent-state")


def test_an_event_that_breaks_the_contract_cannot_be_built() -> None:
    for broken in (
        lambda: AgentState("z", "dead"),
        lambda: AgentState("z", "DEAD", "half a pair \ud800"),
        lambda: Message("z", "jay", 1, "text"),  # type: ignore[arg-type]
        lambda: Message("z", "no one", 1, b""),
        lambda: ConfigApplied("c", "z", ("../x",)),
    ):
        with pytest.raises(InvalidEvent):
            broken()


def test_a_body_above_one_mebibyte_is_not_encoded() -> None:
    with pytest.raises(InvalidEvent, match="the limit is 1048576"):
        encode(Message("z", "jay", 1, b"x" * events.MAX_BODY_BYTES))
    assert (
        len(encode(Message("z", "jay", 2**53, b"x" * events.MAX_PAYLOAD_BYTES, 1.0))[b"body"])
        <= events.MAX_BODY_BYTES
    )


leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
trees = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(leaves, inner), max_leaves=8)
keys = st.sampled_from(
    [
        "agent",
        "state",
        "change",
        "paths",
        "by",
        "from",
        "to",
        "seq",
        "payload",
        "at",
        "log",
        "raw",
        "proposed",
        "entry",
    ]
)
kinds = st.sampled_from([e.type.encode() for e in EXAMPLES]) | st.binary(max_size=80)


@given(kinds, st.binary(max_size=200))
def test_random_bytes_end_as_invalid_event(kind: bytes, body: bytes) -> None:
    try:
        decode({b"type": kind, b"body": body})
    except InvalidEvent as error:
        assert error.message and "\n" not in error.message


@given(kinds, st.dictionaries(keys | leaves, trees | st.sampled_from(["z", "DEAD", b"", 1, 2.0]), max_size=8))
def test_random_maps_end_as_an_event_or_as_invalid_event(kind: bytes, body: dict[object, object]) -> None:
    try:
        event = decode({b"type": kind, b"body": msgpack.packb(body)})
    except InvalidEvent as error:
        assert "\n" not in error.message
    else:
        assert decode(encode(event)) == event


def test_one_path_is_not_taken_for_a_list_of_its_letters() -> None:
    with Publisher("redis://127.0.0.1:1/0", patience_s=0.0) as em:
        for publish in (em.config_proposed, em.config_applied):
            with pytest.raises(InvalidEvent, match="“notes”, not a list of paths"):
                publish(change="c1", agent="z", paths="notes", by="em")
