"""A real Sentinel set promotes a replica while events and messages flow: every part goes on, nothing is lost.

The primary is killed, or it is deposed while it lives, and then takes writes for some seconds that are thrown away
later. `FAULTS=all` goes on with that for minutes.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from em_bridge import Agent, Publisher, streams
from em_bridge.connection import connect
from em_bridge.errors import AgentBackupError
from em_bridge.events import AgentState, ConfigApplied, decode
from tests.integration.conftest import ValkeyServer, free_port
from tests.integration.parts import Part
from tests.integration.processes import em_bridge
from tests.integration.sentinels import Sentinels
from tests.integration.test_dispatcher import letters, unfinished
from tests.small_fleet import ON_CHANGE, SmallFleet, until

pytestmark = [pytest.mark.valkey, pytest.mark.timeout(180)]

CHANGES, MESSAGES = 32, 160
ROUNDS = 21 if os.environ.get("FAULTS") == "all" else 1
PARTS = {
    "dispatcher": ("dispatcher",),
    "scheduler": ("scheduler",),
    "watchdog": ("watchdog",),
    "backup": ("worker", "--queue", "backup", "--processes", "1"),
    "maintenance": ("worker", "--queue", "maintenance", "--processes", "1"),
}


def wait_until_at_work(parts: Mapping[str, Part]) -> None:
    for word, name in (
        ("dispatching", "dispatcher"),
        ("scheduling", "scheduler"),
        ("watching", "watchdog"),
        ("working on", "backup"),
        ("working on", "maintenance"),
    ):
        parts[name].says(word, 40)


@dataclass
class Flow:
    """Changes published and messages sent, one after the other, until all are out."""

    url: str
    agent: Agent
    published: list[str] = field(default_factory=list)

    def run(self) -> None:
        with Publisher(self.url, patience_s=30.0) as em:
            for number in range(MESSAGES):
                self.agent.send("jay", b"%d" % number)
                if number % (MESSAGES // CHANGES) == 0:
                    with contextlib.suppress(AgentBackupError):
                        change = f"c{number}"
                        em.config_applied(change, "z", ["weights.json"], "em", "kari")
                        self.published.append(change)
                time.sleep(0.05)


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[Sentinels]:
    with contextlib.closing(Sentinels(tmp_path)) as found:
        yield found


def test_a_promoted_replica_is_found_by_every_part_and_nothing_happens_twice(
    sentinels: Sentinels, tmp_path: Path
) -> None:
    fleet = SmallFleet(tmp_path / "fleet", ("z",), tiers={"on-change": ON_CHANGE | {"keep": 10**6}})
    url = sentinels.url
    got: list[int] = []
    with contextlib.ExitStack() as stack:
        em = stack.enter_context(em_bridge(tmp_path, "em", url, "em"))
        env = {"REDIS_URL": url, "BACKUP_CONFIG": str(fleet.config_dir)}
        parts = {name: Part(fleet.folder, *words, env=env) for name, words in PARTS.items()}
        for part in parts.values():
            stack.callback(part.close)
        wait_until_at_work(parts)
        z = stack.enter_context(Agent("z", url, outbox=tmp_path / "z"))
        jay = stack.enter_context(Agent("jay", url, outbox=tmp_path / "jay"))
        until(lambda: connect(url).sismember(streams.SEEN, "jay"), 20)
        flow = Flow(url, z)
        flowing = threading.Thread(target=flow.run)
        flowing.start()
        reading = threading.Thread(target=_read, args=(jay, got, MESSAGES))
        reading.start()
        time.sleep(2)
        sentinels.kill_primary()
        flowing.join()
        reading.join(60)

        assert got == list(range(MESSAGES))
        client = connect(url)
        until(lambda: unfinished(client) == 0, 30)
        entries = {
            entry: decode(fields) for entry, fields in streams.read_range(client, streams.CONFIG_CHANGE)
        }
        there = [event.change for event in entries.values() if isinstance(event, ConfigApplied)]
        assert set(flow.published) <= set(there), "a publish call returned, and its event is gone"
        assert Counter(there).most_common(1)[0][1] == 1, "published twice"
        until(lambda: set(there) <= _snapshots(fleet).keys(), 60)
        assert set(_snapshots(fleet).values()) == {1}
        assert letters(client) == []
        assert all(part.process.poll() is None for part in parts.values()) and em.process.poll() is None
        for name, log in {**{n: p.log for n, p in parts.items()}, "em": em.err.read_text()}.items():
            assert "Traceback" not in log and "secret" not in log, (name, log)
        for name in ("dispatcher", "scheduler", "watchdog"):
            _one_line_a_change(parts[name].log)


def _read(agent: Agent, got: list[int], count: int) -> None:
    deadline = time.monotonic() + 90
    while len(got) < count and time.monotonic() < deadline:
        if message := agent.receive(0.5):
            got.append(int(message.payload))
            agent.ack(message)


def _snapshots(fleet: SmallFleet) -> Counter[str]:
    return Counter(head.reason.split()[1] for head in fleet.repository.snapshots())


def _one_line_a_change(log: str) -> None:
    """Check that each loop of a part said once that redis went and once that it came back."""
    told: dict[str, list[str]] = {}
    for line in log.splitlines():
        for word in ("waiting:", "redis is back"):
            if word in line:
                # A dispatcher has two loops, each with its own connection and its own voice.
                told.setdefault(line.split()[2], []).append(word)
    assert told and all(words == ["waiting:", "redis is back"] for words in told.values()), log


class Crowd:
    """Threads that publish events one after the other, each until its call returns; what returned is noted."""

    def __init__(self, url: str, size: int) -> None:
        self.url = url
        self.over = threading.Event()
        self.returned: dict[str, str] = {}
        self.threads = [threading.Thread(target=self._publish, args=(number,)) for number in range(size)]

    def __enter__(self) -> Crowd:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()

    def _publish(self, number: int) -> None:
        count = 0
        with Publisher(self.url, patience_s=60.0) as em:
            while not self.over.is_set():
                event = f"{number}/{count}"
                self.returned[event] = em.agent_state("z", "DEGRADED", reason=event)
                count += 1


@pytest.mark.timeout(180 + ROUNDS * 60)
def test_what_a_call_has_returned_is_there_whichever_server_is_the_primary(
    sentinels: Sentinels, tmp_path: Path
) -> None:
    seed = int(os.environ.get("CHAOS_SEED", random.randrange(10**6)))
    print(f"CHAOS_SEED={seed}")
    dice = random.Random(seed)
    url, sent, got = sentinels.url, 0, list[int]()
    with (
        em_bridge(tmp_path, "em a", url, "em"),
        em_bridge(tmp_path, "em b", url, "em"),
        Agent("z", url, outbox=tmp_path / "z") as z,
        Agent("jay", url, outbox=tmp_path / "jay") as jay,
    ):
        until(lambda: connect(url).sismember(streams.SEEN, "jay"), 20)
        with Crowd(url, 4) as crowd:
            for turn in range(ROUNDS):
                sentinels.wait_until_whole()
                for _ in range(50):
                    z.send("jay", b"%d" % sent)
                    sent += 1
                    time.sleep(dice.uniform(0.0, 0.02))
                if turn % 3 < 2:
                    sentinels.switch_over()
                else:
                    dead = sentinels.primary
                    sentinels.kill_primary()
                    time.sleep(dice.uniform(0.0, 2.0))
                    dead.start()
        _read(jay, got, sent)
        assert jay.receive(0.5) is None
    assert got == list(range(sent))
    there = [
        (event.reason, entry)
        for entry, fields in streams.read_range(connect(url), streams.AGENT_STATE)
        if isinstance(event := decode(fields), AgentState) and event.state == "DEGRADED"
    ]
    print(f"{len(crowd.returned)} events, {sent} messages")
    assert len(there) == len(set(there)) and dict(there) == crowd.returned
    assert len(crowd.returned) > 100 * ROUNDS


def test_every_part_outlives_a_primary_that_becomes_a_replica_for_a_moment(
    valkey: ValkeyServer, tmp_path: Path
) -> None:
    # Blocked reads end with an error of their own then, which once ended the EM and the workers.
    fleet = SmallFleet(tmp_path / "fleet", ("z",), tiers={"on-change": ON_CHANGE})
    client = valkey.client()
    with contextlib.ExitStack() as stack:
        em = stack.enter_context(em_bridge(tmp_path, "em", valkey.url, "em"))
        env = {"REDIS_URL": valkey.url, "BACKUP_CONFIG": str(fleet.config_dir)}
        parts = {name: Part(fleet.folder, *words, env=env) for name, words in PARTS.items()}
        for part in parts.values():
            stack.callback(part.close)
        wait_until_at_work(parts)
        time.sleep(1)
        # To a server that is not there: nothing is copied from it, and nothing is lost.
        client.replicaof("127.0.0.1", free_port())
        time.sleep(2)
        client.replicaof("NO", "ONE")
        with Publisher(valkey.url, patience_s=20.0) as publisher:
            publisher.config_applied("c1", "z", ["weights.json"], "em", "kari")
        until(lambda: _snapshots(fleet) == {"c1": 1}, 30)
        assert all(part.process.poll() is None for part in parts.values()) and em.process.poll() is None
        for log in (*(part.log for part in parts.values()), em.err.read_text()):
            assert "Traceback" not in log, log
