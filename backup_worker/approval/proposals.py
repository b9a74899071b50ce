"""A proposed change beside what was approved before it: numbers key by key, text line by line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backup_worker.approval.approved import ApprovedStates
from backup_worker.snapshots import KeyChange, compare_json
from em_bridge.errors import AgentBackupError

if TYPE_CHECKING:
    from backup_worker.approval.changes import Change
    from backup_worker.snapshots import Head, Repository

MAX_BYTES = 512 * 1024
MAX_LINES = 400
APPROVED_STATE = "the approved state"
"""What a proposal is compared with, where it is not a snapshot."""


@dataclass(frozen=True, slots=True)
class FileChange:
    """One file of a proposal. `kind` says which of the others is filled in.

    `json`: `keys`; `text`: `lines`, each with its mark (`+`, `-`, space, `@`); `same`: nothing would change; `new`:
    no snapshot has it, `lines` is all of it; `none`: the proposal names the file without its content; `opaque`: not
    text, or too large to show.
    """

    path: str
    kind: str
    base: str | None = None
    keys: tuple[KeyChange, ...] = ()
    lines: tuple[tuple[str, str], ...] = ()
    size: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return it as a map for `--json`: `diff` holds the lines with their marks."""
        keys = [key.as_json() for key in self.keys]
        diff = [mark + line for mark, line in self.lines]
        facts = {"path": self.path, "kind": self.kind, "beside": self.base, "size": self.size}
        return facts | {"keys": keys, "diff": diff}


def compare(change: Change, repository: Repository, heads: Sequence[Head]) -> list[FileChange]:
    """Compare what `change` proposes with what was there before it, file by file.

    That is the approved state, and of an applied change, or where no such state is known, the newest good snapshot from
    before that was not made by a change without an approval.
    """
    proposed = change.proposed or {}
    until = change.applied_at if change.applied_at is not None else float("inf")
    newest_first = [
        head
        for head in reversed(heads)
        if head.agent == change.agent
        and head.is_good
        and head.approved is not False
        and head.created_at < until
    ]
    approved = _approved(repository, change) if change.applied_at is None else {}
    paths = dict.fromkeys([*change.paths, *proposed])
    return [
        _file(path, proposed.get(path), *(approved.get(path) or _stored(repository, newest_first, path)))
        for path in paths
    ]


def _approved(repository: Repository, change: Change) -> dict[str, tuple[str, bytes]]:
    """Return the approved content of the changed paths, as far as it is known."""
    states = ApprovedStates(repository)
    try:
        state = states.load(change.agent) if change.agent else None
    except AgentBackupError:
        # Damaged: the snapshots answer, and the watch tells of it.
        return {}
    found = {}
    for path in change.paths if state is not None else ():
        held = state.files.get(path) if state is not None else None
        content = states.content(change.agent, held.sha256) if held is not None and held.sha256 else None
        if content is not None and len(content) <= MAX_BYTES:
            found[path] = (APPROVED_STATE, content)
    return found


def _stored(repository: Repository, heads: Iterable[Head], path: str) -> tuple[str | None, bytes | None]:
    """Return the snapshot that holds the newest `path`, and its content; None for content that is too large."""
    for head in heads:
        if not head.scope.covers(path):
            continue
        try:
            entry = repository.get(head.id).by_path().get(path)
            if entry is None or entry.kind != "file":
                return None, None
            if entry.size > MAX_BYTES:
                return head.id, None
            with repository.files(head.id) as files:
                return head.id, files.read_bytes(path)
        except (AgentBackupError, OSError):
            # Deleted or damaged meanwhile: the next older one answers.
            continue
    return None, None


def _file(path: str, new: bytes | None, base: str | None, old: bytes | None) -> FileChange:
    if new is None:
        return FileChange(path, "none", base)
    size = len(new)
    if base is not None and old == new:
        return FileChange(path, "same", base, size=size)
    text, before = _text(new), _text(old) if old is not None else ""
    if text is None or before is None or (base is not None and old is None):
        return FileChange(path, "opaque", base, size=size)
    if base is None:
        lines = tuple(("+", line) for line in text.splitlines()[:MAX_LINES])
        return FileChange(path, "new", lines=lines, size=size)
    keys = compare_json(old or b"", new) if path.endswith(".json") else None
    if keys:
        return FileChange(path, "json", base, keys=keys, size=size)
    return FileChange(path, "text", base, lines=_lines(before, text), size=size)


def _text(content: bytes) -> str | None:
    if len(content) > MAX_BYTES or b"\0" in content:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _lines(old: str, new: str) -> tuple[tuple[str, str], ...]:
    found = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=3)
    marked = [(line[:1], line[1:]) for line in list(found)[2:]]
    if len(marked) > MAX_LINES:
        marked = [*marked[:MAX_LINES], ("@", f"… {len(marked) - MAX_LINES} more lines")]
    return tuple(marked)
