"""The snapshot engine: take, prove, list, compare, restore and prune snapshots of an agent's files.

It knows nothing of Redis, RQ or the web, and gets plain dataclasses instead of configuration files.
"""

from __future__ import annotations

from backup_worker.snapshots.errors import NoSpace, SnapshotError
from backup_worker.snapshots.manifest import Entry, Head, Manifest, Problem
from backup_worker.snapshots.repository import Repository
from backup_worker.snapshots.sanity import Limits
from backup_worker.snapshots.scope import AgentFiles, Scope
from backup_worker.snapshots.take import take_snapshot
from backup_worker.snapshots.verify import verify_snapshot

__all__ = [
    "AgentFiles",
    "Entry",
    "Head",
    "Limits",
    "Manifest",
    "NoSpace",
    "Problem",
    "Repository",
    "Scope",
    "SnapshotError",
    "take_snapshot",
    "verify_snapshot",
]
