"""Good or suspect: does what was copied look like a living agent's files?

Checksums only prove that a copy equals its original. These checks find originals that were wiped, half written or
poisoned with nonsense; the snapshot is kept all the same, but marked, and never restored by itself.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.errors import printable
from backup_worker.snapshots.manifest import Entry, Manifest, Problem
from backup_worker.snapshots.scope import AgentFiles, Scope
from backup_worker.snapshots.sqlite import integrity_problem, is_database

_PARSE_LIMIT_BYTES = 64 << 20
_RULES = f"1 python-{sys.version.split()[0]} sqlite-{sqlite3.sqlite_version}"
"""What a judgement of contents depends on, besides the bytes. Raise the number when the rules below change."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`shrink`: a snapshot with less than this share of the last good one's files or bytes is suspect (None: never).
    `reserve_bytes`: space that a backup leaves free on the repository's file system.
    """

    shrink: float | None = 0.5
    reserve_bytes: int = 0


class Look:
    """Judges the content of files one by one, while they are open; `problems` by path is what it found.

    What `earlier` found sane by the same rules is not judged again: the same bytes (by their SHA-256, which the caller
    has just computed anew), parsed by the same Python and SQLite, say the same.
    """

    def __init__(self, agent: AgentFiles, files: Tree, earlier: Manifest | None = None) -> None:
        self.problems: dict[str, str] = {}
        self._files = files
        self._skills = Scope(tuple(agent.files.get("skills", ())))
        self.judge = f"{_RULES} skills: {' '.join(self._skills.include)}"
        self._sane: dict[str, str | None] = {}
        if earlier is not None and earlier.judge == self.judge:
            named = {problem.path for problem in earlier.problems}
            self._sane = {e.path: e.sha256 for e in earlier.entries if e.sha256 and e.path not in named}

    def __call__(self, entry: Entry, fd: int, content: bytes | None) -> None:
        """Look at the file open as `fd`; `content`, if the caller has it."""
        if self._sane.get(entry.path) == entry.sha256:
            return
        if problem := self._problem(entry, fd, content):
            self.problems[entry.path] = problem
        else:
            self.problems.pop(entry.path, None)

    def _problem(self, entry: Entry, fd: int, content: bytes | None) -> str | None:
        beginning = os.pread(fd, 20, 0) if content is None else content
        if entry.sqlite or is_database(beginning):
            folder, name = self._files.at(entry.path)
            # By descriptor: the path may be longer than the kernel takes.
            return integrity_problem(f"/proc/self/fd/{folder}/{name}")
        if entry.size > _PARSE_LIMIT_BYTES:
            return None
        if entry.path.endswith(".json"):
            return json_problem(_whole(fd) if content is None else content)
        if entry.path.endswith(".py") and self._skills.covers(entry.path):
            return _python_problem(_whole(fd) if content is None else content, entry.path)
        return None


def _whole(fd: int) -> bytes:
    with open(os.dup(fd), "rb") as file:
        file.seek(0)
        return file.read()


def judge(
    agent: AgentFiles,
    scope: Scope,
    files: Tree,
    entries: Mapping[str, Entry],
    last_good: Manifest | None,
    limits: Limits,
    look: Look | None = None,
) -> list[Problem]:
    """Return why the snapshot is suspect; empty if it is good. `look` has seen every file; else all are read."""
    found = list(_missing(agent, scope, entries))
    if look is None:
        look = Look(agent, files)
        for entry in entries.values():
            if entry.kind == "file":
                fd = files.open(entry.path, os.O_RDONLY)
                try:
                    look(entry, fd, None)
                finally:
                    os.close(fd)
    found += [Problem(path, look.problems[path]) for path in entries if path in look.problems]
    if last_good is not None and limits.shrink is not None:
        found += _shrunk(scope, entries, last_good, limits.shrink)
    return found


def _missing(agent: AgentFiles, scope: Scope, entries: Mapping[str, Entry]) -> Iterable[Problem]:
    for path in agent.required:
        path = path.strip("/")
        if not scope.covers(path):
            continue
        entry = entries.get(path)
        if entry is None:
            yield Problem(path, "required, and missing")
        elif _is_empty(entry, entries):
            yield Problem(path, "required, and empty")
        elif entry.kind == "link" and _points_at(entry) not in entries:
            yield Problem(
                path, f"required, and only a link to “{printable(entry.target or '')}”, which is not stored"
            )


def _points_at(link: Entry) -> str:
    """Return the path, relative to the root, that a link in the tree leads to; one that leaves it is in no snapshot."""
    return os.path.normpath(os.path.join(os.path.dirname(link.path), link.target or ""))


def _is_empty(entry: Entry, entries: Mapping[str, Entry]) -> bool:
    if entry.kind == "dir":
        return not any(other.startswith(entry.path + "/") for other in entries)
    return entry.kind == "file" and entry.size == 0


def json_problem(content: bytes) -> str | None:
    """Return why `content` is not JSON by RFC 8259 and I-JSON, or None.

    Python's parser accepts NaN, duplicate keys and a byte-order mark; other parsers stumble over them.
    """
    if content.startswith(b"\xef\xbb\xbf"):
        return "not valid JSON: it begins with a byte-order mark"
    try:
        _STRICT.decode(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not valid JSON: not UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        return f"not valid JSON: {error.msg.lower().removesuffix(' at')} at line {error.lineno}, column {error.colno}"
    except (ValueError, RecursionError) as error:
        return f"not valid JSON: {error or 'nested too deep'}"
    return None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"“{name}” is not a JSON number")


_KEY_SHOWN = 80
"""Characters of a key: what is wrong goes into alerts, the record and the manifest's head."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for key, value in pairs:
        if key in keys:
            shown = key if len(key) <= _KEY_SHOWN else key[:_KEY_SHOWN] + "…"
            raise ValueError(f"the key “{shown}” is there twice")
        keys[key] = value
    return keys


_STRICT = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique)


def _python_problem(content: bytes, path: str) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(content, os.fsencode(path), "exec", dont_inherit=True)
    except SyntaxError as error:
        return f"does not compile: {error.msg} at line {error.lineno}"
    except (ValueError, RecursionError, MemoryError, OverflowError) as error:
        return f"does not compile: {error}"
    return None


def _shrunk(
    scope: Scope, entries: Mapping[str, Entry], last_good: Manifest, limit: float
) -> Iterable[Problem]:
    """Compare only what both snapshots cover: a changed `include` or `exclude` is no loss."""
    same = scope == last_good.scope
    before = [e for e in last_good.entries if e.kind == "file" and (same or scope.covers(e.path))]
    after = [e for e in entries.values() if e.kind == "file" and (same or last_good.scope.covers(e.path))]
    for what, old, new in (
        ("files", len(before), len(after)),
        ("bytes", sum(e.size for e in before), sum(e.size for e in after)),
    ):
        if new < old * limit:
            yield Problem(".", f"shrank from {old} to {new} {what} since “{last_good.id}”")
