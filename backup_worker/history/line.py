"""One line of the record: how it is written, hashed, read back, and what can be wrong with it.

A line is one JSON object: `seq`, `at` and `kind` first, for people; `prev` and `hash` last; the facts of its kind in
between, sorted. `hash` is the SHA-256 of the line without it, in the canonical form of RFC 8785; `prev` is the hash of
the line before. There is one way to write a line: another spelling of the same facts is a fault.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backup_worker.history.canonical import canonical
from em_bridge.errors import UsageError

ORIGIN = "0" * 64
"""What stands for the hash of the line before the first one."""

HEALED = "history-healed"
"""Kind of the line that says what the next writer found after a crash, and what became of it."""

_FIRST, _LAST = ("seq", "at", "kind"), ("prev", "hash")
_RESERVED = frozenset((*_FIRST, *_LAST))
_KIND = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Link:
    """Where the chain goes on: behind line `seq`, whose hash is `hash`."""

    seq: int = 0
    hash: str = ORIGIN


def checked(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return `fields` in JSON's own types. Raises `UsageError` for a bad kind, or a field with a reserved name."""
    if not _KIND.fullmatch(kind):
        raise UsageError(f"“{kind}” is not a kind of history line", hint="lower-case words joined by hyphens")
    if reserved := _RESERVED & fields.keys():
        raise UsageError(f"“{min(reserved)}” is written by the history itself")
    return {key: plain(value) for key, value in fields.items()}


def digest(line: Mapping[str, Any]) -> str:
    """Return the hash that belongs into `line`: SHA-256 over the canonical form of everything else in it."""
    return _digest(_parts(line))


def _parts(line: Mapping[str, Any]) -> dict[str, str]:
    """Return each member of `line` in canonical form, by its key: both the hash and the line are made of these."""
    return {key: f"{canonical(key)}:{canonical(value)}" for key, value in line.items()}


def _digest(parts: Mapping[str, str]) -> str:
    keys = sorted((key for key in parts if key != "hash"), key=lambda key: key.encode("utf-16-be"))
    return hashlib.sha256(("{" + ",".join(parts[key] for key in keys) + "}").encode()).hexdigest()


def next_line(behind: Link, now: float, kind: str, content: Mapping[str, Any]) -> Line:
    """Return the line that follows `behind`."""
    line: Line = {"seq": behind.seq + 1, "at": now, "kind": kind, **content, "prev": behind.hash}
    return {**line, "hash": digest(line)}


def render(line: Mapping[str, Any]) -> bytes:
    """Write a line: number, time and kind first for people who read it, the hashes last, the rest in order."""
    return _render(_parts(line))


def _render(parts: Mapping[str, str]) -> bytes:
    middle = sorted(key for key in parts if key not in _RESERVED)
    keys = [key for key in (*_FIRST, *middle, *_LAST) if key in parts]
    return ("{" + ",".join(parts[key] for key in keys) + "}\n").encode()


def parse(raw: bytes) -> Line | None:
    """Return what a line holds, None if it is no JSON object."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def fault(raw: bytes, behind: Link) -> str | None:
    """Say what is wrong with the line `raw`, which should follow `behind`; None if it does."""
    if not raw.endswith(b"\n"):
        return "the line is not finished: a writer crashed (the next one heals and records it), or it was cut"
    line = parse(raw)
    if line is None:
        return "the line is not a JSON object"
    if type(line.get("seq")) is not int or line["seq"] != behind.seq + 1:
        found = json.dumps(line.get("seq"))[:40]
        return f"the line's number is {found}, not {behind.seq + 1}: a line is missing, extra or moved"
    if line.get("prev") != behind.hash:
        return "the line does not follow the one before it: one of the two was changed, removed or moved"
    try:
        parts = _parts(line)
        if line.get("hash") != _digest(parts) or _render(parts) != raw:
            return "the line was changed after it was written"
    except (ValueError, OverflowError, RecursionError):
        return "the line holds what the history never writes"
    return None


def link_of(raw: bytes) -> Link:
    """Return the link that a sound line is."""
    line = json.loads(raw)
    return Link(line["seq"], line["hash"])


def link_behind(last: bytes) -> tuple[Link, str | None]:
    """Return where to go on behind the line `last` (empty: there is none), and what is wrong with it.

    After damage the chain goes on, and `verify` still names the damage.
    """
    if not last:
        return Link(), None
    line = parse(last) or {}
    seq, previous, hash_ = line.get("seq"), line.get("prev"), line.get("hash")
    if type(seq) is int and isinstance(previous, str) and isinstance(hash_, str):
        return Link(seq, hash_), fault(last, Link(seq - 1, previous))
    return Link(0, hashlib.sha256(last).hexdigest()), "the line is not one of the history's"


def plain(value: Any) -> Any:
    """Return `value` in JSON's own types: a line must never fail because of what somebody put into it."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, bool | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    return plain(str(value))
