"""The message log as files: exported, continued, restored, and put back into a Redis that has lost it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from em_bridge import Agent, ExecutionManager, importer, logfile, messages, replay, streams
from em_bridge.connection import connect
from em_bridge.errors import AgentBackupError, NotFound
from em_bridge.events import Message, decode, encode
from em_bridge.exporter import Exporter, export_file
from em_bridge.importer import Imported, import_log
from em_bridge.inbox import last_seen_key
from em_bridge.lease import Lease
from em_bridge.router import Router
from tests.integration.conftest import ValkeyServer
from tests.integration.processes import em_bridge, eventually, python
from tests.integration.test_bus_cli import call

pytestmark = pytest.mark.valkey


def send(client: redis.Redis, sender: str, to: str, *payloads: bytes) -> None:
    for payload in payloads:
        messages.send_once(client, sender, to, payload, at=1.0)


def log_of(client: redis.Redis) -> list[tuple[str, dict[bytes, bytes]]]:
    return [(entry, dict(fields)) for entry, fields in streams.read_range(client, streams.MESSAGES)]


def payloads(client: redis.Redis, stream: str = streams.MESSAGES) -> list[bytes]:
    events = [decode(fields) for _, fields in streams.read_range(client, stream)]
    return [event.payload for event in events if isinstance(event, Message)]


def route(valkey: ValkeyServer) -> None:
    lease = Lease(valkey.client(), "em", holder="test", ttl_s=5.0)
    epoch = lease.acquire()
    assert epoch is not None
    router = Router(connect(valkey.url, retrying=False), consumer="test", epoch=epoch)
    idle = 0
    while idle < 2:
        idle = 0 if router.step(0.01) else idle + 1
    lease.release()


def export(valkey: ValkeyServer, folder: Path, **options: int) -> int:
    exporter = Exporter(valkey.client(), folder, **options)
    try:
        return exporter.step()
    finally:
        exporter.close()


def bring_back(valkey: ValkeyServer, path: Path) -> Imported:
    return import_log(connect(valkey.url, retrying=False), path)


def foreign_receive(client: redis.Redis, agent: str, count: int) -> list[bytes]:
    """Read and acknowledge as a program that does not publish what it has seen."""
    stream = streams.inbox(agent)
    answer: Any = client.xreadgroup(streams.INBOX_GROUP, "x", {stream: ">"}, count=count)
    found = []
    for entry, fields in answer[0][1] if answer else ():
        event = decode(fields)
        assert isinstance(event, Message)
        found.append(event.payload)
        client.xack(stream, streams.INBOX_GROUP, entry)
    return found


# out


def test_an_export_holds_the_log_and_is_continued_where_it_ended(
    valkey: ValkeyServer, tmp_path: Path
) -> None:
    client = valkey.client()
    assert export(valkey, tmp_path / "log") == 0
    send(client, "z", "jay", b"0", b"\xff\x00")
    client.xadd(streams.MESSAGES, {b"type": b"message", b"body": b"\xc1"})
    assert export(valkey, tmp_path / "log") == 2
    assert export(valkey, tmp_path / "log") == 0
    send(client, "moe", "jay", b"2")
    assert export(valkey, tmp_path / "log") == 1
    known, entries = logfile.read(tmp_path / "log")
    kept = [(entry.id, {b"type": entry.type, b"body": entry.body}) for entry in entries]
    assert kept == [row for row in log_of(client) if row[1][b"body"] != b"\xc1"]
    assert known.senders.keys() == {"z", "moe"}
    assert {name: fields["last"] for name, fields in known.senders.items()} == {"z": 2, "moe": 1}
    size = sum(path.stat().st_size for path in (tmp_path / "log").iterdir())
    assert export(valkey, tmp_path / "log") == 0
    assert sum(path.stat().st_size for path in (tmp_path / "log").iterdir()) == size, "nothing new, no growth"


def test_an_export_is_bounded_in_bytes_and_each_segment_stands_alone(
    valkey: ValkeyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = valkey.client()
    folder = tmp_path / "log"
    files = logfile.LogFiles(folder, limit_bytes=60_000, segment_bytes=10_000)
    monkeypatch.setattr("em_bridge.exporter.LogFiles", lambda *args, **more: files)
    exporter = Exporter(client, folder)
    for number in range(60):
        send(client, "z", "jay", b"%d" % number + b"x" * 2000)
        exporter.step()
        assert sum(path.stat().st_size for path in folder.iterdir()) < 80_000
    exporter.close()
    known, entries = logfile.read(folder)
    kept = [entry.id for entry in entries]
    assert kept == [entry for entry, _ in log_of(client)][-len(kept) :] and 10 < len(kept) < 60
    assert known.senders["z"]["last"] == 60


def test_segments_whose_messages_are_too_old_are_deleted(valkey: ValkeyServer, tmp_path: Path) -> None:
    client = valkey.client()
    folder = tmp_path / "log"
    for number in range(4):
        files = logfile.LogFiles(folder, segment_bytes=1)
        entry = streams.append(client, Message("z", "jay", number + 1, b"%d" % number))
        files.append([logfile.Entry(entry, b"message", b"x")])
        files.commit(entry, logfile.Known())
        files.close()
    files = logfile.LogFiles(folder, segment_bytes=1)
    files.commit(entry, logfile.Known(), older_than=streams.id_at(streams.server_time(client) + 5))
    files.close()
    assert len(logfile.segments(folder)) == 1


def test_whatever_byte_a_crash_cut_the_export_at_it_is_whole_up_to_a_commit(
    valkey: ValkeyServer, tmp_path: Path
) -> None:
    client = valkey.client()
    folder = tmp_path / "log"
    ends = []
    for number in range(3):
        send(client, "z", "jay", b"%d" % number)
        export(valkey, folder)
        [segment] = logfile.segments(folder)
        ends.append(segment.stat().st_size)
    whole = segment.read_bytes()
    everything = [entry for entry, _ in log_of(client)]
    for cut in range(ends[0], len(whole), 7):
        segment.write_bytes(whole[:cut])
        _, entries = logfile.read(folder)
        finished = sum(end <= cut for end in ends)
        assert [entry.id for entry in entries] == everything[:finished]
    segment.write_bytes(whole[: ends[1] + 20])
    assert export(valkey, folder) == 1
    assert [entry.id for entry in logfile.read(folder)[1]] == everything


def test_damage_is_named_and_nothing_is_imported(valkey: ValkeyServer, tmp_path: Path) -> None:
    client = valkey.client()
    send(client, "z", "jay", b"0", b"1")
    assert export_file(client, tmp_path / "log.jsonl") == 2
    whole = (tmp_path / "log.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    damaged = tmp_path / "damaged"
    damaged.write_bytes(b"".join([lines[0], lines[1].replace(b'"id":"1', b'"id":"2'), *lines[2:]]))
    client.flushall()
    with pytest.raises(AgentBackupError, match="line 2 of the export"):
        bring_back(valkey, damaged)
    damaged.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(AgentBackupError, match="no finished batch"):
        bring_back(valkey, damaged)
    damaged.write_text("something else\n")
    with pytest.raises(AgentBackupError, match="no exported message log"):
        bring_back(valkey, damaged)
    for nowhere in (tmp_path / "no", tmp_path):
        with pytest.raises(NotFound):
            bring_back(valkey, nowhere)
    assert client.keys("em:messages*") == []


def test_a_restored_folder_is_continued_from_its_end_and_the_live_log_stays(
    valkey: ValkeyServer, tmp_path: Path
) -> None:
    client = valkey.client()
    send(client, "z", "jay", b"0", b"1")
    export(valkey, tmp_path / "log")
    shutil.copytree(tmp_path / "log", tmp_path / "backup")
    send(client, "z", "jay", b"2", b"3")
    export(valkey, tmp_path / "log")
    before = log_of(client)
    shutil.rmtree(tmp_path / "log")
    shutil.copytree(tmp_path / "backup", tmp_path / "log")
    assert export(valkey, tmp_path / "log") == 2
    assert log_of(client) == before
    assert [entry.id for entry in logfile.read(tmp_path / "log")[1]] == [entry for entry, _ in before]


def test_two_processes_do_not_write_one_export(valkey: ValkeyServer, tmp_path: Path) -> None:
    exporter = Exporter(valkey.client(), tmp_path / "log")
    with pytest.raises(AgentBackupError, match="being written by another process"):
        Exporter(valkey.client(), tmp_path / "log")
    exporter.close()
    Exporter(valkey.client(), tmp_path / "log").close()


# back


@pytest.mark.parametrize("as_file", [True, False])
def test_a_lost_redis_gets_its_log_back_and_nobody_a_message_twice(
    valkey: ValkeyServer, tmp_path: Path, as_file: bool
) -> None:
    client = valkey.client()
    client.sadd(streams.SEEN, "jay", "node")
    with Agent("jay", valkey.url, outbox=tmp_path / "jay") as jay:
        send(client, "z", "jay", *(b"j%d" % n for n in range(5)))
        send(client, "z", "node", *(b"n%d" % n for n in range(5)))
        route(valkey)
        for _ in range(3):
            message = jay.receive(5)
            assert message is not None
            jay.ack(message)
        eventually(lambda: client.hget(last_seen_key("jay"), "z") == b"3")
    assert foreign_receive(client, "node", 2) == [b"n0", b"n1"]
    # Not routed yet, and one that nobody knows.
    send(client, "z", "jay", b"j5")
    send(client, "z", "ghost", b"boo")
    path = tmp_path / "export"
    if as_file:
        export_file(client, path)
    else:
        export(valkey, path)
    before = log_of(client)
    client.flushall()

    result = bring_back(valkey, path)
    assert (result.messages, result.added) == (12, 12)
    assert log_of(client) == before
    assert bring_back(valkey, path).added == 0 and log_of(client) == before
    assert client.get("em:lease:em") is None
    route(valkey)
    with Agent("jay", valkey.url, outbox=tmp_path / "jay") as jay:
        got = []
        while message := jay.receive(1):
            got.append(message.payload)
            jay.ack(message)
    assert got == [b"j3", b"j4", b"j5"]
    assert foreign_receive(client, "node", 10) == [b"n2", b"n3", b"n4"]
    [letter] = [decode(fields) for _, fields in streams.read_range(client, streams.DEAD_LETTER)]
    assert "unknown recipient “ghost”" in letter.reason  # type: ignore[attr-defined]
    # Numbers go on, and no message is taken for an old one.
    send(client, "z", "jay", b"new")
    route(valkey)
    assert payloads(client, streams.inbox("jay"))[-1] == b"new"


def test_what_was_sent_and_routed_since_the_loss_comes_after_what_was_lost(
    valkey: ValkeyServer, tmp_path: Path
) -> None:
    client = valkey.client()
    client.sadd(streams.SEEN, "jay")
    send(client, "z", "jay", b"0", b"1", b"2")
    route(valkey)
    assert foreign_receive(client, "jay", 1) == [b"0"]
    export(valkey, tmp_path / "log")
    numbers = client.hgetall(messages.sender_key("z"))
    client.flushall()
    # Its sender goes on, and repeats what it kept: 2 comes again, as itself.
    client.sadd(streams.SEEN, "jay")
    client.xadd(streams.MESSAGES, encode(Message("z", "jay", 3, b"2", 1.0)))  # type: ignore[arg-type]
    client.xadd(streams.MESSAGES, encode(Message("z", "jay", 4, b"3", 1.0)))  # type: ignore[arg-type]
    client.hset(messages.sender_key("z"), mapping={**numbers, b"last": b"4"})  # type: ignore[dict-item]
    route(valkey)
    send(client, "z", "jay", b"4")

    assert bring_back(valkey, tmp_path / "log").added == 2
    assert payloads(client) == [b"0", b"1", b"2", b"3", b"4"]
    route(valkey)
    assert foreign_receive(client, "jay", 10) == [b"1", b"2", b"3", b"4"]
    assert client.xlen(streams.DEAD_LETTER) == 0


def test_the_export_does_not_forget_what_a_lost_redis_no_longer_knows(
    valkey: ValkeyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = valkey.client()
    client.sadd(streams.SEEN, "jay")
    send(client, "z", "jay", b"0", b"1", b"2")
    route(valkey)
    assert foreign_receive(client, "jay", 1) == [b"0"]
    export(valkey, tmp_path / "log")
    client.flushall()
    client.sadd(streams.SEEN, "jay")
    send(client, "moe", "jay", b"m")
    route(valkey)
    export(valkey, tmp_path / "log")
    assert "has lost messages" in caplog.text
    client.flushall()
    bring_back(valkey, tmp_path / "log")
    route(valkey)
    assert payloads(client) == [b"0", b"1", b"2", b"m"]
    assert foreign_receive(client, "jay", 10) == [b"1", b"2", b"m"]


def test_an_import_killed_anywhere_is_finished_by_the_next(valkey: ValkeyServer, tmp_path: Path) -> None:
    client = valkey.client()
    client.sadd(streams.SEEN, "jay", "rick")
    for number in range(1500):
        send(client, "z", "jay" if number % 2 else "rick", b"%d" % number)
    route(valkey)
    export(valkey, tmp_path / "log")
    before = log_of(client)
    code = (
        "import sys,os\nfrom pathlib import Path\n"
        "from em_bridge import scripts\nfrom em_bridge.connection import connect\n"
        "from em_bridge.importer import import_log\nreal = scripts.Script.__call__\nleft = int(sys.argv[3])\n"
        "def call(self, *args):\n    global left\n    left -= 1\n"
        "    if left == 0: os.kill(os.getpid(), 9)\n    return real(self, *args)\n"
        "scripts.Script.__call__ = call\nimport_log(connect(sys.argv[1], retrying=False), Path(sys.argv[2]))"
    )
    client.flushall()
    for step in range(2, 40, 2):
        with python(tmp_path, f"i{step}", code, valkey.url, str(tmp_path / "log"), str(step)) as process:
            if process.process.wait(20) == 0:
                break
            assert process.process.returncode == -9
    else:
        raise AssertionError("it never came to its end")
    assert step > 6
    assert log_of(client) == before
    route(valkey)
    assert payloads(client, streams.inbox("rick")) == [b"%d" % n for n in range(0, 1500, 2)]
    assert payloads(client, streams.inbox("jay")) == [b"%d" % n for n in range(1, 1500, 2)]


# the whole


def test_a_fleet_lives_through_the_loss_of_its_redis(valkey: ValkeyServer, tmp_path: Path) -> None:
    client = valkey.client()
    (tmp_path / "em").mkdir()
    got: list[bytes] = []

    def take(agent: Agent, enough: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 15
        while not enough() and time.monotonic() < deadline:
            if message := agent.receive(0.2):
                got.append(message.payload)
                agent.ack(message)

    with (
        Agent("z", valkey.url, outbox=tmp_path / "z") as z,
        em_bridge(tmp_path, "em", valkey.url, "em", "--message-log", str(tmp_path / "em" / "log")) as em,
    ):
        with Agent("jay", valkey.url, outbox=tmp_path / "jay") as jay:
            for number in range(50):
                z.send("jay", b"%d" % number)
            take(jay, lambda: len(got) == 20)
        # Fifty were sent, twenty received; thirty are known to Redis and to the export alone.
        eventually(lambda: z.waiting() == 0 and len(payloads(client)) == 50)
        eventually(lambda: _exported(tmp_path / "em" / "log") == 50)
        time.sleep(2.2)
        with client.pipeline(transaction=True) as pipe:
            pipe.flushall()
            # As the dispatcher does, which knows the fleet from its configuration.
            pipe.hset(streams.FLEET, "jay", b"\x80")
            pipe.execute()
        for number in range(50, 60):
            z.send("jay", b"%d" % number)
        eventually(lambda: z.waiting() == 0 and len(payloads(client)) >= 10)
        eventually(lambda: _exported(tmp_path / "em" / "log") >= 60)
        shutil.copytree(tmp_path / "em" / "log", tmp_path / "copy")
        result = json.loads(call(valkey.url, "import", str(tmp_path / "copy"), "--json").stdout)
        assert result["added"] == 50
        with Agent("jay", valkey.url, outbox=tmp_path / "jay") as jay:
            z.send("jay", b"60")
            take(jay, lambda: len(got) == 61)
            assert jay.receive(0.5) is None
        assert got == [b"%d" % number for number in range(61)]
        assert em.end() == 0
    assert "Traceback" not in em.err.read_text()
    assert client.xlen(streams.DEAD_LETTER) == 0


def _exported(folder: Path) -> int:
    try:
        return sum(1 for _ in logfile.read(folder)[1])
    except NotFound:
        return 0


def test_the_manager_exports_below_its_root(valkey: ValkeyServer, tmp_path: Path) -> None:
    with ExecutionManager(valkey.url, message_log=tmp_path / "message-log") as manager:
        assert manager.wait_until_leading(5)
        send(valkey.client(), "z", "jay", b"0")
        eventually(lambda: _exported(tmp_path / "message-log") == 1)
    # A manager that ended lets the next one go on.
    Exporter(valkey.client(), tmp_path / "message-log").close()


def test_an_import_holds_its_lease_however_long_the_plan_takes(
    valkey: ValkeyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = valkey.client()
    send(client, "z", "jay", b"0")
    export(valkey, tmp_path / "log")
    client.flushall()
    plan = replay.plan_replay

    def slow(*args: Any) -> Any:
        # As with a log of millions: the lease used to run out here, so that the import never came to its end.
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            assert Lease(client, "em", holder="another", ttl_s=5.0).acquire() is None
            time.sleep(0.05)
        return plan(*args)

    monkeypatch.setattr(replay, "plan_replay", slow)
    monkeypatch.setattr(importer, "LEASE_TTL_S", 0.6)
    assert bring_back(valkey, tmp_path / "log").added == 1
    assert client.get("em:lease:em") is None
