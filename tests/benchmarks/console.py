"""The console's pages on a large fleet: how long the server works on each, beside an empty page of the same Flask.

The fleet is made by the engine (one snapshot an agent) and multiplied as a copy on disk would be: folders with the
same files under other slots. Redis holds states, heartbeats, incidents, changes, alerts, dead letters and messages.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgpack
from flask import Flask
from flask.testing import FlaskClient

from backup_worker.config import Config, load
from backup_worker.console import create_app
from backup_worker.console.app import warm
from backup_worker.embedded import EmbeddedValkey
from backup_worker.recovery.incident import RECOVERED, IncidentStore
from backup_worker.runtime import Runtime
from backup_worker.snapshots import Manifest, Repository, take_snapshot
from backup_worker.snapshots.manifest import encode
from em_bridge import Publisher, events, streams
from em_bridge.connection import connect
from tests.benchmarks.data import make_small_files, write_config
from tests.benchmarks.measure import Settings, Table, percentile

AGENTS, SLOTS = 500, 40
LIMIT_MS = 300
DAY = 86400.0
TIERS: dict[str, object] = {
    "daily": {"cron": "0 7 * * *", "include": ["*"], "slot": "%Y-%m-%d", "keep": SLOTS, "unchanged": "link"},
}


def pages(settings: Settings) -> Iterator[Table]:
    """Yield the table of pages."""
    agents, slots = (100, 10) if settings.quick else (AGENTS, SLOTS)
    folder = settings.folder / "console"
    folder.mkdir()
    with EmbeddedValkey(folder / "server") as valkey:
        runtime = make(folder, valkey.url, agents, slots)
        newest = runtime.repository.ids("a00001")[-1]
        paths = {
            "fleet": "/",
            "fleet, next part": "/?page=2",
            "backups": "/backups",
            "backups of one agent": "/backups?agent=a00001",
            "a snapshot": f"/snapshots/{newest}",
            "restore, dry run": f"/snapshots/{newest}/restore",
            "weights over time": "/weights/a00001",
            "incidents": "/incidents",
            "changes": "/changes",
            "alerts": "/alerts",
            "messages": "/messages",
            "history": "/history",
            "history, nothing found": "/history?q=nothing-like-it",
            "queues": "/rq/",
            "metrics": "/metrics",
        }
        app = create_app(runtime)
        # As the server does when it starts, before it takes the first request.
        warm(app)
        client = app.test_client()
        title = f"Console: {agents} agents, {agents * slots:,} snapshots"
        table = Table(title, ("page", "first ms", "median ms", "most ms", "processor ms", "size"))
        floor = _floor(settings.runs)
        for title, path in paths.items():
            first, _, size = _ask(client, path)
            asked = [_ask(client, path) for _ in range(4 * settings.runs)]
            times, work = [one[0] for one in asked], [one[1] for one in asked]
            table.add(
                title, f"{first:.0f}", f"{statistics.median(times):.0f}", f"{percentile(times, 1.0):.0f}",
                f"{statistics.median(work):.0f}", f"{size / 1024:.0f} KiB",
            )  # fmt: skip
        table.notes.append(
            f"an empty page of the same Flask takes {floor:.1f} ms; the limit is {LIMIT_MS} ms"
        )
        table.notes.append(
            "processor: of the thread that serves the request, which a busy machine does not stretch"
        )
        table.notes.append("first: the first request for that page after the start of the console")
        yield table


def _ask(client: FlaskClient, path: str) -> tuple[float, float, int]:
    """Return the milliseconds that passed, those of them that this thread worked, and the bytes of the answer."""
    begun, worked = time.perf_counter(), time.thread_time()
    answer = client.get(path, headers={"Host": "localhost", "Accept": "text/html"})
    size = len(answer.data)
    if answer.status_code != 200:
        raise RuntimeError(f"{path} answered {answer.status_code}")
    return (time.perf_counter() - begun) * 1000, (time.thread_time() - worked) * 1000, size


def _floor(runs: int) -> float:
    app = Flask("empty")
    app.add_url_rule("/", "empty", lambda: "")
    client = app.test_client()
    return statistics.median([_ask(client, "/")[0] for _ in range(4 * runs)])


def make(folder: Path, url: str, agents: int, slots: int) -> Runtime:
    """Make the fleet with its snapshots and its past."""
    fleet = make_small_files(folder / "agents", agents=agents, files=8, mean_bytes=600)
    config = load(write_config(folder, fleet, tiers=TIERS))
    runtime = Runtime(config, connect(url, socket_timeout_s=60.0), url)
    multiply(runtime.repository, config, slots)
    _live_through(runtime, list(config.agents), slots)
    return runtime


def multiply(repository: Repository, config: Config, slots: int) -> None:
    """Make a snapshot of every agent, and `slots` of each by copying."""
    now = time.time()
    first = _slot(now - slots * DAY)
    for name in config.agents:
        manifest = take_snapshot(
            repository, config.files_of(name), tier="daily", slot=first, include=["*"], unchanged="link",
            now=now - slots * DAY, reason="scheduled",
        )  # fmt: skip
        for age in range(slots - 1, 0, -1):
            _copy(repository, manifest, _slot(now - age * DAY), now - age * DAY)


def _slot(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")


def _copy(repository: Repository, manifest: Manifest, slot: str, at: float) -> None:
    identifier = f"{manifest.tier}/{slot}/{manifest.agent}"
    source, target = repository.path(manifest.id), repository.path(identifier)
    for entry in manifest.entries:
        place = target / "files" / entry.path
        if entry.kind == "dir":
            place.mkdir(parents=True, exist_ok=True)
        else:
            os.link(source / "files" / entry.path, place)
    content = encode(replace(manifest, id=identifier, slot=slot, created_at=at))
    (target / "manifest.json").write_bytes(content)


def _live_through(runtime: Runtime, agents: list[str], slots: int) -> None:
    client, now = runtime.redis, time.time()
    with client.pipeline(transaction=False) as pipe:
        for number, name in enumerate(agents):
            state = "DEAD" if number % 50 == 3 else "ALIVE"
            known = {"state": state, "since": now - 9000, "reason": "", "incarnation": "i1", "last_beat": now}
            pipe.hset(streams.STATES, name, msgpack.packb(known))
        add: Any = pipe.execute_command
        for second in range(300, 0, -10):
            for number, name in enumerate(agents):
                beat = events.encode(events.Heartbeat(name, "i1", 300 - second + 1))
                fields = [part for pair in beat.items() for part in pair]
                at = int((now - second) * 1000)
                add("XADD", streams.HEARTBEATS, f"{at}-{number + 1}", *fields)
        pipe.execute()
    store, em = IncidentStore(client), Publisher(client)
    for number, name in enumerate(agents[:200]):
        opened = now - 100 * number
        incident, _ = store.open(name, token=f"t{number}", now=opened, reason="no heartbeat", beat_mark="0-0")
        if number % 20:
            store.save(incident.closed(RECOVERED, opened + 12, "0-0"), wake_at=None)
        em.config_proposed(f"c{number}", name, ["priority_weights.json"], "em", reason="tuned",
                           proposed={"priority_weights.json": json.dumps({"w": number}).encode()})  # fmt: skip
        if number >= 20:
            em.config_rejected(f"c{number}", "kari", reason="not now")
        runtime.alert(
            f"missing/daily/{name}", "warning", f"daily backup of {name} is missing", "it is late", agent=name
        )
        streams.append(client, streams.dead_letter("em:due", "1-1", "nobody knows", {b"type": b"x"}, now))
        for seq in range(1, 11):
            streams.append(client, events.Message(name, agents[0], seq, b"x" * 64, now))
    with contextlib.suppress(StopIteration):
        names = iter(agents * slots)
        while True:
            runtime.history.extend(
                [("backup", now, {"agent": next(names), "tier": "daily", "status": "good", "files": 8, "bytes": 4800})
                 for _ in range(500)]
            )  # fmt: skip
