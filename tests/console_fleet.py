"""A small fleet with a past, for the tests of the console: made by the real engine on a real server."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgpack
import waitress
from flask import Flask
from werkzeug.test import TestResponse

from backup_worker import backups, schedule
from backup_worker.config import load
from backup_worker.console import create_app
from backup_worker.console.server import THREADS
from backup_worker.console.users import Users
from backup_worker.recovery.incident import (
    DEPEND,
    FENCE,
    PROVE,
    RECOVERED,
    RESTORE,
    SELECT,
    START,
    IncidentStore,
)
from backup_worker.runtime import Runtime
from backup_worker.snapshots import verify_snapshot
from em_bridge import Publisher, events, streams
from em_bridge.connection import connect

AGENTS = ("em", "z", "jay", "rick", "leroy")
NEEDS = {"em": (), "z": ("em",)}
DAY = 86400.0
PASSWORD = "correct horse battery"


@dataclass
class World:
    """A configuration with agents on disk, and the server behind it."""

    folder: Path
    url: str

    @property
    def config_dir(self) -> Path:
        return self.folder / "config"

    @property
    def runtime(self) -> Runtime:
        return Runtime(load(self.config_dir), connect(self.url), self.url)

    @property
    def users(self) -> Users:
        return Users(self.folder / "var" / "console")

    def root(self, agent: str) -> Path:
        return self.folder / "agents" / agent

    def weights(self, agent: str) -> Path:
        return self.root(agent) / "priority_weights.json"


def make_world(folder: Path, url: str, agents: tuple[str, ...] = AGENTS) -> World:
    """Write a configuration and the agents' files."""
    world = World(folder, url)
    world.config_dir.mkdir(parents=True)
    schedule = {
        "timezone": "Europe/Oslo", "repository": "../backups", "history": "../backups/system-history.jsonl",
        "state": "../var", "alerts": ["json://someone:s3cret-word@127.0.0.1:9/alerts"],
        "limits": {"reserve_bytes": 0},
    }  # fmt: skip
    entries = {}
    for name in agents:
        root = world.root(name)
        (root / "memory").mkdir(parents=True)
        (root / "SOUL.md").write_text(f"# {name}\n\nBe useful.\nBe honest.\n")
        (root / "memory" / "facts.md").write_text("the sky is blue\n" * 40)
        world.weights(name).write_text(json.dumps({"urgency": 0.5, "impact": 0.3, "novelty": 0.2}, indent=2))
        entries[name] = {
            "root": str(root), "required": ["SOUL.md", "priority_weights.json"], "critical": name in ("em", "z"),
            "files": {"charter": ["SOUL.md"], "weights": ["priority_weights.json"], "memory": ["memory/**"],
                      "rules": ["rules/**"]},
            "depends_on": [other for other in NEEDS.get(name, ("z",)) if other in agents],
        }  # fmt: skip
    (world.config_dir / "backup_schedule.json").write_text(json.dumps(schedule))
    (world.config_dir / "agents.json").write_text(json.dumps({"agents": entries}))
    return world


def drifting(agent: str, age: float) -> dict[str, float]:
    """Return the weights of an agent so many days ago."""
    return {"urgency": round(0.5 + 0.01 * int(age), 2), "impact": 0.3, "novelty": 0.2}


def live_through(
    world: World, now: float, days: int = 10, weights: Callable[[str, float], dict[str, float]] = drifting
) -> None:
    """Give the fleet a past: backups of some days, good and not, a change, a recovery, alerts, messages."""
    runtime = world.runtime

    def back_up(name: str, tier: str, at: float, *, wiped: bool = False) -> None:
        run = last_run(runtime, tier, at)
        found = json.dumps(weights(name, (now - run) / DAY), indent=2)
        world.weights(name).write_text("" if wiped else found)
        backups.scheduled(runtime, name, tier, last_slot(runtime, tier, at), now=run + 60)

    for age in range(days, 0, -1):
        for name in runtime.config.agents:
            if (name, age) != ("leroy", 4):
                back_up(name, "daily", now - age * DAY, wiped=(name, age) == ("rick", 1))
    for name in runtime.config.agents:
        back_up(name, "weekly", now)
        if name != "leroy":
            back_up(name, "daily", now)
        world.weights(name).write_text(json.dumps(weights(name, 0), indent=2))
    heads = runtime.repository.snapshots("jay", "daily")
    runtime.repository.pin(heads[2].id)
    spoiled = runtime.repository.path(heads[5].id) / "files" / "priority_weights.json"
    spoiled.chmod(0o600)
    spoiled.write_bytes(b'{"urgency": 9}')
    verify_snapshot(runtime.repository, heads[5].id, now)
    _talk(runtime, now)
    _recover(runtime, now)


def last_run(runtime: Runtime, tier: str, now: float) -> float:
    return schedule.previous_run(runtime.config.schedule.tiers[tier], runtime.config.schedule.timezone, now)


def last_slot(runtime: Runtime, tier: str, now: float) -> str:
    found = runtime.config.schedule.tiers[tier]
    return schedule.slot_name(found, runtime.config.schedule.timezone, last_run(runtime, tier, now))


_STATES = {
    "ALIVE": (4000, "", 2), "DEGRADED": (200, "says “low on memory”", 2), "DEAD": (43, "no heartbeat for 60 s", 103),
}  # fmt: skip
"""For how long an agent is in a state, why, and for how long it has been silent."""


def _talk(runtime: Runtime, now: float) -> None:
    client = runtime.redis
    for name, state in zip(
        runtime.config.agents, ("ALIVE", "ALIVE", "DEGRADED", "DEAD", "ALIVE"), strict=False
    ):
        since, reason, silent = _STATES[state]
        known = {
            "state": state, "since": now - since, "reason": reason, "incarnation": f"{name}-1",
            "last_beat": now - silent, "last_entry": "1-1",
        }  # fmt: skip
        client.hset(streams.STATES, name, msgpack.packb(known))
    for group, stream in (
        (streams.DISPATCHER_GROUP, streams.CONFIG_CHANGE),
        (streams.ROUTER_GROUP, streams.MESSAGES),
    ):
        streams.ensure_group(client, stream, group)
    em = Publisher(client)
    new = json.dumps({"urgency": 0.72, "impact": 0.18, "patience": 0.1}, indent=2).encode()
    em.config_proposed(
        "z-weights-7", "z", ["priority_weights.json", "SOUL.md"], "em", reason="too many urgent tasks were late",
        proposed={"priority_weights.json": new, "SOUL.md": b"# z\n\nBe useful.\nBe honest.\nBe brief.\n"},
    )  # fmt: skip
    em.config_proposed("jay-rules-2", "jay", ["SOUL.md"], "em")
    em.config_rejected("jay-rules-2", "kari", reason="not now")
    for seq in range(1, 6):
        streams.append(client, events.Message("z", "jay", seq, b"hello <b>jay</b>", now))
    letter = streams.dead_letter(
        "em:config-change",
        "1-1",
        "unknown type “config.guessed”",
        {b"type": b"config.guessed", b"body": b"\xff\x00<i>"},
        now,
    )
    streams.append(client, letter)
    runtime.alert(
        "missing/daily/leroy",
        "critical",
        "daily backup of leroy is missing",
        "slot was due and is not there",
        agent="leroy",
    )
    runtime.alert("dead-letter/1", "warning", "there are dead letters", "1 event could not be handled")


def _recover(runtime: Runtime, now: float) -> None:
    store = IncidentStore(runtime.redis)
    steps = ((FENCE, "pid 4711 and 2 children are gone"), (SELECT, "daily and weekly of today"),
             (RESTORE, "7 files, 1.4 KiB"),
             (DEPEND, "em is verified"), (START, "pid 4712"), (PROVE, "3 beats of leroy-2"))  # fmt: skip
    past, _ = store.open(
        "leroy", token="20261101T070000-aaaa", now=now - 7200, reason="no heartbeat for 60 s", beat_mark="0-0"
    )
    for offset, (step, detail) in enumerate(steps):
        past = past.noted(step, now - 7200 + 1 + offset, True, detail)
    store.save(past.closed(RECOVERED, now - 7190, "0-0"), wake_at=None)
    present, _ = store.open(
        "rick", token="20261102T070000-bbbb", now=now - 40, reason="no heartbeat for 60 s", beat_mark="0-0"
    )
    present = present.noted(FENCE, now - 39, True, "pid 99 is gone").noted(
        SELECT, now - 38, False, "weekly is damaged"
    )
    newest = runtime.repository.snapshots("rick", "weekly")[-1].id
    store.save(replace(present.entering(SELECT), attempts=2, chosen=(newest,)), wake_at=now + 100)


@contextmanager
def served(world: World, *, loopback: bool = True) -> Iterator[str]:
    """Serve the console on a free port; yield its address."""
    app = create_app(world.runtime, loopback=loopback)
    server = waitress.create_server(app, host="127.0.0.1", port=0, threads=THREADS)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.effective_port}"
    finally:
        app.extensions["backup-worker-feed"].close()
        server.task_dispatcher.shutdown(timeout=5)
        server.close()
        thread.join(5)
        app.extensions["backup-worker-live"].close()


@contextmanager
def worker(world: World, queue: str = "backup", *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a real worker process on one queue."""
    command = [sys.executable, "-m", "backup_worker", "worker", "--config", str(world.config_dir),
               "--redis-url", world.url, "--queue", queue, "--processes", "1", *words]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: connect(world.url).smembers("rq:workers"))
        yield process
    finally:
        process.terminate()
        process.wait(20)


def until(true: Callable[[], object], timeout_s: float = 15.0) -> None:
    """Wait until `true()`; fail if it does not come to that."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def basic(name: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()}


class Visitor:
    """Somebody with a browser that has no JavaScript: keeps cookies, and sends the token of the page it looks at."""

    def __init__(self, app: Flask, host: str = "localhost") -> None:
        self.client = app.test_client()
        self.headers = {"Host": host, "Accept": "text/html"}

    def get(self, path: str, **headers: str) -> TestResponse:
        return self.client.get(path, headers={**self.headers, **headers})

    def post(self, path: str, *, page: str = "/", token: str | None = None, **form: str) -> TestResponse:
        given = self.token(page) if token is None else token
        return self.client.post(path, data={"csrf_token": given, **form}, headers=self.headers)

    def token(self, page: str = "/") -> str:
        shown = self.client.get(page, headers=self.headers, follow_redirects=True).text
        found = re.search(r'name="csrf-token" content="([^"]+)"', shown)
        assert found is not None, shown
        return found[1]

    def log_in(self, name: str, password: str = PASSWORD, **form: str) -> TestResponse:
        return self.post("/login", page="/login", name=name, password=password, **form)
