"""A small fleet of real processes on a real repository, for the tests of recovery.

What an agent does follows from its own files: `mode` says whether it beats, is silent or dies at its start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from backup_worker import alerts, backups
from backup_worker.config import load
from backup_worker.recovery import notice, processes
from backup_worker.recovery.incident import Incident
from backup_worker.recovery.service import RecoveryService
from backup_worker.runtime import Runtime
from em_bridge import streams
from em_bridge.connection import connect

PROGRAM = """
import os, sys, time
mode = open("mode").read().strip()
print("mode", mode, "pid", os.getpid(), flush=True)
if mode == "die":
    sys.exit("this state kills me")
if mode == "silent":
    time.sleep(600)
from em_bridge.connection import connect
from em_bridge.pulse import Pulse
with Pulse(connect(retrying=False), os.environ.get("AGENT_ID") or sys.argv[1], interval_s=0.03):
    if mode == "fade":
        time.sleep(0.2)
        os._exit(7)
    time.sleep(600)
"""


@dataclass
class Fleet:
    """Agents below `folder`, on the server at `url`; `start`ed ones are ended by `close`."""

    folder: Path
    url: str
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)
    """Further `limits` of the schedule."""

    def __post_init__(self) -> None:
        (self.folder / "config").mkdir(parents=True)
        schedule = {
            "timezone": "UTC",
            "repository": "../backups",
            "history": "../backups/system-history.jsonl",
            "state": "../var",
            "limits": {"reserve_bytes": 0} | self.limits,
            "tiers": {"weekly": {"cron": "0 23 * * 0", "include": ["*"], "slot": "%G-W%V", "keep": 50}},
        }
        (self.folder / "config" / "backup_schedule.json").write_text(json.dumps(schedule))
        self.client: redis.Redis = connect(self.url)

    def add(self, agent: str, *, mode: str = "beat", **options: Any) -> None:
        """Make an agent with its files; `options` go into its entry of agents.json."""
        root = self.root(agent)
        (root / "memory").mkdir(parents=True)
        (root / "SOUL.md").write_text(f"I am {agent}.\n")
        (root / "memory" / "notes.md").write_text("remember the milk\n" * 50)
        (root / "mode").write_text(mode)
        (root / "agent.py").write_text(PROGRAM)
        beat = {"dead_after": 1, "verify_within": 10, "stable_beats": 3, **options.pop("heartbeat", {})}
        recovery = {"stop_within": 2, **options.pop("recovery", {})}
        self.entries[agent] = {
            "root": f"../agents/{agent}",
            "required": ["SOUL.md"],
            "start": {"command": [sys.executable, "agent.py"]},
            "heartbeat": beat,
            "recovery": recovery,
        } | options
        self.write()

    def write(self) -> None:
        """Write agents.json as `entries` stands."""
        entries = {
            name: {k: v for k, v in one.items() if v is not None} for name, one in self.entries.items()
        }
        (self.folder / "config" / "agents.json").write_text(json.dumps({"agents": entries}))

    def root(self, agent: str) -> Path:
        return self.folder / "agents" / agent

    @property
    def state(self) -> Path:
        return self.folder / "var"

    @property
    def runtime(self) -> Runtime:
        return Runtime(load(self.folder / "config"), self.client, self.url)

    @property
    def service(self) -> RecoveryService:
        return RecoveryService(self.runtime)

    def backup(self, agent: str) -> str:
        """Take a weekly snapshot (everything) and return its id."""
        return backups.by_hand(self.runtime, agent, "weekly", now=time.time()).id

    def set_mode(self, agent: str, mode: str) -> None:
        (self.root(agent) / "mode").write_text(mode)

    def wipe(self, agent: str) -> None:
        """Leave garbage where the memory and the charter were."""
        (self.root(agent) / "SOUL.md").write_text("")
        (self.root(agent) / "memory" / "notes.md").unlink()
        (self.root(agent) / "memory" / "garbage").write_text("0xdead\n")

    def files(self, agent: str) -> dict[str, bytes]:
        """Return the agent's own files: without the notice that a recovery leaves."""
        root = self.root(agent)
        found = {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
        found.pop(notice.FILE, None)
        return found

    # ── processes ─────────────────────────────────────────────────────────────────────────────────────────────

    def process(self, agent: str) -> processes.Agent:
        start = self.entries[agent].get("start") or {}
        return processes.Agent(agent, self.root(agent), tuple(start.get("command") or ()), self.state)

    def start(self, agent: str) -> int:
        """Start the agent as the fleet does, and wait until it beats."""
        before = self.beats(agent)
        pid = processes.start(self.process(agent), redis_url=self.url)
        wait_for(lambda: self.beats(agent) > before + 2, f"{agent} to beat")
        return pid

    def kill(self, agent: str) -> None:
        for found in self.running(agent):
            os.kill(found.pid, signal.SIGKILL)
        wait_for(lambda: not self.running(agent), f"{agent} to be gone")

    def running(self, agent: str) -> list[processes.Running]:
        return processes.find_agent(self.process(agent))

    def beats(self, agent: str) -> int:
        rows: Any = self.client.xrange(streams.HEARTBEATS)
        return sum(agent.encode() in fields[b"body"] for _, fields in rows)

    def close(self) -> None:
        for agent in self.entries:
            for found in self.running(agent):
                os.kill(found.pid, signal.SIGKILL)
        self.client.close()

    # ── recoveries ────────────────────────────────────────────────────────────────────────────────────────────

    def open(self, agent: str, reason: str = "test") -> Incident:
        return self.service.open(agent, reason)

    def drive(self, *incidents: str, within_s: float = 30.0, pause_s: float = 0.02) -> list[Incident]:
        """Advance incidents until they are closed, as workers do that are woken very often; return them."""
        service = self.service

        def all_closed() -> bool:
            # Each of them, also behind one that is still open: they wait for one another.
            advanced = [service.advance(incident) for incident in incidents]
            return not any(incident.is_open for incident in advanced)

        wait_for(all_closed, f"{', '.join(incidents)} to be closed", within_s=within_s, pause_s=pause_s)
        return [service.store.get(incident) for incident in incidents]

    def recover(self, agent: str) -> Incident:
        return self.drive(self.open(agent).id)[0]

    def alerts(self) -> list[str]:
        """Return the keys of the alerts that are open."""
        return [one.key for one in alerts.open_alerts(self.client) if one.resolved_at is None]

    def history(self, kind: str = "recovery") -> list[dict[str, Any]]:
        return [line for line in self.runtime.history.read() if line["kind"] == kind]


def wait_for(
    condition: Callable[[], bool], what: str, *, within_s: float = 15.0, pause_s: float = 0.02
) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(pause_s)


def steps(incident: Incident) -> list[str]:
    """Return the steps as text: the name, with “!” behind a failed one."""
    return [one.step + ("" if one.ok else "!") for one in incident.steps]


def cli(fleet: Fleet, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of ours on the fleet's configuration."""
    command = [sys.executable, "-m", "backup_worker", *arguments, "--config", str(fleet.folder / "config")]
    environment = {**os.environ, "REDIS_URL": fleet.url}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
