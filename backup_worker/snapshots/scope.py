"""Which paths of an agent a snapshot speaks for.

A snapshot that covers a path decides about it, also when the path is absent: that is how a restore knows that a file
was deleted, and not merely outside the tier's classes. Patterns are those of `agents.json`: `*` and `?` stay within
one name, `**` spans folders, and a pattern that names a folder means everything below it. Include patterns start at
the agent's root; an exclude pattern without a slash matches at any depth, as in a `.gitignore`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from em_bridge.errors import UsageError
from em_bridge.fields import AGENT_ID

WORKSHOP = ".agent-backup-restore"
"""Folder of a restore under way (beside its target: with `-` and the target's name); never part of a snapshot."""


@dataclass(frozen=True)
class Scope:
    """Include and exclude patterns, and the question whether they cover a path (relative, `/` between names)."""

    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()

    @cached_property
    def _included(self) -> re.Pattern[str]:
        return _compiled(self.include, anchored=True)

    @cached_property
    def _excluded(self) -> re.Pattern[str]:
        return _compiled((*self.exclude, WORKSHOP, WORKSHOP + "-*"), anchored=False)

    @cached_property
    def _literal_starts(self) -> tuple[str, ...]:
        return tuple(_literal_start(p) for p in self.include)

    def covers(self, path: str) -> bool:
        """Tell whether a snapshot of this scope decides about `path`."""
        return self.includes(path) and not self.excludes(path)

    def includes(self, path: str) -> bool:
        """Tell whether `path` is included; that it is not excluded either is for the caller to know."""
        return self._included.fullmatch(path) is not None

    def excludes(self, path: str) -> bool:
        """Tell whether `path`, or a folder above it, is excluded by name."""
        return self._excluded.fullmatch(path) is not None

    def may_hold(self, folder: str) -> bool:
        """Tell whether something below `folder` could be covered, so that listing it is worth the time."""
        if self.excludes(folder):
            return False
        below = folder + "/"
        return self.includes(folder) or any(
            start.startswith(below) or below.startswith(start) for start in self._literal_starts
        )


@dataclass(frozen=True, slots=True)
class Hook:
    """A command that is run in the agent's root, and how many seconds it may take."""

    command: tuple[str, ...]
    timeout_s: float = 60.0


@dataclass(frozen=True)
class AgentFiles:
    """The engine's view of an agent: where its files are, and which class each belongs to.

    `files` maps a class (charter, weights, rules, memory, skills…) to patterns; `required` are paths that a good
    snapshot must hold, not empty; `exclude` are patterns that no snapshot holds and that survive a restore.
    `before_backup` and `after_backup` are run around the copying; the second always.
    """

    name: str
    root: Path
    files: Mapping[str, Sequence[str]] = field(default_factory=dict)
    required: Sequence[str] = ()
    exclude: Sequence[str] = ()
    before_backup: Hook | None = None
    after_backup: Hook | None = None

    def __post_init__(self) -> None:
        if not AGENT_ID.fullmatch(self.name):
            raise UsageError(
                f"“{self.name}” is not an agent id", hint="letters, digits, `_` and `-`, at most 63"
            )

    def scope(self, include: Sequence[str]) -> Scope:
        """Return the scope of the classes `include`; `*` is everything that is not excluded."""
        if "*" in include:
            return Scope(("**",), tuple(self.exclude))
        patterns = (pattern for name in include for pattern in self.files.get(name, ()))
        return Scope(tuple(dict.fromkeys(patterns)), tuple(self.exclude))


@lru_cache(maxsize=256)
def _compiled(patterns: tuple[str, ...], *, anchored: bool) -> re.Pattern[str]:
    # Kept: the agents of a fleet mostly have the same patterns.
    joined = "|".join(_translate(pattern, anchored=anchored) for pattern in patterns)
    return re.compile(joined or r"(?!)", re.DOTALL)


def _parts(pattern: str) -> list[str]:
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    # `memory/**` and `memory` mean the same: the folder, so that it is kept when it is empty, and all below it.
    while parts and parts[-1] == "**":
        parts.pop()
    return parts


def _translate(pattern: str, *, anchored: bool) -> str:
    parts = _parts(pattern)
    if not parts:
        return r".*"
    bare = len(parts) == 1 and not pattern.startswith("/")
    out = "" if anchored or not bare else r"(?:.*/)?"
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        out += r"(?:.*/)?" if part == "**" else _translate_name(part) + ("" if last else "/")
    return f"(?:{out}(?:/.*)?)"


def _translate_name(name: str) -> str:
    out, i = "", 0
    while i < len(name):
        c = name[i]
        close = name.find("]", i + 2) if c == "[" else -1
        if c == "*":
            out += "[^/]*"
        elif c == "?":
            out += "[^/]"
        elif close > 0:
            body = name[i + 1 : close].replace("\\", r"\\").replace("[", r"\[").replace("&&", r"&\&")
            out += "(?!/)[" + ("^" + body[1:] if body[0] in "!^" else body) + "]"
            i = close
        else:
            out += re.escape(c)
        i += 1
    return out


def _literal_start(pattern: str) -> str:
    start = ""
    for part in _parts(pattern):
        if set(part) & set("*?["):
            break
        start += part + "/"
    return start
