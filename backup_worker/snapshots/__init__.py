"""The snapshot engine: take, prove, list, compare, restore and prune snapshots of an agent's files.

It knows nothing of Redis, RQ or the web, and gets plain dataclasses instead of configuration files.
"""

from __future__ import annotations

from backup_worker.snapshots.diff import Difference, KeyChange, compare_json, diff, diff_states
from backup_worker.snapshots.errors import DamagedSnapshot, NoSpace, SnapshotError
from backup_worker.snapshots.evidence import keep_evidence
from backup_worker.snapshots.heal import Healed, Sources, heal_snapshot
from backup_worker.snapshots.manifest import Entry, Head, Manifest, Problem
from backup_worker.snapshots.repository import Repository
from backup_worker.snapshots.restore import RestoreResult, execute, restoring
from backup_worker.snapshots.retention import (
    Decision,
    Policy,
    RetentionPlan,
    plan_prune,
    plan_retention,
    prune,
)
from backup_worker.snapshots.sanity import Limits
from backup_worker.snapshots.scope import AgentFiles, Hook, Scope
from backup_worker.snapshots.state import (
    Changes,
    RestorePlan,
    all_states,
    compare,
    good_heads,
    newest,
    plan_restore,
)
from backup_worker.snapshots.swap import finish_interrupted
from backup_worker.snapshots.take import take_snapshot
from backup_worker.snapshots.verify import verify_snapshot

__all__ = [
    "AgentFiles",
    "Changes",
    "DamagedSnapshot",
    "Decision",
    "Difference",
    "Entry",
    "Head",
    "Healed",
    "Hook",
    "KeyChange",
    "Limits",
    "Manifest",
    "NoSpace",
    "Policy",
    "Problem",
    "Repository",
    "RestorePlan",
    "RestoreResult",
    "RetentionPlan",
    "Scope",
    "SnapshotError",
    "Sources",
    "all_states",
    "compare",
    "compare_json",
    "diff",
    "diff_states",
    "execute",
    "finish_interrupted",
    "good_heads",
    "heal_snapshot",
    "keep_evidence",
    "newest",
    "plan_prune",
    "plan_restore",
    "plan_retention",
    "prune",
    "restoring",
    "take_snapshot",
    "verify_snapshot",
]
