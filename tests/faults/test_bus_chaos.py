"""Everything on the bus is killed and frozen at random while messages flow: each arrives once, in order.

Agents and managers reach the server through a wire that is paused and cut, too. The seed is printed; `CHAOS_SEED`
repeats a run's choices; `FAULTS=all` makes it long: 10,000 messages from 20 senders.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import defaultdict
from pathlib import Path

import pytest

from em_bridge import streams
from em_bridge.events import AgentState, decode
from tests.integration.conftest import ValkeyServer
from tests.integration.processes import Process, em_bridge, eventually, python
from tests.integration.wire import Wire

pytestmark = pytest.mark.valkey

LONG = os.environ.get("FAULTS") == "all"
SECONDS = float(os.environ.get("CHAOS_SECONDS", "90" if LONG else "8"))
SENDERS = tuple(f"sender{number}" for number in range(20)) if LONG else ("z", "leroy", "moe")
RECEIVERS, MESSAGES = ("jay", "rick"), 500 if LONG else 400
SETTLES_WITHIN_S = 180.0 if LONG else 60.0
LONGEST_PAUSE_S = 7.0 if LONG else 1.5
"""A wire that stands still for longer than the socket timeout looks like a server that is gone."""

SENDER = """
import sqlite3, sys, time
from pathlib import Path
from em_bridge import Agent
name, url, outbox, count, pause, *to = sys.argv[1:]
with Agent(name, url, outbox=outbox) as me:
    # Nobody else writes in this name, so the numbers of the outbox tell how far the life before came.
    row = sqlite3.connect(outbox).execute("SELECT seq FROM sqlite_sequence WHERE name = 'outgoing'").fetchone()
    for number in range(row[0] if row else 0, int(count)):
        me.send(to[number % len(to)], b"%d" % number)
        time.sleep(float(pause))
    while me.waiting():
        time.sleep(0.05)
"""

# A receiver whose own state (the file) is committed before the acknowledgement: exactly once through its own crashes.
RECEIVER = """
import os, sys
from em_bridge import Agent
name, url, outbox, state = sys.argv[1:]
done = {}
for line in open(state).read().splitlines() if os.path.exists(state) else ():
    sender, seq, _ = line.split()
    done[sender] = int(seq)
with Agent(name, url, outbox=outbox) as me, open(state, "a") as file:
    while True:
        message = me.receive(0.5)
        if message is None:
            continue
        if message.seq > done.get(message.sender, 0):
            file.write(f"{message.sender} {message.seq} {message.payload.decode()}\\n")
            file.flush()
            os.fsync(file.fileno())
            done[message.sender] = message.seq
        me.ack(message)
"""


class Town:
    """All processes, started again as they were after a kill."""

    def __init__(self, valkey: ValkeyServer, folder: Path) -> None:
        self.valkey = valkey
        self.wire = Wire(valkey.port)
        self.folder = folder
        self.processes: dict[str, Process] = {}
        for name in (*SENDERS, *RECEIVERS, "em-a", "em-b"):
            self.start(name)

    def start(self, name: str) -> None:
        folder, url, outbox = self.folder, self.wire.url, str(self.folder / f"{name}.outbox")
        if name in SENDERS:
            pause = str(SECONDS / MESSAGES)
            found = python(folder, name, SENDER, name, url, outbox, str(MESSAGES), pause, *RECEIVERS)
        elif name in RECEIVERS:
            found = python(folder, name, RECEIVER, name, url, outbox, str(folder / f"{name}.got"))
        else:
            found = em_bridge(folder, name, url, "em")
        self.processes[name] = found

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.start(name)

    def freeze(self, name: str, seconds: float) -> None:
        self.processes[name].process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.processes[name].process.send_signal(signal.SIGCONT)

    def trouble_wire(self, what: str, seconds: float) -> None:
        if what == "kill":
            self.wire.cut()
        else:
            self.wire.pause()
            time.sleep(seconds)
            self.wire.go_on()

    def got(self) -> dict[tuple[str, str], list[int]]:
        found: dict[tuple[str, str], list[int]] = defaultdict(list)
        for name in RECEIVERS:
            path = self.folder / f"{name}.got"
            for line in path.read_text().splitlines() if path.exists() else ():
                sender, _, number = line.split()
                found[name, sender].append(int(number))
        return found

    def close(self) -> None:
        self.wire.close()
        for process in self.processes.values():
            if process.process.poll() is None:
                process.kill()


@pytest.mark.timeout(180 + int(3 * SECONDS + SETTLES_WITHIN_S))
def test_every_message_arrives_once_and_in_order_whatever_is_killed(
    valkey: ValkeyServer, tmp_path: Path
) -> None:
    seed = int(os.environ.get("CHAOS_SEED", random.randrange(10**6)))
    print(f"CHAOS_SEED={seed}")
    dice = random.Random(seed)
    valkey.client().sadd(streams.SEEN, *RECEIVERS)
    town = Town(valkey, tmp_path)
    try:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            time.sleep(dice.uniform(0.1, 0.6))
            victim = dice.choice(
                [*town.processes, *["valkey", "wire", "em-a", "em-b"] * (1 + len(SENDERS) // 10)]
            )
            what = dice.choice(["kill", "kill", "freeze"])
            print(f"{what} {victim}")
            if victim == "wire":
                town.trouble_wire(what, dice.uniform(0.1, LONGEST_PAUSE_S))
            elif victim == "valkey" and what == "kill":
                valkey.restart()
            elif victim == "valkey":
                valkey.freeze()
                time.sleep(dice.uniform(0.1, 1.0))
                valkey.thaw()
            elif what == "kill":
                town.kill(victim)
            else:
                town.freeze(victim, dice.uniform(0.1, 1.0))
        total = MESSAGES * len(SENDERS)
        eventually(lambda: sum(map(len, town.got().values())) >= total, SETTLES_WITHIN_S)
        time.sleep(0.5)
        for (receiver, sender), numbers in sorted(town.got().items()):
            mine = [n for n in range(MESSAGES) if RECEIVERS[n % len(RECEIVERS)] == receiver]
            assert numbers == mine, f"{sender} to {receiver}"
        client = valkey.client()
        assert client.xlen(streams.DEAD_LETTER) == 0
        eventually(lambda: client.xpending(streams.MESSAGES, streams.ROUTER_GROUP)["pending"] == 0)
        for receiver in RECEIVERS:
            eventually(lambda r=receiver: _pending(valkey, r) == 0)  # type: ignore[misc]
        events = [decode(fields) for _, fields in streams.read_range(client, streams.AGENT_STATE)]
        assert not [event for event in events if isinstance(event, AgentState) and event.state == "DEAD"]
    finally:
        town.close()


def _pending(valkey: ValkeyServer, agent: str) -> int:
    return int(valkey.client().xpending(streams.inbox(agent), streams.INBOX_GROUP)["pending"])
