"""What belongs to one agent of a fleet that was found: its files sorted into classes, and what a person should know.

Reads names, sizes and small JSON files, changes nothing. What is left out is what the engine would leave out for the
same patterns. A secret is recognised by its name alone: no remark is no proof that there is none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from backup_worker.snapshots.sanity import json_problem
from backup_worker.snapshots.scope import Scope

SOUL = "SOUL.md"
CHARTER = (
    SOUL, "IDENTITY.md", "AGENTS.md", "CLAUDE.md", "USER.md", "TOOLS.md", "HEARTBEAT.md", "BOOT.md",
)  # fmt: skip
USUAL: dict[str, tuple[str, ...]] = {
    "charter": CHARTER,
    "weights": ("*weights*.json", "weights/**/*.json"),
    "rules": ("rules/**", "RULES.md"),
    "memory": ("memory/**", "MEMORY.md"),
    "skills": ("skills/**",),
}
"""The classes and where agents usually keep them. A pattern that matches nothing yet costs nothing, and what appears
there later is protected from then on."""

_ALSO = {"memories": "memory", "skill": "skills", "policies": "rules"}
"""Other names of the folders of a class."""

EXCLUDED = (
    "**/__pycache__/**", "**/node_modules/**", "**/.venv/**", "**/venv/**", "**/.cache/**", "**/.mypy_cache/**",
    "**/.pytest_cache/**", "**/.ruff_cache/**", "*.lock", "*.sock", "*.pid", "*.tmp", "*.outbox*",
)  # fmt: skip

_DATABASE = re.compile(r".*\.(?:db|sqlite3?)", re.IGNORECASE)
_SECRET = re.compile(
    r"(?:.*/)?(?:\.env(?:\.(?!example$|sample$|template$)[^/]*)?|id_(?:rsa|dsa|ecdsa|ed25519)|\.netrc|\.npmrc|\.pypirc"
    r"|auth-profiles\.json|service-account[^/]*\.json|(?:credentials?|secrets?|tokens?)(?:\.[^/]*)?"
    r"|[^/]*\.(?:pem|key|p12|pfx|kdbx))"
    r"|(?:.*/)?(?:\.aws|\.gnupg|\.ssh|credentials|secrets)/.*",
    re.IGNORECASE,
)
_MOST_WEIGHTS = 20
_MOST_NAMED = 4
_BIG_BYTES = 100 * 1024**2
_PARSED_BYTES = 1024**2


@dataclass(slots=True)
class Found:
    """One agent that was found, and what was decided for it; `counts` is how many files each class has now."""

    agent: str
    root: Path
    files: dict[str, list[str]]
    required: list[str]
    exclude: list[str]
    counts: dict[str, int]
    bytes: int = 0
    critical: bool = False
    remarks: list[str] = field(default_factory=list)
    program: str | None = None
    """A file by whose name it could be the agent's program; what starts it is for its owner to say."""

    def as_json(self) -> dict[str, Any]:
        """Return it as a map for `--json`."""
        return {
            "agent": self.agent,
            "root": str(self.root),
            "files": self.files,
            "found": self.counts,
            "bytes": self.bytes,
            "required": self.required,
            "exclude": self.exclude,
            "critical": self.critical,
            "remarks": self.remarks,
            "program": self.program,
        }


@dataclass(slots=True)
class _Notes:
    """Paths that a person should know of."""

    secrets: list[str] = field(default_factory=list)
    big: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def propose(name: str, root: Path, inner: Sequence[str]) -> Found:
    """Return the agent in `root`; `inner` are the paths, relative to it, of other agents, which are left out."""
    classes = {kind: list(patterns) for kind, patterns in USUAL.items()}
    counts = dict.fromkeys((*USUAL, "other"), 0)
    found = Found(name, root, classes, [], [*EXCLUDED, *(f"{escaped(path)}/**" for path in inner)], counts)
    if name == "em":
        found.critical = True
        # Where the EM exports the log of messages to: what rebuilds a lost Redis must not wait for Sunday.
        classes["memory"].append("message-log/**")
    notes, weights = _Notes(), []
    for path in _paths(root, found.exclude, notes):
        kind, pattern = _class_of(path)
        if kind is not None and pattern is not None and pattern not in classes[kind]:
            classes[kind].append(pattern)
        counts[kind or "other"] += 1
        found.bytes += _look(root, path, notes)
        if kind == "weights":
            weights.append(path)
        elif path.lower() == SOUL.lower():
            found.required.append(path)
    if len(weights) <= _MOST_WEIGHTS:
        found.required += [path for path in weights if escaped(path) == path]
    else:
        found.remarks.append(f"{len(weights)} files look like weights; none of them is required")
    found.remarks += _remarks(root, found.required, notes, inner)
    found.program = next((path for path in _programs(name) if (root / path).is_file()), None)
    return found


def class_of_folder(name: str) -> str | None:
    """Return the class of a folder of an agent with this name, such as `memory`; None if it has none."""
    lower = name.lower()
    return _ALSO.get(lower) or (lower if f"{lower}/**" in USUAL.get(lower, ()) else None)


def is_passing(path: str, exclude: Sequence[str]) -> bool:
    """Tell whether the engine leaves out `path` for these patterns."""
    return _scope(tuple(exclude)).excludes(path)


def escaped(path: str) -> str:
    """Write a path so that none of its characters is taken for a pattern."""
    return re.sub(r"([*?\[])", r"[\1]", path)


@lru_cache(maxsize=64)
def _scope(exclude: tuple[str, ...]) -> Scope:
    return Scope(("**",), exclude)


@lru_cache(maxsize=1)
def _usual() -> dict[str, Scope]:
    return {kind: Scope(patterns) for kind, patterns in USUAL.items()}


def _paths(root: Path, exclude: list[str], notes: _Notes) -> Iterator[str]:
    """Yield the agent's files and links, and add the virtual environments on the way to `exclude`."""

    def closed(error: OSError) -> None:
        notes.unreadable.append(os.path.relpath(error.filename, root))

    for folder, folders, files in os.walk(root, onerror=closed):
        here = os.path.relpath(folder, root)
        here = "" if here == "." else f"{here}/"
        kept = []
        for name in sorted(folders):
            path = f"{here}{name}"
            if is_passing(f"{path}/x", exclude):
                continue
            if os.path.exists(os.path.join(folder, name, "pyvenv.cfg")):
                exclude.append(f"{escaped(path)}/**")
            elif os.path.islink(os.path.join(folder, name)):
                files.append(name)
            else:
                kept.append(name)
        folders[:] = kept
        paths = (f"{here}{name}" for name in sorted(files))
        yield from (path for path in paths if _is_text(path) and not is_passing(path, exclude))


def _class_of(path: str) -> tuple[str | None, str | None]:
    """Return the class of a file, and the pattern that puts it there if the usual ones do not."""
    for kind, scope in _usual().items():
        if scope.covers(path):
            return kind, None
    top, _, below = path.partition("/")
    if below and (of_folder := class_of_folder(top)):
        return of_folder, f"{escaped(top)}/**"
    for kind, patterns in USUAL.items():
        if path.lower() in map(str.lower, patterns):
            return kind, escaped(path)
    if "weights" in Path(path).name.lower() and path.lower().endswith(".json"):
        return "weights", escaped(path)
    return ("memory", escaped(path)) if _DATABASE.fullmatch(path) else (None, None)


def _look(root: Path, path: str, notes: _Notes) -> int:
    """Note what is remarkable about a file, and return its size in bytes."""
    full = root / path
    try:
        if full.is_symlink():
            if not Path(os.path.realpath(full)).is_relative_to(os.path.realpath(root)):
                notes.links.append(path)
            return 0
        if not full.is_file():
            return 0
        size = full.stat().st_size
        if not os.access(full, os.R_OK):
            notes.unreadable.append(path)
        elif path.endswith(".json") and 0 < size <= _PARSED_BYTES and json_problem(full.read_bytes()):
            notes.broken.append(path)
    except OSError:
        return 0
    if _SECRET.fullmatch(path):
        notes.secrets.append(path)
    if size >= _BIG_BYTES:
        notes.big.append(f"{path} ({size / 1024**2:.0f} MiB)")
    return size


def _programs(name: str) -> Iterator[str]:
    yield from (
        "agent.py",
        "main.py",
        f"{name}.py",
        "run.py",
        "agent.sh",
        "run.sh",
        "start.sh",
        "agent.js",
        "index.js",
    )


def _remarks(root: Path, required: Iterable[str], notes: _Notes, inner: Sequence[str]) -> Iterator[str]:
    for path in required:
        if _is_empty(root / path):
            yield f"{path} is empty: its first snapshot will be suspect"
    if notes.broken:
        yield f"not valid JSON, so its first snapshot will be suspect: {_some(notes.broken)}"
    if notes.unreadable:
        yield f"cannot be read by you, so snapshots will be partial: {_some(notes.unreadable)}"
    if notes.secrets:
        yield f"secrets by their names, backed up like the rest (files only you can read): {_some(notes.secrets)}"
    if notes.big:
        yield f"big, and whole in each weekly snapshot unless excluded: {_some(notes.big)}"
    if notes.links:
        yield f"links that lead out of it; what they lead to is not backed up: {_some(notes.links)}"
    if inner:
        yield f"holds other agents, which are left out here: {_some(inner)}"


def _some(paths: Sequence[str]) -> str:
    more = len(paths) - _MOST_NAMED
    return ", ".join(paths[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _is_text(path: str) -> bool:
    """Tell whether a path can stand in a JSON file; others are backed up by the patterns, but cannot be named."""
    return path.isprintable() and path == path.strip()


def _is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError:
        return False
