"""One operation of the snapshot engine in a process of its own, to be killed or starved: `act.py OPERATION BASE`.

Exit code 0: done; 3: it failed with an error of ours, as it should, or (a list) went on without what it could not
keep; anything else is a fault.
"""

from __future__ import annotations

import sys
from pathlib import Path

from backup_worker.snapshots import (
    Policy,
    execute,
    finish_interrupted,
    heal_snapshot,
    index,
    plan_prune,
    plan_restore,
    prune,
    restoring,
    swap,
)
from backup_worker.snapshots.repository import INDEX
from backup_worker.snapshots.take import taking
from backup_worker.snapshots.together import together
from em_bridge.errors import AgentBackupError
from tests.agent_on_disk import NOON, Place

POLICIES = {"daily": Policy(2)}


def act(operation: str, place: Place) -> None:
    """Do it."""
    if operation == "backup":
        place.take(slot="new", now=NOON + 100, unchanged="link", on_taken="return")
    elif operation == "prune":
        prune(place.repo, plan_prune(place.repo, POLICIES, now=NOON + 100))
    elif operation == "several":
        works = (
            (
                number,
                taking(
                    each.repo, each.agent, tier="daily", slot="new", include=["*"], unchanged="link", now=NOON + 100,
                    reason="test", on_taken="return",
                ),
            )
            for number, each in enumerate((place, Place(place.base, "zoe")))
        )  # fmt: skip
        for outcome in together(works):
            if outcome.error is not None:
                raise outcome.error
    elif operation == "heal":
        heal_snapshot(place.repo, "daily/s3/z", NOON + 100)
    elif operation == "restores":
        for outcome in together(
            (
                number,
                restoring(
                    plan_restore(each.repo, each.agent), each.root, evidence=each.base / "evidence" / each.name,
                    now=NOON + 100,
                ),
            )
            for number, each in enumerate((place, Place(place.base, "zoe")))
        ):  # fmt: skip
            if outcome.error is not None:
                raise outcome.error
    elif operation == "list":
        index.WRITE_FROM, index.SETTLED_S = 1, -1e9
        assert len(place.repo.snapshots()) == 4
        if not index.load(place.repo.hidden / INDEX):
            sys.exit(3)
    elif operation in ("restore", "restore-inside"):
        if operation == "restore-inside":
            swap.choose = swap.inside
        finish_interrupted(place.root)
        plan = plan_restore(place.repo, place.agent)
        execute(plan, place.root, evidence=place.base / "evidence" / "tree", now=NOON + 100)
    else:
        raise SystemExit(f"no such operation: {operation}")


if __name__ == "__main__":
    try:
        act(sys.argv[1], Place(Path(sys.argv[2])))
    except AgentBackupError as error:
        sys.stderr.write(f"error: {error.message}\n")
        sys.exit(3)
