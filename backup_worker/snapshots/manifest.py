"""What a snapshot says about itself: `manifest.json` and `SHA256SUMS`.

The manifest's keys come first and its entries last, one a line, so that a list of snapshots reads only the beginning of
each. `SHA256SUMS` lists the manifest and every regular file, in the form of coreutils: a change of a single byte
anywhere in a snapshot is found by `sha256sum -c`. Names that are not UTF-8 are kept as lone surrogates (`\\udcff`).
Reading raises `SnapshotError` for anything that is not exactly such a document.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import IO, Any, Literal, NamedTuple

from backup_worker.snapshots.errors import SnapshotError, printable
from backup_worker.snapshots.scope import Scope
from em_bridge.errors import NotFound
from em_bridge.fields import AGENT_ID

Status = Literal["good", "suspect", "partial"]
Kind = Literal["file", "dir", "link"]

FORMAT = 1
MANIFEST = "manifest.json"
CHECKSUMS = "SHA256SUMS"
FILES = "files"
_TIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_SLOT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+:-]{0,127}")
_OUTSIDE = re.compile(r"(?:\A|/)\.{0,2}(?:/|\Z)|\0")
"""Finds what no path of a snapshot may have: empty names, `.`, `..`, and the end of a C string."""
_ENTRIES = b'\n"entries": [\n'


class Entry(NamedTuple):
    """One path of a snapshot: relative, `/` between names; the root itself is `.`.

    `size` in bytes, `mode` the permission bits, `mtime_ns` nanoseconds; `sha256` for files, `target` for links;
    `linked`: shares its bytes with the previous snapshot; `sqlite`: taken through the database's backup interface;
    `hardlink`: the earlier path that is the same file; `xattrs`: the `user.*` attributes, values in base64.
    `inode` and `ctime_ns` are those of the original, if it had not been written for so long that an equal file in the
    next backup is known to be unchanged; else 0. A tuple, because a large agent has a hundred thousand of them.
    """

    path: str
    kind: Kind
    size: int
    mode: int
    mtime_ns: int
    uid: int = 0
    gid: int = 0
    sha256: str | None = None
    target: str | None = None
    linked: bool = False
    sqlite: bool = False
    hardlink: str | None = None
    xattrs: tuple[tuple[str, str], ...] = ()
    inode: int = 0
    ctime_ns: int = 0

    def same_content(self, other: Entry | None) -> bool:
        """Tell whether both hold the same: type, bytes, link target; not mode and times."""
        return (
            other is not None
            and (self.kind, self.sha256, self.target) == (other.kind, other.sha256, other.target)
            and (self.kind != "file" or self.size == other.size)
        )


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong, and where (relative path, or `.` for the whole)."""

    path: str
    problem: str

    def as_json(self) -> dict[str, str]:
        """Return the two fields, the path fit for printing."""
        return {"path": printable(self.path), "problem": self.problem}


@dataclass(frozen=True, kw_only=True)
class Head:
    """A snapshot without its entries. `created_at` in Unix seconds; `bytes` and `files` count regular files.

    `problems` say why it is suspect or partial; `warnings` what else a human should know; `skipped` counts sockets,
    pipes and devices; `judge` names the rules that its contents were judged by. `verified_at`, `pinned` and `damaged`
    are the repository's own notes, not part of the manifest.
    """

    id: str
    agent: str
    tier: str
    slot: str
    created_at: float
    reason: str
    status: Status
    files: int
    bytes: int
    scope: Scope
    approved: bool | None = None
    approved_by: str | None = None
    event: str | None = None
    judge: str = ""
    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)
    verified_at: float | None = None
    pinned: bool = False
    damaged: bool = False

    @property
    def is_good(self) -> bool:
        """Whether it may be restored without being named: whole, sane, and no damage found since."""
        return self.status == "good" and not self.damaged

    @property
    def sort_key(self) -> tuple[float, tuple[tuple[int, str], ...], str]:
        """Order of creation; within one instant, slot `S-2` comes after `S`."""
        return self.created_at, _slot_order(self.slot), self.agent

    def as_row(self) -> dict[str, Any]:
        """Return the keys that `backup-worker list --json` promises."""
        keys = (
            "id",
            "agent",
            "tier",
            "slot",
            "created_at",
            "status",
            "approved",
            "files",
            "bytes",
            "verified_at",
        )
        return {key: getattr(self, key) for key in keys} | {"pinned": self.pinned}


@dataclass(frozen=True, kw_only=True)
class Manifest(Head):
    """A snapshot with its entries, ordered so that a folder comes right before what it holds."""

    entries: tuple[Entry, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return everything as a JSON document, paths fit for printing."""
        document: dict[str, Any] = json.loads(encode(self))
        for item in (*document["entries"], *document["problems"]):
            for key in item.keys() & {"path", "target"}:
                item[key] = printable(item[key])
        entries = document.pop("entries")
        notes = {"verified_at": self.verified_at, "pinned": self.pinned, "damaged": self.damaged}
        return document | notes | {"entries": entries}

    def by_path(self) -> dict[str, Entry]:
        """Return the entries by path."""
        return {entry.path: entry for entry in self.entries}


def snapshot_id(tier: str, slot: str, agent: str) -> str:
    """Return the id, which is the path in the repository. Raises NotFound for names that no snapshot can have."""
    if not (_TIER.fullmatch(tier) and _SLOT.fullmatch(slot) and AGENT_ID.fullmatch(agent)):
        raise NotFound(
            f"there is no snapshot “{printable(f'{tier}/{slot}/{agent}')}”",
            hint="an id is <tier>/<slot>/<agent>",
        )
    return f"{tier}/{slot}/{agent}"


@lru_cache(maxsize=4096)
def _slot_order(slot: str) -> tuple[tuple[int, str], ...]:
    parts = re.findall(r"\d+|\D+", slot)
    return tuple((int(part), "") if part.isdecimal() else (0, part) for part in parts)


def split_id(identifier: str) -> tuple[str, str, str]:
    """Return tier, slot and agent of an id. Raises NotFound for anything that is not one, `..` among it."""
    parts = identifier.split("/")
    if len(parts) != 3:
        raise NotFound(
            f"there is no snapshot “{printable(identifier)}”",
            hint="an id is <tier>/<slot>/<agent>: see `backup-worker list`",
        )
    snapshot_id(*parts)
    return parts[0], parts[1], parts[2]


def encode(manifest: Manifest) -> bytes:
    """Return the content of `manifest.json`."""
    head: dict[str, Any] = {"format": FORMAT}
    for item in fields(Head):
        if item.name not in ("verified_at", "pinned", "damaged"):
            head[item.name] = getattr(manifest, item.name)
    head["scope"] = {"include": list(manifest.scope.include), "exclude": list(manifest.scope.exclude)}
    head["problems"] = [{"path": p.path, "problem": p.problem} for p in manifest.problems]
    head["warnings"], head["skipped"] = list(manifest.warnings), dict(manifest.skipped)
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())
    entries = ",\n".join(map(_entry_line, manifest.entries))
    return b"{\n" + text.encode("ascii") + b"," + _ENTRIES + entries.encode("ascii") + b"\n]\n}\n"


def read_head(file: IO[bytes], **notes: Any) -> Head:
    """Read the beginning of a manifest; `notes` are the repository's own fields."""
    start = b""
    while _ENTRIES not in start:
        block = file.read(65536)
        if not block:
            raise SnapshotError("“manifest.json” is cut off")
        start += block
    return Head(**_head_from_json(_parse(start.split(_ENTRIES)[0].rstrip(b",") + b"}")), **notes)


def decode(content: bytes, **notes: Any) -> Manifest:
    """Read a whole manifest; `notes` are the repository's own fields."""
    document = _parse(content)
    entries = document.pop("entries", None)
    if not isinstance(entries, list) or not all(type(entry) is Entry for entry in entries):
        raise SnapshotError("“manifest.json” has a broken list of entries")
    return Manifest(**_head_from_json(document), entries=tuple(entries), **notes)


def _parse(content: bytes) -> dict[str, Any]:
    try:
        # Made while it is read: a hundred thousand entries are never all there as dictionaries.
        document = json.loads(content, object_hook=_entry_or_other)
    except (ValueError, RecursionError) as error:
        raise SnapshotError("“manifest.json” is not readable as JSON") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise SnapshotError("“manifest.json” has a broken list of entries") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise SnapshotError("“manifest.json” has a format that this version does not know")
    return document


def _head_from_json(document: dict[str, Any]) -> dict[str, Any]:
    try:
        head = {item.name: document[item.name] for item in fields(Head) if item.name in document}
        scope = document["scope"]
        head["scope"] = Scope(tuple(scope["include"]), tuple(scope["exclude"]))
        head["problems"] = tuple(Problem(p["path"], p["problem"]) for p in document["problems"])
        head["warnings"] = tuple(document["warnings"])
        head["created_at"] = float(document["created_at"])
        if head["status"] not in ("good", "suspect", "partial"):
            raise ValueError(head["status"])
        snapshot_id(document["tier"], document["slot"], document["agent"])
    except (KeyError, TypeError, ValueError, NotFound) as error:
        raise SnapshotError("“manifest.json” lacks a key, or has one that makes no sense") from error
    return head


_quoted = json.encoder.encode_basestring_ascii


def _entry_line(entry: Entry) -> str:
    """Return an entry as JSON, in plain ASCII. By hand: a fleet has ten thousands of them."""
    line = (
        f'{{"path": {_quoted(entry.path)}, "type": "{entry.kind}", "size": {entry.size}, "mode": {entry.mode}'
    )
    line += f', "mtime_ns": {entry.mtime_ns}'
    if entry.uid or entry.gid:
        line += f', "uid": {entry.uid}, "gid": {entry.gid}'
    if entry.sha256 is not None:
        line += f', "sha256": {_quoted(entry.sha256)}'
    if entry.target is not None:
        line += f', "target": {_quoted(entry.target)}'
    if entry.linked:
        line += ', "linked": true'
    if entry.sqlite:
        line += ', "sqlite": true'
    if entry.hardlink is not None:
        line += f', "hardlink": {_quoted(entry.hardlink)}'
    if entry.xattrs:
        line += f', "xattrs": {json.dumps(dict(entry.xattrs))}'
    if entry.ctime_ns:
        line += f', "inode": {entry.inode}, "ctime_ns": {entry.ctime_ns}'
    return line + "}"


def _entry_or_other(item: dict[str, Any]) -> Entry | dict[str, Any]:
    return _entry_from_json(item) if "path" in item and "type" in item else item


def _entry_from_json(item: dict[str, Any]) -> Entry:
    path, kind = item["path"], item["type"]
    if (
        kind not in ("file", "dir", "link")
        or (_OUTSIDE.search(path) and path != ".")
        or _OUTSIDE.search(item.get("hardlink") or "x")
    ):
        # A manifest that was tampered with must not make a restore write outside its target.
        raise TypeError(path)
    get = item.get
    xattrs = (
        tuple((str(name), str(value)) for name, value in item["xattrs"].items()) if "xattrs" in item else ()
    )
    return Entry(
        path, kind, int(item["size"]), int(item["mode"]), int(item["mtime_ns"]), get("uid", 0), get("gid", 0),
        get("sha256"), get("target"), get("linked", False), get("sqlite", False), get("hardlink"), xattrs,
        get("inode", 0), get("ctime_ns", 0),
    )  # fmt: skip


def escape_name(name: bytes) -> tuple[bytes, bytes]:
    r"""Return the line's mark and the name as `sha256sum` (coreutils 9) writes them: `\` first, if escaped."""
    escaped = name.replace(b"\\", rb"\\").replace(b"\n", rb"\n").replace(b"\r", rb"\r")
    return (b"\\" if escaped != name else b""), escaped


def checksum_line(digest: str, name: str) -> bytes:
    """Return one line of `SHA256SUMS`."""
    mark, escaped = escape_name(os.fsencode(name))
    return mark + digest.encode("ascii") + b"  " + escaped + b"\n"


def checksums(manifest_content: bytes, entries: Iterable[Entry]) -> bytes:
    """Return the content of `SHA256SUMS`: the manifest first (so it is never empty), then every regular file."""
    lines = [checksum_line(hashlib.sha256(manifest_content).hexdigest(), MANIFEST)]
    lines += [checksum_line(e.sha256, f"{FILES}/{e.path}") for e in entries if e.kind == "file" and e.sha256]
    return b"".join(lines)
