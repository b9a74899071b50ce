"""The demo's fleet: the files of an EM and four agents, their configuration, and their processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backup_worker.config import Config, load
from backup_worker.recovery import processes

DEPENDS_ON = {"em": [], "z": [], "jay": ["z"], "rick": ["z"], "leroy": ["jay", "rick"]}
AGENTS = ("z", "jay", "rick", "leroy")
SECONDS = {"dead_after": 2.0, "verify_within": 20.0}
_CLASSES = {
    "charter": ["SOUL.md"],
    "weights": ["priority_weights.json"],
    "rules": ["rules/**"],
    "memory": ["memory/**"],
    "skills": ["skills/**"],
}


@dataclass(frozen=True, slots=True)
class Fleet:
    """A fleet below one folder: `config/`, `agents/<name>/`, `backups/`, `var/`."""

    folder: Path

    @property
    def config_dir(self) -> Path:
        """The folder of the two configuration files."""
        return self.folder / "config"

    @property
    def config(self) -> Config:
        """The configuration."""
        return load(self.config_dir)

    def root(self, agent: str) -> Path:
        """The folder of one agent."""
        return self.folder / "agents" / agent

    def make(self, alerts_to: str) -> None:
        """Write the files of every agent, and the configuration; alerts go to the apprise URL `alerts_to`."""
        for agent in DEPENDS_ON:
            self._make_agent(agent)
        self.config_dir.mkdir()
        schedule = {
            "timezone": "Europe/Oslo",
            "repository": "../backups",
            "history": "../backups/system-history.jsonl",
            "state": "../var",
            "alerts": [alerts_to],
            # Nobody wants to wait for a page in a demo.
            "paging": {"group_seconds": 1},
        }
        agents = {"agents": {agent: self._agent_entry(agent) for agent in DEPENDS_ON}}
        for name, content in (("backup_schedule.json", schedule), ("agents.json", agents)):
            (self.config_dir / name).write_text(json.dumps(content, indent=2) + "\n")

    def _make_agent(self, agent: str) -> None:
        write_agent(self.root(agent), agent)

    def _agent_entry(self, agent: str) -> dict[str, Any]:
        em = [sys.executable, "-m", "em_bridge", "em"]
        return {
            "root": f"../agents/{agent}",
            "files": _CLASSES,
            "required": ["SOUL.md", "priority_weights.json"],
            "exclude": ["**/__pycache__/**", "*.outbox*", "orders.json"],
            "start": {"command": em if agent == "em" else [sys.executable, "agent.py"]},
            "depends_on": DEPENDS_ON[agent],
            # The demo kills them again much sooner than a state is normally given to prove itself.
            "recovery": {"stable_for": 1},
            "critical": agent in ("em", "z"),
            "heartbeat": {**SECONDS, "stable_beats": 3},
        }

    # ── processes ─────────────────────────────────────────────────────────────────────────────────────────────

    def process(self, agent: str) -> processes.Agent:
        """Return what finds and starts the agent's process."""
        config = self.config
        entry = config.agent(agent)
        command = tuple(entry.start.command or ()) if entry.start else ()
        return processes.Agent(agent, entry.root, command, config.schedule.state)

    def start(self, agents: Iterable[str], redis_url: str) -> None:
        """Start the processes of `agents`."""
        for agent in agents:
            processes.start(self.process(agent), redis_url=redis_url)

    def kill(self, agents: Iterable[str]) -> None:
        """End every process of `agents` with SIGKILL."""
        for agent in agents:
            for found in processes.find_agent(self.process(agent)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(found.pid, signal.SIGKILL)

    def running(self) -> list[processes.Running]:
        """Return every process of the fleet that is alive."""
        return [found for agent in DEPENDS_ON for found in processes.find_agent(self.process(agent))]

    # ── what the agents know ──────────────────────────────────────────────────────────────────────────────────

    def order(self, agent: str, to: str, count: int, per_second: int) -> None:
        """Have `agent` send `count` numbered messages to `to`."""
        orders = self.root(agent) / "orders.json"
        temporary = orders.with_suffix(".new")
        temporary.write_text(json.dumps({"to": to, "count": count, "per_second": per_second}))
        temporary.replace(orders)

    def heard(self, agent: str, sender: str) -> list[int]:
        """Return the numbers that `agent` got from `sender`, in the order in which it got them."""
        database = f"file:{self.root(agent) / 'memory' / 'memory.db'}?mode=ro"
        connection = sqlite3.connect(database, uri=True)
        try:
            rows = connection.execute("SELECT text FROM heard WHERE sender = ? ORDER BY rowid", (sender,))
            return [int(text) for (text,) in rows]
        finally:
            connection.close()


def write_agent(root: Path, agent: str) -> None:
    """Write the files of a sample agent into `root`, which must not hold one yet."""
    for folder in ("memory", "rules", "skills"):
        (root / folder).mkdir(parents=True)
    (root / "SOUL.md").write_text(f"# {agent}\n\nI am {agent}. I tell the truth, and I keep my promises.\n")
    weights = {"urgency": 0.5, "impact": 0.3, "effort": 0.2}
    (root / "priority_weights.json").write_text(json.dumps(weights, indent=2) + "\n")
    (root / "rules" / "limits.json").write_text(json.dumps({"max_spend": 100}) + "\n")
    (root / "memory" / "people.json").write_text(
        json.dumps({f"friend {n}": "kind" for n in range(50)}) + "\n"
    )
    (root / "skills" / "greet.py").write_text("def greet(name):\n    return f'Hello, {name}!'\n")
    with sqlite3.connect(root / "memory" / "memory.db") as memory:
        memory.execute("CREATE TABLE heard (sender TEXT, seq INTEGER, text TEXT)")
        memory.executemany(
            "INSERT INTO heard VALUES ('birth', ?, 'a first memory')", [(n,) for n in range(100)]
        )
    memory.close()
    if agent != "em":
        shutil.copyfile(Path(__file__).with_name("agent_program.py"), root / "agent.py")


def seed(folder: Path) -> None:
    """Write the sample agents that are not there yet below `folder`: for a fleet that starts with empty volumes."""
    for agent in DEPENDS_ON:
        if not (folder / agent / "SOUL.md").exists():
            write_agent(folder / agent, agent)


if __name__ == "__main__":
    seed(Path(sys.argv[1]))
