"""Nonsense on every stream: each entry is a dead letter with a reason, and the consumer goes on to the next."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import redis

from backup_worker.dispatcher import Dispatcher
from em_bridge import events, streams
from em_bridge.connection import connect
from em_bridge.errors import InvalidEvent
from em_bridge.events import DeadLetter, Event, Heartbeat, Message, decode, encode, to_wire
from em_bridge.inbox import Inbox
from em_bridge.lease import Lease
from em_bridge.monitor import Monitor
from em_bridge.outbox import Outbox
from em_bridge.router import Router
from tests.integration.conftest import ValkeyServer

pytestmark = pytest.mark.valkey

DUE = "em:due"
GOOD: dict[str, Event] = {
    "em:agent-state": events.AgentState("z", "DEAD", "why", 1.0, "i1"),
    "em:config-change": events.ConfigApplied("c1", "z", ("a",), "em", "kari", "why", 1.0),
    "em:messages": Message("z", "jay", 10**9, b"last", 1.0),
    "em:inbox:jay": Message("z", "jay", 10**9, b"last", 1.0),
    "em:heartbeats": Heartbeat("jay", "i1", 1, "ok", 1),
}
MORE: tuple[Event, ...] = (
    events.ConfigProposed("c1", "z", ("a",), "em", "why", 1.0, {"a": b"x"}),
    events.ConfigApproved("c1", "kari", "why", 1.0, b"signed"),
    events.ConfigRejected("c1", "kari", "why", 1.0, "signed"),
)


def _nested(depth: int) -> Any:
    found: Any = b"bottom"
    for _ in range(depth):
        found = [found]
    return found


WRONG: list[Any] = [
    None, True, False, -1, 2**53 + 1, 2**64 - 1, -(2**63), 1.5, math.nan, math.inf, -math.inf, 1e300, "", "x", "../x",
    "/x", "x\n", "x\0", "\x1b[2J", "é" * 300, "y" * 5000, b"", b"\xff", [], [1], [None], ["../x"], ["/x"], [[]],
    {}, {"a": 1}, {1: 2}, {"../x": b""}, {"a": "text"}, _nested(3), _nested(40), msgpack.ExtType(5, b"x"),
    msgpack.Timestamp(1, 1),
]  # fmt: skip


def wrong_bodies(event: Event) -> Iterator[bytes]:
    """Every key with every wrong value, and without it."""
    body = to_wire(event)
    for key in body:
        yield msgpack.packb({name: value for name, value in body.items() if name != key})
        for value in WRONG:
            yield msgpack.packb(body | {key: value})


def nonsense(dice: random.Random, event: Event) -> Iterator[dict[bytes, bytes]]:
    """Random bytes, cut and flipped bodies, announced lengths that do not come, entries without our fields."""
    kind, whole = event.type.encode(), encode(event)[b"body"]
    for _ in range(150):
        yield {b"type": kind, b"body": dice.randbytes(dice.randrange(60))}
        flipped = bytearray(whole)
        flipped[dice.randrange(len(whole))] = dice.randrange(256)
        yield {b"type": kind, b"body": bytes(flipped)}
    for cut in range(len(whole)):
        yield {b"type": kind, b"body": whole[:cut]}
    for body in (
        b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\x91" * 100_000, b"\x81\xa1a" * 5000, whole + b"\0", b"\x80" + b" " * events.MAX_BODY_BYTES, b"\xc1",
    ):  # fmt: skip
        yield {b"type": kind, b"body": body}
    yield from (
        {b"type": kind}, {b"body": whole}, {b"\xff": b"\xff"}, {b"type": b"", b"body": whole},
        {b"type": b"\xff" * 300, b"body": whole}, {b"type": b"x" * 100_000, b"body": whole},
        {b"type": b"backup.due", b"body": whole}, {b"type": b"dead-letter", b"body": whole},
        {b"type": kind, b"body": b"\x80", b"more": b"z" * 3_000_000},
    )  # fmt: skip


def flood(client: redis.Redis, stream: str, *, seed: int) -> list[str]:
    """Append nonsense, and a good entry at the end; return the reasons that are due, in order."""
    dice = random.Random(seed)
    examples = [GOOD[stream], *(e for e in MORE if e.stream == stream)]
    entries: list[dict[bytes, bytes]] = []
    for event in examples:
        entries += ({b"type": event.type.encode(), b"body": body} for body in wrong_bodies(event))
        entries += nonsense(dice, event)
    reasons: list[str] = []
    with client.pipeline(transaction=False) as pipe:
        for fields in entries:
            try:
                decode(fields, stream=stream)
            except InvalidEvent as problem:
                reasons.append(problem.message)
                pipe.xadd(stream, fields)  # type: ignore[arg-type]
        pipe.xadd(stream, encode(GOOD[stream]))  # type: ignore[arg-type]
        pipe.execute()
    assert len(reasons) > 300
    return reasons


def buried(client: redis.Redis) -> list[str]:
    """Return the reasons of all dead letters; each can be read, and says where its entry stood."""
    found = []
    for _, fields in streams.read_range(client, streams.DEAD_LETTER):
        letter = decode(fields)
        assert isinstance(letter, DeadLetter) and letter.entry and letter.source and "\n" not in letter.reason
        found.append(letter.reason.removesuffix(" (its fields were cut to fit here)"))
    return found


@pytest.fixture
def seed() -> int:
    chosen = int(os.environ.get("FUZZ_SEED", random.randrange(10**6)))
    print(f"FUZZ_SEED={chosen}")
    return chosen


def steps(step: Callable[[], int], quiet: int = 2) -> None:
    idle = 0
    while idle < quiet:
        idle = 0 if step() else idle + 1


def test_the_router_buries_nonsense_and_goes_on(valkey: ValkeyServer, seed: int) -> None:
    client = valkey.client()
    client.sadd(streams.SEEN, "jay")
    reasons = flood(client, streams.MESSAGES, seed=seed)
    epoch = Lease(client, "em", holder="x", ttl_s=60).acquire()
    assert epoch is not None
    router = Router(connect(valkey.url, retrying=False), consumer="x", epoch=epoch)
    steps(lambda: router.step(0.001))
    assert buried(client) == reasons
    [(_, fields)] = streams.read_range(client, streams.inbox("jay"))
    assert decode(fields).payload == b"last"  # type: ignore[attr-defined]
    assert client.xpending(streams.MESSAGES, streams.ROUTER_GROUP)["pending"] == 0


def test_a_receiver_buries_nonsense_and_goes_on(valkey: ValkeyServer, tmp_path: Path, seed: int) -> None:
    client = valkey.client()
    reasons = flood(client, streams.inbox("jay"), seed=seed)
    with Outbox(tmp_path / "jay", "jay") as outbox:
        inbox = Inbox(client, "jay", outbox)
        message = inbox.receive(30)
        assert message is not None and message.payload == b"last"
        inbox.ack(message)
    assert buried(client) == reasons
    assert client.xpending(streams.inbox("jay"), streams.INBOX_GROUP)["pending"] == 0


def test_the_monitor_buries_each_kind_of_nonsense_once_and_goes_on(valkey: ValkeyServer, seed: int) -> None:
    client = valkey.client()
    epoch = Lease(client, "em", holder="x", ttl_s=60).acquire()
    assert epoch is not None
    monitor = Monitor(client, epoch=epoch)
    monitor.step()
    reasons = flood(client, streams.HEARTBEATS, seed=seed)
    monitor.step()
    assert buried(client) == list(dict.fromkeys(reasons))
    assert client.smembers(streams.SEEN) == {b"jay"}


@pytest.mark.parametrize("stream", ["em:agent-state", "em:config-change"])
def test_the_dispatcher_buries_nonsense_and_goes_on(valkey: ValkeyServer, seed: int, stream: str) -> None:
    client = valkey.client()
    reasons = flood(client, stream, seed=seed)
    one = Dispatcher(connect(valkey.url, retrying=False))
    one.prepare()
    steps(lambda: one.step(block_ms=1))
    assert buried(client) == reasons
    assert sum(int(client.llen(key)) for key in client.keys("rq:queue:*")) == 1
    assert client.xpending(stream, streams.DISPATCHER_GROUP)["pending"] == 0


def test_the_log_the_export_and_the_replay_live_with_nonsense(
    valkey: ValkeyServer, tmp_path: Path, seed: int
) -> None:
    from em_bridge import logview, replay
    from em_bridge.copying import copy_into
    from em_bridge.exporter import export_file

    client = valkey.client()
    reasons = flood(client, streams.MESSAGES, seed=seed)
    rows = list(logview.View().rows(client))
    assert [row["invalid"] for row in rows[:-1]] == reasons and rows[-1]["payload"] == "last"
    assert not any("\x1b" in logview.text_line(row) for row in rows)
    assert replay.plan_replay(client).messages == 1
    assert copy_into(client, "audit")["copied"] == 1
    assert export_file(client, tmp_path / "x") == 1
