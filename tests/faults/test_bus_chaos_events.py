"""Dispatchers, workers and Valkey are killed and frozen at random while events flow: one job an event, none lost.

The parts reach the server through a wire that is paused and cut, too.
Two flows at once. The jobs of deaths are left in their queue, so that each can be counted; those of changes are run by
real workers, so that each must end as one snapshot, however often its worker was killed. The seed is printed;
`CHAOS_SEED` repeats a run's choices; `FAULTS=all` makes it long.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis.exceptions
from redis import Redis

from backup_worker.queueing import queues
from em_bridge import connection, events, streams
from tests.integration.conftest import ValkeyServer
from tests.integration.parts import Part
from tests.integration.test_dispatcher import letters, unfinished
from tests.integration.wire import Wire
from tests.small_fleet import ON_CHANGE, SmallFleet, until

pytestmark = pytest.mark.valkey

LONG = os.environ.get("FAULTS") == "all"
SECONDS = float(os.environ.get("CHAOS_SECONDS", "60" if LONG else "4.5"))
DEATHS, CHANGES = (100_000, 500) if LONG else (8_000, 40)
SETTLES_WITHIN_S = 120.0 if LONG else 40.0
LONGEST_FREEZE_S = {
    "dispatcher": 5.5,
    "worker": 7.0 if LONG else 1.2,
    "valkey": 1.0,
    "wire": 7.0 if LONG else 1.0,
}
"""One that is frozen for longer than the others wait finds, when it thaws, that its work was given away."""

PARTS = {
    "dispatcher a": ("dispatcher",),
    "dispatcher b": ("dispatcher",),
    "worker a": ("worker", "--queue", "backup", "--processes", "1"),
    "worker b": ("worker", "--queue", "backup", "--processes", "1"),
}


class House:
    """The parts as processes, started again as they were after a kill."""

    def __init__(self, fleet: SmallFleet, valkey: ValkeyServer) -> None:
        self.fleet, self.valkey = fleet, valkey
        self.wire = Wire(valkey.port)
        self.parts = {name: self._start(name) for name in PARTS}
        self.ended: list[Part] = []
        self._thawing: list[threading.Timer] = []

    def _start(self, name: str) -> Part:
        words = (*PARTS[name], "--config", str(self.fleet.config_dir), "--redis-url", self.wire.url)
        return Part(self.fleet.folder, *words)

    def kill(self, name: str) -> None:
        part = self.parts[name]
        part.kill()
        self.ended.append(part)
        self.parts[name] = self._start(name)

    def freeze(self, name: str, seconds: float) -> None:
        """Stop the process alone, not its child, and let it go on later."""
        process = self.parts[name].process
        process.send_signal(signal.SIGSTOP)
        self._thawing.append(threading.Timer(seconds, process.send_signal, (signal.SIGCONT,)))
        self._thawing[-1].start()

    def kill_child(self, name: str) -> None:
        for child in self.parts[name].family():
            child.kill()

    def thaw(self) -> None:
        for timer in self._thawing:
            timer.join()

    def close(self) -> None:
        self.thaw()
        for part in (*self.parts.values(), *self.ended):
            part.close()
        self.wire.close()


@pytest.fixture
def house(tmp_path: Path, valkey: ValkeyServer) -> Iterator[House]:
    tiers = {"on-change": ON_CHANGE | {"keep": 10**6}}
    fleet = SmallFleet(tmp_path / "fleet", ("z", "jay"), tiers=tiers, limits={"queue_jobs": 10**6})
    found = House(fleet, valkey)
    yield found
    found.close()


class Source(threading.Thread):
    """Publishes deaths and changes in a steady flow, each until it is known to be on its stream."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.client = connection.connect(url, socket_timeout_s=2.0)
        self.jobs: dict[str, list[str]] = {"deaths": [], "changes": []}

    def run(self) -> None:
        began, parts = time.monotonic(), max(DEATHS // 20, 1)
        for part in range(parts):
            wanted: list[events.Event] = [
                events.AgentState("z", "DEAD", reason=f"{part}/{n}") for n in range(20)
            ]
            self._publish("deaths", wanted, f"deaths/{part}")
            for number in range(part * CHANGES // parts, (part + 1) * CHANGES // parts):
                agent = "z" if number % 2 else "jay"
                change = events.ConfigApplied(f"c{number}", agent, ("weights.json",), "em", "kari")
                self._publish("changes", [change], f"changes/{number}")
            time.sleep(max(0.0, began + SECONDS * part / parts - time.monotonic()))

    def _publish(self, kind: str, wanted: list[events.Event], once: str) -> None:
        while True:
            try:
                entries = streams.append_all_once(self.client, wanted, once=once)
                break
            except redis.exceptions.RedisError:
                time.sleep(0.1)
        self.jobs[kind] += [f"{wanted[0].stream.removeprefix('em:')}_{entry}" for entry in entries]


def make_chaos(house: House, dice: random.Random, source: Source) -> Counter[str]:
    """Kill and freeze until the source has published everything; return what was done how often."""
    done: Counter[str] = Counter()
    while source.is_alive():
        time.sleep(dice.uniform(0.05, 0.5))
        victim = dice.choice([*PARTS, "worker a", "worker b", "valkey", "wire"])
        what = dice.choice(
            ["kill", "freeze", "kill child"] if victim.startswith("worker") else ["kill", "freeze"]
        )
        seconds = dice.uniform(0.1, LONGEST_FREEZE_S[victim.split()[0]])
        print(f"{what} {victim}")
        done[f"{what} {victim.split()[0]}"] += 1
        if victim == "wire" and what == "kill":
            house.wire.cut()
        elif victim == "wire":
            house.wire.pause()
            time.sleep(seconds)
            house.wire.go_on()
        elif victim != "valkey":
            {"kill": house.kill, "kill child": house.kill_child}.get(
                what, lambda name, seconds=seconds: house.freeze(name, seconds)
            )(victim)
        elif what == "kill":
            house.valkey.restart()
        else:
            house.valkey.freeze()
            time.sleep(seconds)
            house.valkey.thaw()
    return done


def statuses(client: Redis, jobs: list[str]) -> Counter[str]:
    with client.pipeline(transaction=False) as pipeline:
        for job in jobs:
            pipeline.hget(f"rq:job:{job}", "status")
        return Counter((raw or b"gone").decode() for raw in pipeline.execute())


@pytest.mark.timeout(120 + int(SECONDS + SETTLES_WITHIN_S) * 2)
def test_every_event_becomes_one_job_and_every_job_is_done_whatever_is_killed(house: House) -> None:
    seed = int(os.environ.get("CHAOS_SEED", random.randrange(10**6)))
    print(f"CHAOS_SEED={seed}")
    for part in house.parts.values():
        part.says("working on" if "worker" in part.output.name else "dispatching as")
    source = Source(house.valkey.url)
    source.start()
    done = make_chaos(house, random.Random(seed), source)
    source.join()
    house.thaw()
    client = house.valkey.client()
    deaths, changes = source.jobs["deaths"], source.jobs["changes"]
    assert (len(deaths), len(changes)) == (DEATHS // 20 * 20, CHANGES)

    until(lambda: unfinished(client) == 0, SETTLES_WITHIN_S)
    until(lambda: statuses(client, changes) == Counter(finished=CHANGES), SETTLES_WITHIN_S)
    waiting: Any = client.lrange(f"rq:queue:{queues.RECOVERY}", 0, -1)
    assert Counter(raw.decode() for raw in waiting) == Counter(deaths)
    assert letters(client) == []
    snapshots = Counter(head.reason.split()[1] for head in house.fleet.repository.snapshots())
    assert snapshots == Counter(f"c{number}" for number in range(CHANGES))
    for place in ("queue:backup", "wip:backup", "scheduled:backup", "failed:backup"):
        until(lambda place=place: not client.exists(f"rq:{place}"))
    until(lambda: not client.exists("rq:queue:backup:intermediate"))
    assert {line["change"] for line in house.fleet.history("change")} == set(snapshots)
    assert house.fleet.history("job-failed") == []
    assert sum(done.values()) >= 5, f"too little happened: {dict(done)}"
