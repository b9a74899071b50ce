"""Everything on the bus is killed and frozen at random while messages flow: each arrives once, in order.

The seed is printed; `CHAOS_SEED` repeats a run's choices, `CHAOS_SECONDS` makes it longer.
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

pytestmark = pytest.mark.valkey

SECONDS = float(os.environ.get("CHAOS_SECONDS", "8"))
SENDERS, RECEIVERS, MESSAGES = ("z", "leroy", "moe"), ("jay", "rick"), 400

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
        self.folder = folder
        self.processes: dict[str, Process] = {}
        for name in (*SENDERS, *RECEIVERS, "em-a", "em-b"):
            self.start(name)

    def start(self, name: str) -> None:
        folder, url, outbox = self.folder, self.valkey.url, str(self.folder / f"{name}.outbox")
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

    def got(self) -> dict[tuple[str, str], list[int]]:
        found: dict[tuple[str, str], list[int]] = defaultdict(list)
        for name in RECEIVERS:
            path = self.folder / f"{name}.got"
            for line in path.read_text().splitlines() if path.exists() else ():
                sender, _, number = line.split()
                found[name, sender].append(int(number))
        return found

    def close(self) -> None:
        for process in self.processes.values():
            if process.process.poll() is None:
                process.kill()


@pytest.mark.timeout(180 + 3 * int(SECONDS))
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
            victim = dice.choice([*town.processes, "valkey", "em-a", "em-b"])
            what = dice.choice(["kill", "kill", "freeze"])
            print(f"{what} {victim}")
            if victim == "valkey" and what == "kill":
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
        eventually(lambda: sum(map(len, town.got().values())) >= total, 60)
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
