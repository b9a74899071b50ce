"""Whole execution managers on a real Valkey: killed, frozen, two at once."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from em_bridge import ExecutionManager, messages, streams
from tests.integration.conftest import ValkeyServer
from tests.integration.processes import em_bridge, eventually, python
from tests.integration.talk import inbox_of, make_known, numbers

pytestmark = pytest.mark.valkey


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
