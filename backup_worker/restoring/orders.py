"""A restore that a person orders at a distance: what it would do is seen where the agent's files are, then it is done.

What is carried out is what was seen: the order carries a mark of it, and if anything about it has changed meanwhile,
nothing is done. Carried out twice (its worker was killed, say), the second finds nothing left to do. A living agent is
never overwritten.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from backup_worker.restoring.restores import Restore, running
from backup_worker.snapshots import Changes, compare
from backup_worker.snapshots.errors import printable
from backup_worker.snapshots.together import alone
from em_bridge import clock
from em_bridge.errors import AgentBackupError

if TYPE_CHECKING:
    from backup_worker.runtime import Runtime

SHOWN = 60
KINDS = ("added", "changed", "removed", "lost")


@dataclass(frozen=True, slots=True)
class Order:
    """Which agent is to be restored from which snapshot, and which of its paths (none: all)."""

    agent: str
    from_id: str
    paths: tuple[str, ...] = ()

    def as_args(self) -> dict[str, Any]:
        """Return it as the arguments of a job."""
        return {"agent": self.agent, "from": self.from_id, "paths": list(self.paths)}

    @classmethod
    def of_args(cls, args: Mapping[str, Any]) -> Order:
        """Return the order in a job's arguments."""
        return cls(str(args["agent"]), str(args["from"]), tuple(map(str, args.get("paths", ()))))

    def restore(self, runtime: Runtime) -> Restore:
        """Return it as the engine takes it."""
        root = runtime.config.agent(self.agent).root
        return Restore(
            runtime.config, runtime.repository, self.agent, root, True, None, self.from_id, self.paths,
            lambda error: None,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Preview:
    """What an order would do, or why nothing can be said: `problem`. `alive` are the agent's processes."""

    mark: str = ""
    """Stands for exactly this: it differs as soon as anything about it does."""

    counts: Mapping[str, int] = field(default_factory=dict)
    shown: Mapping[str, list[str]] = field(default_factory=dict)
    """For each of `KINDS` that has any: how many paths, and the first of them."""

    problem: str = ""
    hint: str | None = None
    alive: tuple[str, ...] = ()

    @property
    def is_needed(self) -> bool:
        """Whether anything would change."""
        return any(self.counts.get(kind) for kind in ("added", "changed", "removed"))

    def as_result(self) -> dict[str, Any]:
        """Return it as the result of a job."""
        return {**asdict(self), "alive": list(self.alive)}

    @classmethod
    def of_result(cls, result: Mapping[str, Any]) -> Preview:
        """Return the preview in a job's result."""
        return cls(**{**result, "alive": tuple(result["alive"])})


def preview(runtime: Runtime, order: Order) -> Preview:
    """Return what `order` would do now. Must run where the agent's files are; changes nothing."""
    restore = order.restore(runtime)
    try:
        changes = compare(restore.plan(), restore.target)
        alive = tuple(str(one) for one in running(runtime.config, order.agent))
    except AgentBackupError as error:
        return Preview(problem=error.message, hint=error.hint)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        return Preview(problem=f"“{restore.target}” cannot be read: {reason}")
    found = {kind: paths for kind in KINDS if (paths := getattr(changes, kind))}
    return Preview(
        _mark(order, changes),
        {kind: len(paths) for kind, paths in found.items()},
        {kind: [printable(path) for path in paths[:SHOWN]] for kind, paths in found.items()},
        alive=alive,
    )


def _mark(order: Order, changes: Changes) -> str:
    facts = [order.from_id, order.paths, asdict(changes)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def carry_out(
    runtime: Runtime, order: Order, mark: str, *, by: str, reason: str, until: float = math.inf
) -> dict[str, Any]:
    """Restore, if `order` would still do what `mark` stands for; return the result, which is on the record.

    `ok` is False with an `error`, also for what has changed since it was seen, and for an order that comes only after
    `until` (Unix seconds), when nobody counts on it any more; nothing is done then. Without `files` nothing was needed.
    """
    if clock.now() > until:
        return {"ok": False, "error": "nobody at its host took this up in time; nothing was done"}
    seen = preview(runtime, order)
    if seen.problem:
        result: dict[str, Any] = {"ok": False, "error": seen.problem}
    elif not seen.is_needed:
        result = {"ok": True, "files": 0, "evidence": None}
    elif seen.mark != mark:
        return {"ok": False, "error": "its files have changed since this was shown; nothing was done"}
    else:
        try:
            result = alone(order.restore(runtime).work()).as_json()
        except AgentBackupError as error:
            result = {"ok": False, "error": error.message}
    facts = {"agent": order.agent, "from": [order.from_id], **result}
    runtime.record("restore", **facts, by=by, via="console", reason=reason)
    return facts
