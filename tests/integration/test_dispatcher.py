"""Events become exactly one job each, whatever is killed, lost or delivered twice."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
from redis import Redis

from backup_worker import dispatcher
from backup_worker.config.schedule import Limits
from backup_worker.dispatcher import GROUP, STREAMS, Dispatcher
from backup_worker.queueing import due, queues
from em_bridge import events, streams
from em_bridge.connection import connect
from tests.integration.conftest import ValkeyServer
from tests.integration.wire import ReplyThief
from tests.small_fleet import until

pytestmark = pytest.mark.valkey


def some_events(number: int, seed: int = 1) -> list[events.Event]:
    """Return events of every kind that the dispatcher takes; each asks for a job of its own."""
    dice = random.Random(seed)
    kinds = [
        lambda i: events.AgentState("z", dice.choice(["DEAD", "ALIVE", "DEGRADED"]), reason=f"{i}"),
        lambda i: events.ConfigApplied(f"c{i}", "z", ("weights.json",)),
        lambda i: events.ConfigApproved(f"c{i}", "kari"),
        lambda i: due.BackupDue("daily", f"slot-{i}", "z", 0.0),
        lambda i: due.IncidentDue(f"i{i}"),
        lambda i: due.MaintenanceDue("watch"),
    ]
    return [dice.choice(kinds)(i) for i in range(number)]


def publish(client: Redis, wanted: list[events.Event]) -> list[str]:
    """Append the events and return the ids of the jobs that the contract gives them."""
    with client.pipeline(transaction=False) as pipeline:
        for event in wanted:
            fields: Any = events.encode(event)
            pipeline.xadd(event.stream, fields)
        entries = [raw.decode() for raw in pipeline.execute()]
    return [job_id(event, entry) for event, entry in zip(wanted, entries, strict=True)]


def job_id(event: events.Event, entry: str) -> str:
    if isinstance(event, due.BackupDue):
        return f"{event.tier}_{event.slot}_{event.agent}"
    return f"{event.stream.removeprefix('em:')}_{entry}"


def jobs(client: Redis) -> Counter[str]:
    """Return how often each job id stands in a queue."""
    found: Counter[str] = Counter()
    for name in queues.QUEUES:
        rows: Any = client.lrange(f"rq:queue:{name}", 0, -1)
        found.update(row.decode() for row in rows)
    return found


def letters(client: Redis) -> list[events.DeadLetter]:
    found = []
    for _, fields in streams.read_range(client, streams.DEAD_LETTER):
        event = events.decode(fields, stream=streams.DEAD_LETTER)
        assert isinstance(event, events.DeadLetter)
        found.append(event)
    return found


def unfinished(client: Redis) -> int:
    """Return how many entries are pending or were never read."""
    left = 0
    for stream in STREAMS:
        groups: Any = client.xinfo_groups(stream) if client.exists(stream) else []
        ours = [one for one in groups if one["name"] == GROUP.encode()]
        start = f"({ours[0]['last-delivered-id'].decode()}" if ours else "-"
        unread: Any = client.xrange(stream, start, "+")
        left += len(unread) + sum(one["pending"] for one in ours)
    return left


def exactly_one_each(client: Redis, expected: list[str]) -> None:
    assert jobs(client) == Counter(expected)
    assert all(client.exists(f"rq:job:{one}") for one in expected)
    assert letters(client) == []
    assert unfinished(client) == 0


def dispatcher_for(url: str) -> Dispatcher:
    return Dispatcher(connect(url, retrying=False, socket_timeout_s=3.0))


@contextlib.contextmanager
def dispatching(*urls: str) -> Iterator[list[threading.Thread]]:
    """Run one dispatcher for each URL in threads of this process."""
    stop = threading.Event()
    threads = [threading.Thread(target=dispatcher_for(url).run, args=(stop,)) for url in urls]
    for thread in threads:
        thread.start()
    try:
        yield threads
        assert all(thread.is_alive() for thread in threads)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_two_thousand_events_of_every_kind_become_one_job_each(valkey: ValkeyServer, client: Redis) -> None:
    expected = publish(client, some_events(2000))
    with dispatching(valkey.url):
        until(lambda: sum(jobs(client).values()) >= 2000)
        until(lambda: unfinished(client) == 0)
    exactly_one_each(client, expected)


def test_three_dispatchers_that_take_each_others_entries_make_no_job_twice(
    valkey: ValkeyServer, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Claimed while the first still works on them, the same entries are in two or three hands at once.
    monkeypatch.setattr(dispatcher, "CLAIM_IDLE_S", 0.0)
    monkeypatch.setattr(dispatcher, "CLAIM_EVERY_S", 0.0)
    monkeypatch.setattr(dispatcher, "MAX_DELIVERIES", 10**9)
    monkeypatch.setattr(dispatcher, "BATCH", 20)
    taken: list[int] = []
    hand_off = Dispatcher._hand_off

    def counting(self: Dispatcher, entries: Any) -> int:
        taken.append(len(entries))
        return hand_off(self, entries)

    monkeypatch.setattr(Dispatcher, "_hand_off", counting)
    expected = publish(client, some_events(2000))
    with dispatching(*[valkey.url] * 3):
        until(lambda: sum(jobs(client).values()) >= 2000, 30)
        until(lambda: unfinished(client) == 0)
    exactly_one_each(client, expected)
    assert sum(taken) > 2000, "no entry was in two hands: this test tests nothing"


def _dispatch_for_ever(url: str) -> None:
    dispatcher.BATCH, dispatcher.CLAIM_IDLE_S, dispatcher.CLAIM_EVERY_S = 10, 0.3, 0.1
    dispatcher.MAX_DELIVERIES = 10**9
    dispatcher_for(url).run(threading.Event())


def test_dispatchers_killed_and_frozen_at_random_lose_and_double_nothing(
    valkey: ValkeyServer, client: Redis
) -> None:
    seed = int(os.environ.get("SEED", "20261123"))
    print("seed", seed)
    dice = random.Random(seed)
    context = multiprocessing.get_context("fork")

    def start() -> Any:
        process = context.Process(target=_dispatch_for_ever, args=(valkey.url,), daemon=True)
        process.start()
        return process

    expected: list[str] = []
    running = [start() for _ in range(3)]
    kills = 0
    try:
        deadline = time.monotonic() + 6.0
        for part in range(20):
            expected += publish(client, [*_unique(part)])
            time.sleep(dice.uniform(0.0, 0.06))
            victim = running.pop(dice.randrange(len(running)))
            if dice.random() < 0.5:
                os.kill(victim.pid, signal.SIGSTOP)
                # It wakes up later, with entries in its hands that others have handed off meanwhile.
                threading.Timer(dice.uniform(0.4, 0.9), _thaw, (victim.pid,)).start()
                running.insert(0, victim)
            else:
                os.kill(victim.pid, signal.SIGKILL)
                kills += 1
                running.append(start())
            assert time.monotonic() < deadline + 10
        until(lambda: unfinished(client) == 0 and len(jobs(client)) >= len(expected), 15)
        time.sleep(1.0)
    finally:
        for process in running:
            process.kill()
            process.join()
    assert kills > 3
    exactly_one_each(client, expected)


def _thaw(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def _unique(part: int) -> Iterator[events.Event]:
    for event in some_events(100, seed=part):
        if isinstance(event, due.BackupDue):
            yield due.BackupDue(event.tier, f"{part}-{event.slot}", event.agent, 0.0)
        else:
            yield event


def test_a_lost_reply_of_the_hand_off_makes_no_job_twice(valkey: ValkeyServer, client: Redis) -> None:
    expected = publish(client, some_events(500))
    with ReplyThief(valkey.port) as thief, dispatching(thief.url):
        for _ in range(3):
            stolen = thief.stolen
            thief.steal_replies_of("EXEC")
            expected += publish(client, [due.IncidentDue("i")])
            until(lambda stolen=stolen: thief.stolen > stolen)
        until(lambda: unfinished(client) == 0 and sum(jobs(client).values()) >= len(expected), 20)
    exactly_one_each(client, expected)


def test_a_server_killed_and_restarted_in_the_middle_loses_and_doubles_nothing(
    valkey: ValkeyServer, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "BATCH", 5)
    expected = publish(client, some_events(1500))
    with dispatching(valkey.url, valkey.url):
        until(lambda: sum(jobs(client).values()) > 100, every_s=0.001)
        valkey.kill()
        time.sleep(0.5)
        valkey.start()
        assert sum(jobs(client).values()) < 1500, "it was killed too late: this test tests nothing"
        until(lambda: unfinished(client) == 0 and sum(jobs(client).values()) >= 1500, 20)
    exactly_one_each(client, expected)


def test_an_event_delivered_again_much_later_makes_no_second_job(valkey: ValkeyServer, client: Redis) -> None:
    one = dispatcher_for(valkey.url)
    one.prepare()
    expected = publish(client, some_events(50))
    while one.step(block_ms=10):
        pass
    exactly_one_each(client, expected)
    for name in client.scan_iter("rq:*"):  # the jobs have run, and RQ has forgotten them
        client.delete(name)
    for stream in STREAMS:
        client.xgroup_setid(stream, GROUP, "0")
    while one.step(block_ms=10):
        pass
    assert jobs(client) == Counter()
    assert unfinished(client) == 0


def test_the_same_slot_announced_twice_is_one_job(valkey: ValkeyServer, client: Redis) -> None:
    one = dispatcher_for(valkey.url)
    one.prepare()
    publish(client, [due.BackupDue("daily", "s", "z", 0.0)] * 3)
    one.step(block_ms=10)
    publish(client, [due.BackupDue("daily", "s", "z", 1.0)])
    one.step(block_ms=10)
    assert jobs(client) == Counter(["daily_s_z"])
    assert unfinished(client) == 0


MALFORMED: dict[str, dict[bytes, bytes]] = {
    "no fields of ours": {b"hello": b"world"},
    "unknown type": {b"type": b"agent.exploded", b"body": msgpack.packb({})},
    "not msgpack": {b"type": b"agent.state", b"body": b"\xc1\xff"},
    "not a map": {b"type": b"agent.state", b"body": msgpack.packb([1])},
    "missing key": {b"type": b"agent.state", b"body": msgpack.packb({"agent": "z"})},
    "wrong type of a key": {b"type": b"agent.state", b"body": msgpack.packb({"agent": 7, "state": "DEAD"})},
    "leaves its root": {
        b"type": b"config.applied",
        b"body": msgpack.packb({"change": "c", "agent": "z", "paths": ["../x"]}),
    },
    "a slot that is no name": {
        b"type": b"backup.due",
        b"body": msgpack.packb({"tier": "a b", "slot": "x/y", "agent": "z", "fire_at": 1}),
    },
    "another stream's event": {
        b"type": b"heartbeat",
        b"body": msgpack.packb({"agent": "z", "incarnation": "1", "seq": 1}),
    },
    "not text": {b"\xff\xfe": b"\xff", b"type": b"\xff"},
    "deep": {b"type": b"agent.state", b"body": b"\x91" * 5000 + b"\xc0"},
    "huge": {b"type": b"agent.state", b"body": bytes(2 * 1024 * 1024)},
}


def test_malformed_entries_become_dead_letters_with_reasons_and_stop_nobody(
    valkey: ValkeyServer, client: Redis
) -> None:
    dice = random.Random(7)
    noise: list[dict[bytes, bytes]] = [
        {dice.randbytes(3): dice.randbytes(40), b"type": dice.choice([b"agent.state", b"backup.due"])}
        | {b"body": dice.randbytes(dice.randrange(60))}
        for _ in range(100)
    ]
    expected: list[str] = []
    wrong: list[str] = []
    with dispatching(valkey.url):
        for fields in [*MALFORMED.values(), *noise]:
            stream = dice.choice(STREAMS) if fields in noise else due.STREAM
            if fields.get(b"type") == b"backup.due":
                stream = due.STREAM
            entry: Any = client.xadd(stream, fields)  # type: ignore[arg-type]
            wrong.append(f"{stream} {entry.decode()}")
            expected += publish(client, [due.IncidentDue("i")])
        until(lambda: unfinished(client) == 0)
    found = letters(client)
    assert sorted(f"{one.source} {one.entry}" for one in found) == sorted(wrong)
    assert all(one.reason and "\n" not in one.reason for one in found)
    assert jobs(client) == Counter(expected)
    first = {one.entry: one for one in found}[wrong[0].split()[1]]
    assert first.raw == {"hello": b"world"}


def test_what_a_dead_dispatcher_had_read_is_taken_over_within_seconds(
    valkey: ValkeyServer, client: Redis
) -> None:
    dead = dispatcher_for(valkey.url)
    dead.prepare()
    expected = publish(client, some_events(250))
    while dead._read(">", block_ms=None):  # read, and never handed off
        pass
    began = time.monotonic()
    with dispatching(valkey.url):
        until(lambda: sum(jobs(client).values()) >= 250, 8)
        assert time.monotonic() - began < 6.0
        until(lambda: unfinished(client) == 0)
    exactly_one_each(client, expected)


def left_pending(client: Redis, deliveries: int, event: events.Event) -> str:
    """Publish `event` and leave it pending as one that was delivered so often before."""
    (expected,) = publish(client, [event])
    entry = streams.last_id(client, event.stream)
    client.xreadgroup(GROUP, "dead", {event.stream: ">"})
    client.xclaim(event.stream, GROUP, "dead", 0, [entry], idle=60_000, retrycount=deliveries)
    return expected


def test_an_entry_delivered_five_times_is_a_dead_letter_and_one_delivered_four_times_is_not(
    valkey: ValkeyServer, client: Redis
) -> None:
    one = dispatcher_for(valkey.url)
    one.prepare()
    good = left_pending(client, 4, due.IncidentDue("good"))
    left_pending(client, 5, due.IncidentDue("bad"))
    one.step(block_ms=10)
    assert jobs(client) == Counter([good])
    (letter,) = letters(client)
    assert letter.reason == "delivered 6 times without being handed off"
    assert unfinished(client) == 0


def test_an_entry_that_kills_its_reader_takes_no_other_with_it(
    valkey: ValkeyServer, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "CLAIM_IDLE_S", 0.0)
    decode = events.decode

    def deadly(fields: Any, **options: Any) -> events.Event:
        event = decode(fields, **options)
        if isinstance(event, due.IncidentDue) and event.incident.startswith("deadly"):
            raise SystemError("the interpreter dies here")
        return event

    dispatcher_for(valkey.url).prepare()
    expected = publish(client, some_events(30))
    publish(client, [due.IncidentDue("deadly 1")])
    expected += publish(client, some_events(60)[30:])
    publish(client, [due.IncidentDue("deadly 2")])
    expected += publish(client, some_events(90)[60:])
    monkeypatch.setattr(events, "decode", deadly)
    for _ in range(16):
        reborn = dispatcher_for(valkey.url)
        with contextlib.suppress(SystemError):
            while reborn.step(block_ms=10):
                pass
    monkeypatch.undo()
    assert [letter.reason for letter in letters(client)] == ["delivered 6 times without being handed off"] * 2
    assert jobs(client) == Counter(expected)
    assert unfinished(client) == 0


def test_an_entry_that_somebody_removed_while_it_was_pending_stops_nobody(
    valkey: ValkeyServer, client: Redis
) -> None:
    one = dispatcher_for(valkey.url)
    one.prepare()
    publish(client, [due.IncidentDue("a")])
    one._read(">", block_ms=None)
    client.xdel(due.STREAM, streams.last_id(client, due.STREAM))
    one._reread = True  # as behind a lost reply
    expected = publish(client, [due.IncidentDue("b")])
    one.step(block_ms=10)
    assert jobs(client) == Counter(expected)
    assert unfinished(client) == 0


def test_dispatching_goes_on_after_the_server_has_lost_everything(
    valkey: ValkeyServer, client: Redis
) -> None:
    with dispatching(valkey.url):
        publish(client, some_events(10))
        until(lambda: sum(jobs(client).values()) == 10)
        client.flushall()
        expected = publish(client, some_events(10))
        until(lambda: sum(jobs(client).values()) == 10)
        until(lambda: unfinished(client) == 0)
    exactly_one_each(client, expected)


def test_a_group_that_is_there_already_is_used_and_what_came_before_the_first_dispatcher_is_taken(
    valkey: ValkeyServer, client: Redis
) -> None:
    expected = publish(client, some_events(20))
    for _ in range(2):
        dispatcher_for(valkey.url).prepare()
    dispatcher_for(valkey.url).step(block_ms=10)
    exactly_one_each(client, expected)


def test_a_server_that_is_full_is_waited_out(valkey: ValkeyServer, client: Redis) -> None:
    expected = publish(client, some_events(10))
    client.config_set("maxmemory", "1")
    with dispatching(valkey.url) as threads:
        time.sleep(1.0)
        assert threads[0].is_alive()
        assert sum(jobs(client).values()) == 0
        client.config_set("maxmemory", "0")
        until(lambda: unfinished(client) == 0 and sum(jobs(client).values()) == 10)
    exactly_one_each(client, expected)


def test_a_stream_is_not_read_while_its_queue_is_full_and_nothing_is_lost(
    valkey: ValkeyServer, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "BATCH", 10)
    changes: list[events.Event] = [events.ConfigApproved(f"c{number}", "kari") for number in range(300)]
    expected = publish(client, changes)
    stop = threading.Event()
    limits = Limits(queue_jobs=20)
    both = [
        Dispatcher(connect(valkey.url, retrying=False, socket_timeout_s=3.0), limits=lambda: limits)
        for _ in range(2)
    ]
    threads = [threading.Thread(target=one.run, args=(stop,)) for one in both]
    for thread in threads:
        thread.start()
    done: Counter[str] = Counter()
    try:
        until(lambda: client.llen("rq:queue:backup") > 20)
        time.sleep(0.3)
        assert client.llen("rq:queue:backup") <= 20 + 2 * 10
        # What is not read is on the stream, nobody's, and shows as lag.
        assert unfinished(client) == 300 - client.llen("rq:queue:backup")
        assert client.xpending(streams.CONFIG_CHANGE, GROUP)["pending"] == 0
        # Others go their way.
        (death,) = publish(client, [events.AgentState("z", "DEAD")])
        until(lambda: client.lrange("rq:queue:recovery", 0, -1) == [death.encode()], 2)
        deadline = time.monotonic() + 20
        while sum(done.values()) < 300:
            popped: Any = client.lpop("rq:queue:backup")
            done.update([popped.decode()] if popped else [])
            assert client.llen("rq:queue:backup") <= 20 + 2 * 10
            assert time.monotonic() < deadline
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert done == Counter(expected)
    assert unfinished(client) == 0


def test_a_dispatcher_whose_streams_are_all_held_sees_when_there_is_room_again(
    valkey: ValkeyServer, client: Redis
) -> None:
    full = Limits(queue_jobs=1)
    one = Dispatcher(connect(valkey.url, retrying=False), limits=lambda: full)
    one.prepare()
    for queue in queues.QUEUES:
        client.sadd("rq:queues", f"rq:queue:{queue}")
        client.rpush(f"rq:queue:{queue}", *range(20))
    expected = publish(client, some_events(30))
    began = time.monotonic()
    assert one.step() == 0
    assert 0.05 < time.monotonic() - began < 0.5, "it spins, or sleeps too long"
    client.delete(*[f"rq:queue:{queue}" for queue in queues.QUEUES])
    while one.step(block_ms=10):
        client.delete(*[f"rq:queue:{queue}" for queue in queues.QUEUES])
    assert unfinished(client) == 0
    assert all(client.exists(f"rq:job:{job}") for job in expected)
