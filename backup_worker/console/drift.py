"""How far an agent has moved from its newest good state: the files that a recovery now would change or lose.

Found in the background, a few agents at a time, and shown with the time of the look; a file with the size and the time
of the last backup counts as unchanged without being read. An agent whose files cannot be read from here, or are on
another host, has no drift.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backup_worker.console.background import Background
from backup_worker.queueing import hosts
from backup_worker.snapshots import plan_restore
from backup_worker.snapshots.disk import Tree, walk
from backup_worker.snapshots.errors import printable
from backup_worker.snapshots.state import is_special, same_on_disk
from em_bridge import clock
from em_bridge.errors import AgentBackupError

if TYPE_CHECKING:
    from backup_worker.runtime import Runtime
    from backup_worker.snapshots import AgentFiles, Entry, Repository

FRESH_S = 20.0
NAMED = 12
MOST = 20_000
"""At how many files the look ends."""


@dataclass(frozen=True, slots=True)
class Drift:
    """What differs from the newest good state `since`; `paths` are the first of them, with `+`, `~` or `-`."""

    at: float
    count: int
    paths: tuple[tuple[str, str], ...]
    since: str


def drift_of(repository: Repository, agent: AgentFiles, now: float) -> Drift | None:
    """Compare an agent's files with its newest good state; None if either cannot be had."""
    try:
        plan = plan_restore(repository, agent, proven=False)
        wanted = {path: entry for path, entry in plan.by_path.items() if entry.kind != "dir"}
        found: list[tuple[str, str]] = []
        with Tree(agent.root, follow=True) as tree:
            for number, (path, info) in enumerate(walk(tree)):
                if number > MOST:
                    return None
                if stat.S_ISDIR(info.st_mode) or is_special(info):
                    continue
                known = wanted.pop(path, None)
                if known is None:
                    if plan.decides(path):
                        found.append(("+", path))
                elif not (_untouched(info, known) or same_on_disk(tree, path, info, known)):
                    found.append(("~", path))
    except (AgentBackupError, OSError):
        return None
    found += [("-", path) for path in wanted]
    shown = tuple((mark, printable(path)) for mark, path in sorted(found, key=lambda one: one[1])[:NAMED])
    return Drift(now, len(found), shown, plan.sources[0])


def _untouched(info: object, entry: Entry) -> bool:
    return (getattr(info, "st_size", None), getattr(info, "st_mtime_ns", None)) == (
        entry.size,
        entry.mtime_ns,
    )


class Drifts:
    """What was found last, agent by agent."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[float, Drift | None]] = {}
        self._background: Background[None] = Background("drift")

    def of(self, runtime: Runtime, agents: list[str]) -> Mapping[str, Drift]:
        """Return what is known of `agents`, and have what is too old looked at again."""
        now = clock.monotonic()
        for name in agents:
            if hosts.elsewhere(runtime.config, name):
                continue
            if now - self._found.get(name, (-FRESH_S, None))[0] >= FRESH_S:
                self._background.start(name, lambda name=name: self._look(runtime, name))  # type: ignore[misc]
        known = {name: self._found[name][1] for name in agents if name in self._found}
        return {name: drift for name, drift in known.items() if drift is not None}

    def _look(self, runtime: Runtime, name: str) -> None:
        begun = clock.monotonic()
        found = drift_of(runtime.repository, runtime.config.files_of(name), clock.now())
        self._found[name] = (clock.monotonic(), found)
        # Never more than a quarter of a processor.
        clock.sleep(min(2.0, 3 * (clock.monotonic() - begun)))

    def close(self) -> None:
        """Look no further."""
        self._background.close()
