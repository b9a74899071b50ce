"""Find the agents of a fleet that exists already, and propose how each is protected.

Reads folders and names, changes nothing. Every decision that a person may want to change is in what it returns: the
agents with their classes and remarks, and the folders that were passed over, with the reason. Folders that cannot be
read are remarked on, not skipped in silence. What an agent depends on and how it is started is not guessed.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backup_worker.discovery.fleet_files import (
    CHARTER,
    EXCLUDED,
    SOUL,
    Found,
    class_of_folder,
    is_passing,
    propose,
)
from backup_worker.snapshots.repository import HIDDEN

_OWN = frozenset(("memory", "rules", "skills"))
"""Classes of folders in which a SOUL.md is a note or a copy, and makes no agent."""

_RUNTIME = "openclaw.json"
"""The settings of an OpenClaw installation: beside it lie the workspaces, and state that is in none of them."""

_GENERIC = frozenset(("agent", "agents", "data", "home", "root", "src", "workspace", "workspaces"))
_PREFIX = re.compile(r"(?:agent|workspace)[-_.](?=.)", re.IGNORECASE)
_NO_LIVING = re.compile(
    r"(?:^|[-_. ])(?:archived?|backups?|bak|copy|examples?|old|samples?|templates?|trash)(?:$|[-_. ])", re.I
)


_NOBODY: Mapping[str, Path] = {}


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A folder of the fleet that belongs to no agent although it may matter, and why."""

    path: Path
    why: str

    def as_json(self) -> dict[str, Any]:
        """Return it as a map for `--json`."""
        return {"path": str(self.path), "why": self.why}


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found in a fleet."""

    agents: list[Found]
    passed_over: list[PassedOver]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one walk through the fleet has met."""

    roots: list[Path]
    passed_over: list[PassedOver]
    unreadable: list[Path]


def discover(fleet: Path, ours: Collection[Path] = (), known: Mapping[str, Path] = _NOBODY) -> Survey:
    """Return an agent for `fleet` and every folder below it that holds a SOUL.md, by their paths.

    Repositories hold copies, not agents, and are left out; so are the folders `ours` (evidence holds copies too), and
    the agents that are `known`: their roots by their ids.
    """
    seen = _walk(fleet, ours)
    taken = {name.lower() for name in known}
    theirs = {os.path.realpath(root) for root in known.values()}
    agents = []
    for root in seen.roots:
        if os.path.realpath(root) in theirs:
            continue
        name = _agent_id(root, fleet, taken)
        taken.add(name.lower())
        inner = [
            other.relative_to(root).as_posix()
            for other in seen.roots
            if other != root and other.is_relative_to(root)
        ]
        one = propose(name, root, inner)
        if not root.name.isascii():
            one.remarks.append(
                f"“{root.name}” is not a name for an agent: ASCII letters, digits, - and _ only"
            )
        if any(_NO_LIVING.search(part) for part in root.relative_to(fleet).parts):
            one.remarks.append(
                "its path looks like that of a copy or a template: if nobody lives there, remove it"
            )
        agents.append(one)
    hidden = [PassedOver(path, "cannot be read") for path in seen.unreadable if not _within(path, seen.roots)]
    return Survey(agents, [*seen.passed_over, *hidden])


def _walk(fleet: Path, ours: Collection[Path]) -> _Seen:
    seen = _Seen([], [], [])
    for here, folders, files in os.walk(fleet, onerror=lambda e: seen.unreadable.append(Path(e.filename))):
        folder = Path(here)
        if HIDDEN in folders or folder in ours:
            folders.clear()
            continue
        is_agent = any(name.lower() == SOUL.lower() for name in files)
        if is_agent:
            seen.roots.append(folder)
        elif not _within(folder, seen.roots):
            seen.passed_over.extend(PassedOver(folder, why) for why in _matters(folders, files))
        seen.passed_over.extend(_links_out(fleet, folder, folders))
        folders[:] = sorted(
            name
            for name in folders
            if name != ".git"
            and not is_passing(f"{name}/x", EXCLUDED)
            and not (is_agent and class_of_folder(name) in _OWN)
            and not os.path.exists(os.path.join(here, name, "pyvenv.cfg"))
        )
    return seen


def _within(path: Path, roots: Iterable[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _links_out(fleet: Path, folder: Path, names: Iterable[str]) -> Iterator[PassedOver]:
    """Name the links to agents elsewhere: no link is followed."""
    for link in (folder / name for name in names):
        if link.is_symlink() and (link / SOUL).exists():
            target = link.resolve()
            if not target.is_relative_to(fleet.resolve()):
                yield PassedOver(
                    link, f"is a link to {target}, an agent: add it with that folder as its root"
                )


def _matters(folders: Iterable[str], files: Iterable[str]) -> Iterator[str]:
    """Say why a folder without a SOUL.md should not be forgotten, if so."""
    if _RUNTIME in files:
        state = [name for name in ("agents", "credentials", "memory") if name in folders]
        also = f" and {', '.join(state)}" if state else ""
        yield f"{_RUNTIME}{also} are beside the workspaces: settings, sessions and logins are in no agent's backup"
        return
    signs = [name for name in sorted(files) if name in CHARTER or name == "MEMORY.md"]
    signs += [f"{name}/" for name in sorted(folders) if class_of_folder(name) in _OWN]
    if len(signs) > 1:
        yield f"looks like an agent ({', '.join(signs)}), but has no {SOUL}"


def _agent_id(root: Path, fleet: Path, taken: Iterable[str]) -> str:
    names = list(_names(root, fleet)) or ["agent"]
    name = names[0]
    if name.lower() in ("em", "execution-manager", "execution_manager"):
        name = "em"
    if name.lower() in taken and len(names) > 1:
        name = f"{names[1]}-{name}"[:63]
    number, candidate = 2, name
    while candidate.lower() in taken:
        candidate = f"{name[:59]}-{number}"
        number += 1
    return candidate


def _names(root: Path, fleet: Path) -> Iterator[str]:
    """Yield names that could be the agent's, the best first: of its folder, else of the ones around it."""
    if root.name == "workspace" and (root.parent / _RUNTIME).exists():
        yield "main"  # What that runtime calls the agent of its first workspace.
    within = list(reversed(root.relative_to(fleet.parent).parts))
    around = list(reversed(fleet.parent.parts))
    special = [part for part in within if part.lower() not in _GENERIC]
    generic = [part for part in within if part.lower() in _GENERIC]
    for part in (*special, *generic, *around):
        plain = unicodedata.normalize("NFKD", _PREFIX.sub("", part)).encode("ascii", "ignore").decode()
        if name := re.sub(r"[^A-Za-z0-9_-]+", "-", plain).strip("-_")[:63]:
            yield name
