"""What changed between two snapshots; JSON files key by key, with the difference of numbers."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from backup_worker.snapshots import disk
from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.errors import printable, translated
from backup_worker.snapshots.manifest import Entry
from backup_worker.snapshots.repository import Repository
from backup_worker.snapshots.state import RestorePlan

_JSON_LIMIT_BYTES = 4 << 20
_MISSING = object()
_LARGEST = sys.float_info.max / 2


@dataclass(frozen=True, slots=True)
class KeyChange:
    """One place in a JSON document, written as `a.b[2]`. `old` or `new` is absent where `kind` is added or removed."""

    key: str
    kind: str
    old: Any = None
    new: Any = None

    @property
    def delta(self) -> float | int | None:
        """New minus old, where both are numbers."""
        if self.kind == "changed" and is_number(self.old) and is_number(self.new):
            difference = self.new - self.old
            # 0.1 + 0.2 style noise is not what a person asks about.
            return round(difference, 12) if isinstance(difference, float) else difference
        return None

    def as_json(self) -> dict[str, Any]:
        """Return the fields that make sense for this kind of change."""
        out: dict[str, Any] = {"key": self.key, "kind": self.kind}
        out |= {"old": self.old} if self.kind != "added" else {}
        out |= {"new": self.new} if self.kind != "removed" else {}
        return out | ({"delta": self.delta} if self.delta is not None else {})


@dataclass(frozen=True, slots=True)
class PathChange:
    """A path that is in both snapshots, and differs: in its content, or only in mode or type."""

    path: str
    what: str
    old_size: int
    new_size: int
    keys: tuple[KeyChange, ...] = ()


@dataclass(frozen=True, slots=True)
class Difference:
    """Paths added, removed and changed from one snapshot to the other; `outside`: covered by only one of them."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[PathChange, ...] = ()
    outside: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """Return the difference as a JSON document, paths fit for printing."""
        changed = [
            {
                "path": printable(c.path),
                "what": c.what,
                "old_size": c.old_size,
                "new_size": c.new_size,
                "keys": [key.as_json() for key in c.keys],
            }
            for c in self.changed
        ]
        out: dict[str, Any] = {"added": [printable(p) for p in self.added]}
        out |= {"removed": [printable(p) for p in self.removed], "changed": changed}
        return out | {"outside": [printable(p) for p in self.outside]}


@translated("comparing")
def diff(repo: Repository, old_id: str, new_id: str) -> Difference:
    """Compare two snapshots. Raises NotFound, or SnapshotError for a broken manifest.

    A path that only one of them covers (a daily against a weekly) is neither added nor removed, but `outside`.
    """
    with repo.hold([old_id, new_id]):
        old, new = repo.get(old_id), repo.get(new_id)
        before, after = old.by_path(), new.by_path()
        added: list[str] = []
        removed: list[str] = []
        outside: list[str] = []
        changed: list[PathChange] = []
        with repo.files(old_id) as old_files, repo.files(new_id) as new_files:
            for path in sorted({*before, *after}, key=lambda p: p.replace("/", "\0")):
                one, other = before.get(path), after.get(path)
                if one and other:
                    if what := _what_changed(one, other):
                        keys = tuple(_key_changes(old_files, new_files, one, other))
                        changed.append(PathChange(path, what, one.size, other.size, keys))
                elif one:
                    (removed if new.scope.covers(path) else outside).append(path)
                else:
                    (added if old.scope.covers(path) else outside).append(path)
    return Difference(tuple(added), tuple(removed), tuple(changed), tuple(outside))


@translated("comparing")
def diff_states(old: RestorePlan, new: RestorePlan) -> Difference:
    """Compare two states, each made of one or several snapshots of the same repository; nothing is `outside`."""
    repo = old.repo
    before, after = ({piece.entry.path: piece for piece in state.pieces} for state in (old, new))
    changed: list[PathChange] = []
    sources = {*old.sources, *new.sources}
    with repo.hold(sources), contextlib.ExitStack() as stack:
        files = {source: stack.enter_context(repo.files(source)) for source in sources}
        for path in sorted({*before} & {*after}, key=disk.order):
            one, other = before[path], after[path]
            if what := _what_changed(one.entry, other.entry):
                keys = tuple(_key_changes(files[one.source], files[other.source], one.entry, other.entry))
                changed.append(PathChange(path, what, one.entry.size, other.entry.size, keys))
    added = sorted({*after} - {*before}, key=disk.order)
    removed = sorted({*before} - {*after}, key=disk.order)
    return Difference(tuple(added), tuple(removed), tuple(changed))


def _what_changed(one: Entry, other: Entry) -> str | None:
    if one.kind != other.kind:
        return f"{one.kind} became {other.kind}"
    if not one.same_content(other):
        return "target" if one.kind == "link" else "content"
    return (
        f"mode {one.mode:04o} became {other.mode:04o}"
        if one.mode != other.mode and one.kind != "link"
        else None
    )


def _key_changes(old_files: Tree, new_files: Tree, one: Entry, other: Entry) -> Iterator[KeyChange]:
    both_files = one.kind == other.kind == "file" and one.sha256 != other.sha256
    if not both_files or not one.path.endswith(".json") or max(one.size, other.size) > _JSON_LIMIT_BYTES:
        return
    # If one of them is not JSON, the sizes and the checksum say that it changed.
    yield from compare_json(old_files.read_bytes(one.path), new_files.read_bytes(other.path)) or ()


def compare_json(old: bytes, new: bytes) -> tuple[KeyChange, ...] | None:
    """Return what changed from one JSON document to another, key by key; None if one of them is not JSON."""
    try:
        return tuple(_compare("", json.loads(old), json.loads(new)))
    except (ValueError, RecursionError):
        return None


def _compare(key: str, old: Any, new: Any) -> Iterator[KeyChange]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(n for n in new if n not in old)]:
            inner = f"{key}.{name}" if key else name
            yield from _compare(inner, old.get(name, _MISSING), new.get(name, _MISSING))
    elif isinstance(old, list) and isinstance(new, list):
        for index in range(max(len(old), len(new))):
            one = old[index] if index < len(old) else _MISSING
            other = new[index] if index < len(new) else _MISSING
            yield from _compare(f"{key}[{index}]", one, other)
    elif old is _MISSING:
        yield KeyChange(key, "added", new=new)
    elif new is _MISSING:
        yield KeyChange(key, "removed", old=old)
    elif type(old) is not type(new) or old != new:
        yield KeyChange(key, "changed", old, new)


def is_number(value: Any) -> bool:
    """Tell whether it is a number of JSON that can be reckoned with, as can the difference of two."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        # An integer may have thousands of digits; 1e999 is read as infinity.
        and -_LARGEST <= value <= _LARGEST
    )
