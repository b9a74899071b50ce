"""What the manifests' heads say, remembered in one file: a list of ten thousands reads that, and not each manifest.

Only a memory: which snapshots there are is asked of the disk, and a remembered head counts only while the manifest is
the very file that it was read from (inode, times, size). A file that is missing, cut off, changed in any byte, or from
another version counts as empty, and is written anew, aside and renamed; where it cannot be, lists are only slower.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from backup_worker.snapshots.errors import SnapshotError, printable
from backup_worker.snapshots.manifest import MANIFEST, Head, Problem, read_head
from backup_worker.snapshots.scope import Scope

NOTES = ("verified_at", "pinned", "damaged")
"""Fields of a head that are not in its manifest."""
SETTLED_S = 2.0
"""A manifest younger than this is not remembered: the times of a file that is written twice in one tick of the file
system's clock (two seconds at worst) would not tell that it changed."""
WRITE_FROM = 32
WRITE_SHARE = 20
"""The file is written anew when so many heads had to be read, and no less than one in so many."""

_FIELDS = tuple(item.name for item in fields(Head) if item.name not in NOTES)

Identity = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Remembered:
    """A head as it was read, field by field, from the file that `identity` names."""

    identity: Identity
    values: Mapping[str, Any]

    def head(self, **notes: Any) -> Head:
        """Return it with the repository's own notes."""
        # Past the constructor, which takes ten times as long: the values come from a head that went through it.
        made = object.__new__(Head)
        made.__dict__.update(self.values, **notes)
        return made


def identity(info: os.stat_result) -> Identity:
    """Return what tells a manifest apart from any other one, and from itself after a change."""
    return info.st_ino, info.st_ctime_ns, info.st_mtime_ns, info.st_size


def recall(root: Path, identifier: str, known: Remembered | None) -> tuple[os.stat_result, Remembered]:
    """Return the state of a snapshot's manifest, and its head: `known`, if it was read from that very file.

    Raises OSError, or SnapshotError where it is no manifest of that snapshot.
    """
    path = f"{root}/{identifier}/{MANIFEST}"
    info = os.stat(path)
    if known is not None and known.identity == identity(info):
        return info, known
    with open(path, "rb") as file:
        # Before it is read: what is written meanwhile shows in the times of the next look.
        info = os.fstat(file.fileno())
        head = read_head(file)
    if head.id != identifier:
        raise SnapshotError(f"snapshot “{identifier}” says of itself that it is “{printable(head.id)}”")
    return info, Remembered(identity(info), {name: getattr(head, name) for name in _FIELDS})


def is_settled(info: os.stat_result, now: float) -> bool:
    """Tell whether a later change of the file would show in its times."""
    return now - max(info.st_ctime, info.st_mtime) >= SETTLED_S


def is_worth_writing(known: int, current: int, read: int) -> bool:
    """Tell whether to write the file anew: it has `known` heads, `current` are there, and `read` of them it had not."""
    changed = read + max(0, known - current)
    return changed >= max(WRITE_FROM, current // WRITE_SHARE)


def load(path: Path) -> dict[str, Remembered]:
    """Return what is remembered, by id; nothing if the file is not exactly what was written once."""
    try:
        content = path.read_bytes()
    except OSError:
        return {}
    digest, _, body = content.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode("ascii") != digest:
        return {}
    try:
        return _decode(json.loads(body))
    except (ValueError, KeyError, TypeError):
        return {}  # whole, and not of this version


def _decode(document: dict[str, Any]) -> dict[str, Remembered]:
    if tuple(document["fields"]) != _FIELDS:
        return {}
    scopes = [Scope(tuple(include), tuple(exclude)) for include, exclude in document["scopes"]]
    found: dict[str, Remembered] = {}
    for number, inode, ctime_ns, mtime_ns, size, row in document["heads"]:
        values = dict(zip(_FIELDS, row, strict=True))
        values["scope"] = scopes[number]
        values["warnings"] = tuple(values["warnings"])
        values["problems"] = tuple(Problem(*problem) for problem in values["problems"])
        found[values["id"]] = Remembered((inode, ctime_ns, mtime_ns, size), values)
    return found


def save(path: Path, heads: Iterable[Remembered], staging: AbstractContextManager[Path]) -> None:
    """Write what is to be remembered; `staging` yields a folder on the same file system. Does nothing if it cannot."""
    scopes: dict[Scope, int] = {}
    rows = []
    for one in heads:
        values = dict(one.values)
        number = scopes.setdefault(values["scope"], len(scopes))
        values["scope"] = None
        values["problems"] = [(problem.path, problem.problem) for problem in values["problems"]]
        rows.append([number, *one.identity, [values[name] for name in _FIELDS]])
    document = {
        "fields": _FIELDS,
        "scopes": [(scope.include, scope.exclude) for scope in scopes],
        "heads": rows,
    }
    body = json.dumps(document, separators=(",", ":")).encode("ascii")
    # Not synced: what a power cut leaves of it does not fit its own checksum.
    with contextlib.suppress(OSError), staging as folder:
        fresh = folder / path.name
        fresh.write_bytes(hashlib.sha256(body).hexdigest().encode("ascii") + b"\n" + body)
        os.chmod(fresh, 0o600)
        os.rename(fresh, path)
