"""A small fleet whose guarded files are changed, approved and looked at; for the tests of approvals."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import fakeredis

from backup_worker import alerts
from backup_worker.approval import change_events, guard
from backup_worker.approval.approved import ApprovedStates
from backup_worker.snapshots import Manifest
from em_bridge import events
from tests.small_fleet import ON_CHANGE, SmallFleet

WEIGHTS = "weights.json"
NEW = b'{"speed": 0.6}\n'
OTHER = b'{"speed": 9.9}\n'

BOTH = {**ON_CHANGE, "events": ["config.approved", "config.applied"]}


class House:
    """A small fleet with its bus; events are handled in the order in which they are published."""

    def __init__(self, folder: Path, tiers: dict[str, Any] | None = None) -> None:
        self.fleet = SmallFleet(folder, tiers=tiers or {"on-change": BOTH})
        self.client: Any = fakeredis.FakeRedis()
        # Ahead of the clock, so that what the code itself appends comes behind it.
        self.now = time.time() + 3600
        self.runtime = self.fleet.runtime(self.client)

    def publish(self, event: Any) -> str:
        self.now += 1
        entry = f"{int(self.now * 1000)}-0"
        self.client.xadd(event.stream, events.encode(event), id=entry)
        return entry

    def handle(self, event: Any) -> list[Manifest]:
        return change_events.handle(self.runtime, event, self.publish(event), now=self.now)

    def write(self, content: bytes, path: str = WEIGHTS) -> None:
        file = self.fleet.root() / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)

    def propose(self, content: bytes | None = NEW, *, change: str = "c1", path: str = WEIGHTS) -> None:
        proposed = None if content is None else {path: content}
        self.handle(events.ConfigProposed(change, "z", (path,), "em", "impact", proposed=proposed))

    def approve(self, change: str = "c1", by: str = "kari") -> list[Manifest]:
        return self.handle(events.ConfigApproved(change, by))

    def apply(self, change: str = "c1", paths: tuple[str, ...] = (WEIGHTS,), **more: Any) -> Manifest:
        (made,) = self.handle(events.ConfigApplied(change, "z", paths, "em", **more))
        return made

    def scan(self, after_s: float = 0.0) -> dict[str, Any]:
        self.now += after_s
        return guard.scan(self.runtime, "z", self.now)

    def critical(self) -> list[str]:
        found = alerts.open_alerts(self.client)
        return sorted(one.key for one in found if one.severity == "critical" and one.resolved_at is None)

    def approved(self, path: str = WEIGHTS) -> bytes | None:
        state = ApprovedStates(self.runtime.repository).load("z")
        assert state is not None
        digest = state.files[path].sha256
        return ApprovedStates(self.runtime.repository).content("z", digest) if digest else None
