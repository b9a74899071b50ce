"""The last approved state of each agent's guarded files, kept with its bytes in the repository.

Promise: what `load` returns was accepted for a reason that it names, and `content` returns exactly the bytes of that
SHA-256 or nothing. A state appears by one rename, behind its bytes, so that a crash leaves the old one or the new one.
It needs neither Redis nor any snapshot: it outlives a server that lost its data, and retention.

Below `<repository>/.agent-backup/approved/<agent>/`: `state.json`, and each content once under its SHA-256. The first
time an agent is looked at, what stands there is accepted as `first-seen`, and says so: nobody has approved it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from backup_worker.snapshots import Repository, Scope, SnapshotError, disk
from backup_worker.snapshots.disk import Tree

How = Literal["first-seen", "by-name", "signed", "em-word", "unseen"]
"""Why a file's state was accepted: as it was found at first, approved by name, with a signature, on the EM's word in
`config.applied`, or approved without its content having been proposed."""

Differences = Mapping[str, tuple[str | None, str | None]]
"""Path -> SHA-256 that is approved and that was found; None is no file."""

_STATE = "state.json"
_FORMAT = 1
MOST_BYTES = 8 * 1024 * 1024
"""Larger contents are not kept here; a revert looks for them in the snapshots."""


@dataclass(frozen=True, slots=True)
class Held:
    """What one path shall hold: `sha256` (None: nothing), with the file's mode, why, by whom and since when.

    `entry` is the decision's place on the stream, empty if there was none; `at` is in Unix seconds.
    """

    sha256: str | None
    how: How
    at: float
    mode: int = 0o600
    change: str = ""
    by: str = ""
    entry: str = ""


@dataclass(frozen=True, slots=True)
class ApprovedState:
    """The approved files of an agent by path, and the scope that they were taken with."""

    agent: str
    scope: Scope
    files: Mapping[str, Held] = field(default_factory=dict)

    def differences(self, found: Mapping[str, str]) -> Differences:
        """Return what of `found` (path -> SHA-256) is not as approved, and what is not there; within the scope."""
        wanted = {path: held.sha256 for path, held in self.files.items() if self.scope.covers(path)}
        here = {path: digest for path, digest in found.items() if self.scope.covers(path)}
        paths = sorted(wanted.keys() | here.keys())
        pairs = ((path, (wanted.get(path), here.get(path))) for path in paths)
        return {path: (want, have) for path, (want, have) in pairs if want != have}

    def newest_entry(self, path: str) -> str:
        """Return the decision behind which another one must stand to take its place."""
        held = self.files.get(path)
        return held.entry if held else ""


class ApprovedStates:
    """The states of all agents in one repository."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._root = repository.hidden / "approved"

    def folder(self, agent: str) -> Path:
        """Return where the state of `agent` is kept, there or not."""
        return self._root / agent

    def load(self, agent: str) -> ApprovedState | None:
        """Return the state of `agent`, None if it was never looked at. Raises SnapshotError if it is damaged."""
        try:
            document = json.loads((self.folder(agent) / _STATE).read_bytes())
            scope = Scope(tuple(document["scope"]["include"]), tuple(document["scope"]["exclude"]))
            files = {str(path): Held(**held) for path, held in document["files"].items()}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SnapshotError(
                f"the approved state of “{agent}” in “{self.folder(agent)}” cannot be read",
                hint="remove that folder, and what stands in the agent's files is taken for the first state again",
            ) from error
        return ApprovedState(agent, scope, files)

    def accept(
        self,
        agent: str,
        scope: Scope,
        files: Mapping[str, Held],
        content: Callable[[str], bytes | None],
    ) -> ApprovedState:
        """Make `files` part of the approved state; `content` returns a path's bytes, None if they cannot be had."""
        with self._locked(agent):
            known = self.load(agent) or ApprovedState(agent, scope)
            merged = {**known.files, **files}
            state = replace(known, scope=scope, files=dict(sorted(merged.items())))
            self._write(state, {path: held for path, held in files.items() if held.sha256}, content)
            return state

    def content(self, agent: str, sha256: str) -> bytes | None:
        """Return the bytes of that SHA-256, None if they are not kept here, or have gone bad."""
        with contextlib.suppress(OSError):
            data = (self.folder(agent) / sha256).read_bytes()
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
        return None

    def forget(self, agent: str) -> None:
        """Remove the state of `agent`."""
        with contextlib.suppress(FileNotFoundError), Tree(self._root) as tree:
            tree.remove(agent)

    @contextlib.contextmanager
    def _locked(self, agent: str) -> Iterator[None]:
        self._repository.prepare()
        with self._repository.lock(f"approved.{agent.lower()}"):
            yield

    def _write(
        self, state: ApprovedState, fresh: Mapping[str, Held], content: Callable[[str], bytes | None]
    ) -> None:
        folder = self.folder(state.agent)
        os.makedirs(folder, 0o700, exist_ok=True)
        with Tree(folder) as tree:
            kept = set(os.listdir(tree.fd))
            for path, held in fresh.items():
                assert held.sha256 is not None
                if held.sha256 in kept and self.content(state.agent, held.sha256) is not None:
                    continue
                data = content(path)
                right = data is not None and hashlib.sha256(data).hexdigest() == held.sha256
                if data is not None and right and len(data) <= MOST_BYTES:
                    disk.replace_file(tree, held.sha256, data)
            document = {
                "format": _FORMAT,
                "agent": state.agent,
                "scope": {"include": list(state.scope.include), "exclude": list(state.scope.exclude)},
                "files": {path: asdict(held) for path, held in state.files.items()},
            }
            disk.replace_file(tree, _STATE, json.dumps(document, indent=1).encode() + b"\n")
            wanted = {held.sha256 for held in state.files.values()} | {_STATE}
            for name in kept - wanted:
                tree.remove(name)
