"""Find the agents of a fleet that exists already, and propose how each is protected.

Reads folders and names, changes nothing. Every decision that a person may want to change is in what it returns: the
classes with their patterns, what is required, what is left out, and remarks. Folders that cannot be read are remarked
on, not skipped in silence.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SOUL = "SOUL.md"
USUAL: dict[str, tuple[str, ...]] = {
    "charter": ("SOUL.md", "IDENTITY.md", "AGENTS.md", "USER.md", "TOOLS.md", "HEARTBEAT.md"),
    "weights": ("*weights*.json",),
    "rules": ("rules/**", "RULES.md"),
    "memory": ("memory/**", "MEMORY.md"),
    "skills": ("skills/**",),
}
"""The classes and where agents usually keep them. A pattern that matches nothing yet costs nothing, and what appears
there later is protected from then on."""

EXCLUDED = (
    "**/__pycache__/**", "**/node_modules/**", "**/.venv/**", "**/venv/**", "**/.cache/**", "**/.mypy_cache/**",
    "**/.pytest_cache/**", "**/.ruff_cache/**", "*.lock", "*.sock", "*.pid", "*.tmp", "*.outbox*",
)  # fmt: skip
_SKIPPED = frozenset(
    (
        "__pycache__",
        "node_modules",
        ".venv",
        "venv",
        ".cache",
        ".git",
        ".mypy_cache",
        ".pytest_cache",
        ".ruff_cache",
    )
)
_OWN = frozenset(("rules", "memory", "skills"))
"""Folders of an agent in which a SOUL.md is a note or a copy, and makes no agent."""

_MOST_WEIGHTS = 20


@dataclass(slots=True)
class Found:
    """One agent that was found, and what was decided for it; `counts` is how many files each class has now."""

    agent: str
    root: Path
    files: dict[str, list[str]]
    required: list[str]
    exclude: list[str]
    counts: dict[str, int]
    critical: bool = False
    remarks: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return it as a map for `--json`."""
        return {
            "agent": self.agent,
            "root": str(self.root),
            "files": self.files,
            "found": self.counts,
            "required": self.required,
            "exclude": self.exclude,
            "critical": self.critical,
            "remarks": self.remarks,
        }


def discover(fleet: Path) -> list[Found]:
    """Return an agent for `fleet` and every folder below it that holds a SOUL.md, by their paths."""
    unreadable: list[str] = []
    roots = list(_roots(fleet, unreadable))
    taken: set[str] = set()
    found = []
    for root in roots:
        name = _agent_id(root, taken)
        taken.add(name.lower())
        inner = [
            other.relative_to(root).as_posix()
            for other in roots
            if other != root and other.is_relative_to(root)
        ]
        one = _propose(name, root, inner)
        one.remarks += [f"cannot be read: {path}" for path in unreadable if Path(path).is_relative_to(root)]
        found.append(one)
    return found


def _roots(fleet: Path, unreadable: list[str]) -> Iterator[Path]:
    for folder, folders, files in os.walk(
        fleet, onerror=lambda error: unreadable.append(str(error.filename))
    ):
        is_agent = SOUL in files
        if is_agent:
            yield Path(folder)
        folders[:] = sorted(
            name
            for name in folders
            if name not in _SKIPPED
            and not (is_agent and name in _OWN)
            and not os.path.exists(os.path.join(folder, name, "pyvenv.cfg"))
        )


def _agent_id(root: Path, taken: Iterable[str]) -> str:
    names = [part for part in (_identifier(part) for part in reversed(root.parts)) if part]
    name = names[0] if names else "agent"
    if name.lower() in ("em", "execution-manager", "execution_manager"):
        name = "em"
    if name.lower() in taken and len(names) > 1:
        name = f"{names[1]}-{name}"[:63]
    number, candidate = 2, name
    while candidate.lower() in taken:
        candidate = f"{name[:59]}-{number}"
        number += 1
    return candidate


def _identifier(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_")[:63]


def _propose(name: str, root: Path, inner: list[str]) -> Found:
    exclude = [*EXCLUDED, *(f"{_escaped(path)}/**" for path in inner)]
    classes = {kind: list(patterns) for kind, patterns in USUAL.items()}
    required, counts = [SOUL], dict.fromkeys((*USUAL, "other"), 0)
    remarks: list[str] = []
    weights: list[str] = []
    for path in _walk(root, inner, exclude):
        kind = _class_of(path)
        if kind is None and "weights" in Path(path).name.lower() and path.lower().endswith(".json"):
            kind = "weights"
            classes["weights"].append(_escaped(path))
        counts[kind or "other"] += 1
        if kind == "weights":
            weights.append(path)
    if len(weights) <= _MOST_WEIGHTS:
        required += [path for path in weights if _escaped(path) == path]
    else:
        remarks.append(f"{len(weights)} files look like weights; none of them is required")
    remarks += [
        f"{path} is empty: its first snapshot will be suspect" for path in required if _is_empty(root / path)
    ]
    if inner:
        remarks.append(f"holds other agents, which are left out: {', '.join(inner)}")
    critical = name == "em"
    return Found(name, root, classes, required, exclude, counts, critical, remarks)


def _walk(root: Path, inner: list[str], exclude: list[str]) -> Iterator[str]:
    """Yield the agent's files, and add the virtual environments on the way to `exclude`."""
    for folder, folders, files in os.walk(root):
        here = os.path.relpath(folder, root)
        here = "" if here == "." else f"{here}/"
        kept = []
        for name in sorted(folders):
            path = f"{here}{name}"
            if os.path.exists(os.path.join(folder, name, "pyvenv.cfg")):
                if name not in _SKIPPED:
                    exclude.append(f"{_escaped(path)}/**")
            elif name not in _SKIPPED and path not in inner:
                kept.append(name)
        folders[:] = kept
        paths = (f"{here}{name}" for name in sorted(files) if not _is_passing(name))
        yield from (path for path in paths if _is_text(path))


def _class_of(path: str) -> str | None:
    for kind, patterns in USUAL.items():
        for pattern in patterns:
            if path == pattern or (pattern.endswith("/**") and path.startswith(pattern[:-2])):
                return kind
            if "/" not in pattern and "/" not in path and fnmatch.fnmatchcase(path, pattern):
                return kind
    return None


def _is_passing(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in EXCLUDED if "/" not in pattern)


def _is_text(path: str) -> bool:
    """Tell whether a path can stand in a JSON file; others are backed up by the patterns, but cannot be named."""
    return path.isprintable() and path == path.strip()


def _is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError:
        return False


def _escaped(path: str) -> str:
    """Write a path so that none of its characters is taken for a pattern."""
    return re.sub(r"([*?\[])", r"[\1]", path)
