"""The head: number and hash of a line that the record certainly has held, kept in the repository.

The chain alone cannot prove that nothing was cut off its end. So at each backup the writer leaves the newest line's
number and hash in the repository, where they are copied away together with the snapshots. A record that lacks that
line, or has another one in its place, was cut or written anew.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from backup_worker.history.line import Link
from backup_worker.snapshots import disk

NAME = "history-head.json"
HEADED = frozenset({"backup"})
"""The kinds of lines behind which the head is noted."""


@dataclass(frozen=True, slots=True)
class Head:
    """A noted line: `at` is its own time, in Unix seconds."""

    seq: int
    hash: str
    at: float

    @property
    def link(self) -> Link:
        """The line as a link of the chain."""
        return Link(self.seq, self.hash)


def head_file(repository: Path) -> Path:
    """Return where the head is kept."""
    return repository / ".agent-backup" / NAME


def note(file: Path, head: Head) -> None:
    """Keep `head`, in one step, on disk when this returns, unless a later one is there. Raises OSError.

    Without a repository there is nothing to keep it in, and nothing is made.
    """
    if not file.parent.is_dir():
        return
    known = noted(file)
    if known is not None and known.seq >= head.seq:
        return
    with disk.Tree(file.parent) as tree:
        disk.replace_file(tree, file.name, json.dumps(asdict(head)).encode() + b"\n")


def noted(file: Path) -> Head | None:
    """Return the head that is kept, None if there is none that can be read."""
    try:
        document = json.loads(file.read_bytes())
        return Head(int(document["seq"]), str(document["hash"]), float(document["at"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
