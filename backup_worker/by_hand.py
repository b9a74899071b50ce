"""Tell people what came of backups that a command made without Redis: who typed it may be a timer, and read nothing.

Each agent's alert has the key that it has for a scheduled backup. All that is wrong in one round is one message; what
was told is not told again with every run, and is told to be over once (see `alerts.direct`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from backup_worker.alerts import Alert
from backup_worker.runtime import Runtime

Row = Mapping[str, Any]


def tell(runtime: Runtime, tier: str, made: Sequence[Row], failed: Sequence[Row]) -> None:
    """Tell, in one message, what went wrong in a round of backups of `tier`, and in another what is well again.

    Each of `made` has `id`, `agent`, `status`, `problems` and `warnings`, each of `failed` has `agent` and `error`.
    """
    wrong = [_failed(tier, one) for one in failed]
    wrong += [alert for one in made for alert in _unsound(tier, one)]
    if wrong:
        runtime.alert_all(wrong)
    keys = {one.key for one in wrong}
    runtime.resolve(*(key for one in made for key in _keys(tier, one["agent"]) if key not in keys))


def _failed(tier: str, one: Row) -> Alert:
    agent = one["agent"]
    return Alert(
        f"failed/{tier}/{agent}", "critical", f"{tier} backup of {agent} failed", one["error"], agent
    )


def _unsound(tier: str, one: Row) -> Iterator[Alert]:
    agent, place = one["agent"], f"{tier}/{one['agent']}"
    if one["status"] != "good":
        why = "; ".join(f"{problem['path']}: {problem['problem']}" for problem in one["problems"][:10])
        title = f"{tier} backup of {agent} is {one['status']}"
        yield Alert(f"suspect/{place}", "critical", title, f"{one['id']}: {why}", agent)
    if one["warnings"]:
        body = f"{one['id']}: {'; '.join(one['warnings'][:10])}"
        yield Alert(f"damage/{place}", "warning", f"{tier} backup of {agent} came upon damage", body, agent)


def _keys(tier: str, agent: str) -> tuple[str, ...]:
    return f"failed/{tier}/{agent}", f"suspect/{tier}/{agent}", f"damage/{tier}/{agent}"
