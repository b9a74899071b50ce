"""When was a restore of each agent last proven? Kept in the repository's own bookkeeping, so found without Redis.

A note that cannot be read counts as none: the next drill writes it anew.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from backup_worker.snapshots import Repository
from backup_worker.snapshots.disk import Tree, replace_file

NOTES = "drills"
"""Folder in the repository's bookkeeping: a note for each agent."""


@dataclass(frozen=True, slots=True)
class Note:
    """What is known of an agent's drills: the last one, and the last that succeeded (Unix seconds)."""

    tried_at: float
    ok: bool
    proven_at: float | None = None
    proven_from: str | None = None


def path_of(repo: Repository, agent: str) -> Path:
    """Return where the note of `agent` is, there or not."""
    return repo.hidden / NOTES / f"{agent}.json"


def note_of(repo: Repository, agent: str) -> Note | None:
    """Return what is known of the agent's drills; None if there was none, or its note is not readable."""
    try:
        return Note(**json.loads(path_of(repo, agent).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def write_note(repo: Repository, agent: str, note: Note) -> None:
    """Write down what is known of the agent's drills. Raises OSError."""
    if not repo.hidden.is_dir():
        return  # there is no repository yet, and nothing was proven
    (repo.hidden / NOTES).mkdir(exist_ok=True, mode=0o700)
    with Tree(repo.hidden / NOTES) as tree:
        replace_file(tree, f"{agent}.json", json.dumps(asdict(note)).encode())
