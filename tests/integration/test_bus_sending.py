"""From `send` to the log on a real Valkey: once and in order, also when numbers collide."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from em_bridge import Agent, ExecutionManager, messages, streams
from tests.integration.conftest import ValkeyServer, free_port
from tests.integration.processes import eventually, python
from tests.integration.talk import log_of, make_known, numbers, receive_all
from tests.integration.wire import ReplyThief

pytestmark = pytest.mark.valkey


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
