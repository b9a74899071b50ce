"""A configuration with small agents and a repository on disk, for the tests of the running parts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis import Redis

from backup_worker.config import Config, load
from backup_worker.history import History
from backup_worker.runtime import Runtime
from backup_worker.snapshots import Repository

DAILY = {"cron": "0 7 * * *", "include": ["*"], "slot": "%Y-%m-%d", "keep": 30, "unchanged": "link"}
ON_CHANGE = {
    "events": ["config.applied"], "include": ["*"], "slot": "%Y-%m-%d-%H%M%S", "keep": 10, "unchanged": "link",
}  # fmt: skip


@dataclass
class SmallFleet:
    """Agents below `folder`/agents, the configuration in `folder`/config, the repository beside them."""

    folder: Path
    agents: tuple[str, ...] = ("z",)
    tiers: Mapping[str, Any] = field(default_factory=lambda: {"daily": DAILY, "on-change": ON_CHANGE})
    limits: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config_dir.mkdir(parents=True)
        entries = {}
        for name in self.agents:
            root = self.folder / "agents" / name
            root.mkdir(parents=True)
            (root / "SOUL.md").write_text(f"I am {name}, and this is who I am.\n")
            (root / "weights.json").write_text('{"speed": 0.5}\n')
            entries[name] = {
                "root": str(root),
                "files": {"charter": ["SOUL.md"], "weights": ["weights.json"]},
                "required": ["SOUL.md"],
            }
        self.write("agents.json", {"agents": entries})
        self.write(
            "backup_schedule.json",
            {
                "timezone": "UTC",
                "repository": str(self.folder / "backups"),
                "history": str(self.folder / "history.jsonl"),
                "state": str(self.folder / "state"),
                "tiers": self.tiers,
                "limits": self.limits,
                "alerts": [],
            },
        )

    @property
    def config_dir(self) -> Path:
        return self.folder / "config"

    @property
    def config(self) -> Config:
        return load(self.config_dir)

    @property
    def repository(self) -> Repository:
        return Repository(self.folder / "backups")

    @property
    def snapshots(self) -> list[str]:
        return [head.id for head in self.repository.snapshots()]

    def root(self, agent: str = "z") -> Path:
        return self.folder / "agents" / agent

    def runtime(self, client: Redis) -> Runtime:
        return Runtime(self.config, client)

    def history(self, kind: str | None = None) -> list[dict[str, Any]]:
        return list(History(self.folder / "history.jsonl").read(kind=kind))

    def write(self, file: str, document: Any) -> None:
        (self.config_dir / file).write_text(json.dumps(document))

    def edit(self, file: str, change: Callable[[Any], None]) -> None:
        document = json.loads((self.config_dir / file).read_text())
        change(document)
        self.write(file, document)


def until(is_so: Callable[[], Any], within_s: float = 10.0, *, every_s: float = 0.05) -> Any:
    """Return what `is_so` returns as soon as that is true; fail after `within_s`."""
    deadline = time.monotonic() + within_s
    while not (answer := is_so()):
        assert time.monotonic() < deadline, f"not within {within_s:.0f} s"
        time.sleep(every_s)
    return answer
