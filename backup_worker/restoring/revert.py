"""Put the last approved state of an agent's guarded files back: those files, and nothing else.

Promise: what stood there is kept as evidence first, or nothing is changed; the bytes are proven before the first file
is touched; each file is replaced by one rename, so that a living agent reads the old file or the new one, never half
of one. The files of one revert are not replaced in one step: killed in the middle, some are back and others not, and
it is run again. An agent that runs is only touched if that is asked for, because it may hold the old values in its
memory, or write them back. Files that were added without an approval are removed, as evidence holds them.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from backup_worker.approval import guard, guarded
from backup_worker.approval.approved import ApprovedState, ApprovedStates, Held
from backup_worker.recovery.locks import acting_on
from backup_worker.restoring import restores
from backup_worker.runtime import Runtime
from backup_worker.snapshots import Repository, disk
from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.errors import from_os_error
from backup_worker.snapshots.exact_copy import copy_any
from em_bridge.errors import AgentBackupError, NotFound


@dataclass(frozen=True, slots=True)
class Step:
    """One path to put right: `held` is what was approved there, None for nothing; `have` is the SHA-256 found."""

    path: str
    held: Held | None
    have: str | None
    content: bytes | None

    @property
    def action(self) -> str:
        """What is done: `write` or `remove`."""
        return "remove" if self.held is None or self.held.sha256 is None else "write"

    def as_json(self) -> dict[str, Any]:
        """Return it as a map for `--json`."""
        held = self.held
        return {
            "path": self.path, "action": self.action, "found": self.have,
            "approved": held.sha256 if held else None, "how": held.how if held else None,
            "change": held.change if held else "", "by": held.by if held else "", "at": held.at if held else None,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class RevertPlan:
    """What a revert would do; no steps: the files are as approved."""

    agent: str
    root: Path
    steps: tuple[Step, ...]


def plan(runtime: Runtime, agent: str, now: float) -> RevertPlan:
    """Return what to put back. Changes nothing.

    Raises NotFound if no approved state of the agent is known, AgentBackupError if approved bytes are nowhere to be
    had, SnapshotError if its files cannot be read.
    """
    files = runtime.config.files_of(agent)
    state = ApprovedStates(runtime.repository).load(agent)
    if state is None or not state.files:
        raise NotFound(
            f"nothing of “{agent}” is known to be approved",
            hint=f"its guarded files were never looked at; any backup can be restored: backup-worker restore {agent}",
        )
    look = guarded.look(None, files, state.scope, now)
    steps, missing = [], []
    for path, (want, have) in state.differences(look.found).items():
        content = approved_content(runtime.repository, state, path, want) if want else None
        if want and content is None:
            missing.append(path)
        steps.append(Step(path, state.files.get(path), have, content))
    if missing:
        raise AgentBackupError(
            f"the approved content of {', '.join(missing)} of “{agent}” is nowhere to be had",
            hint="it was too large to keep, is a link, or was damaged; see `backup-worker restore --path`",
        )
    return RevertPlan(agent, files.root, tuple(steps))


def approved_content(repository: Repository, state: ApprovedState, path: str, sha256: str) -> bytes | None:
    """Return the approved bytes: as they are kept with the state, or from a snapshot that holds the same."""
    content = ApprovedStates(repository).content(state.agent, sha256)
    if content is not None:
        return content
    for head in reversed(repository.snapshots(state.agent)):
        try:
            entry = repository.get(head.id).by_path().get(path)
            if entry is None or entry.sha256 != sha256:
                continue
            with repository.files(head.id) as tree:
                content = tree.read_bytes(path)
        except (AgentBackupError, OSError):
            continue
        if hashlib.sha256(content).hexdigest() == sha256:
            return content
    return None


def execute(
    runtime: Runtime, agent: str, *, by: str, reason: str, now: float, while_running: bool = False
) -> dict[str, Any]:
    """Put the approved state back and return what was done, with the place of the evidence.

    Raises as `plan`, and AgentLives if the agent runs and `while_running` was not asked for.
    """
    with acting_on(agent, runtime.config.schedule.state) as held:
        if not held:
            raise AgentBackupError(
                f"a recovery of “{agent}” is at work", hint="wait for it: see `backup-worker incidents`"
            )
        found = restores.running(runtime.config, agent)
        if found and not while_running:
            raise restores.AgentLives(
                f"“{agent}” is running: {found[0]}",
                hint="stop it first; or, if it reads these files anew by itself, say --while-running",
            )
        wanted = plan(runtime, agent, now)
        evidence = None
        if wanted.steps:
            try:
                evidence = _keep(runtime, wanted, now)
                _replace(wanted)
            except OSError as error:
                raise from_os_error(f"putting the approved files of “{agent}” back", error) from error
    steps = [step.as_json() for step in wanted.steps]
    runtime.record(
        "revert", agent=agent, by=by, reason=reason, evidence=evidence, while_running=bool(found), files=steps
    )
    if runtime.client is not None and wanted.steps:
        # All is as approved: the watch closes its alerts, and takes back what it has proposed.
        guard.scan(runtime, agent, now)
    kept = str(evidence) if evidence else None
    return {"agent": agent, "files": steps, "evidence": kept, "running": bool(found)}


def _keep(runtime: Runtime, wanted: RevertPlan, now: float) -> Path:
    """Copy what stands at the paths that are going to change, and bring it to the disk; return where it is."""
    stamp = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
    parent = runtime.config.schedule.state / "evidence"
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    place, number = parent / f"revert-{wanted.agent}-{stamp}", 1
    while place.exists():
        number += 1
        place = parent / f"revert-{wanted.agent}-{stamp}-{number}"
    place.mkdir(mode=0o700)
    with Tree(wanted.root, follow=True) as old, Tree(place) as new:
        for step in wanted.steps:
            info = old.find(step.path)
            if info is not None:
                new.make_folders(step.path.rpartition("/")[0])
                copy_any(old, new, step.path, info)
        disk.sync_all(new.fd)
    disk.sync_folder(parent)
    return place


def _replace(wanted: RevertPlan) -> None:
    with Tree(wanted.root, follow=True) as tree:
        for step in wanted.steps:
            here = tree.find(step.path)
            if step.action == "remove":
                tree.remove(step.path)
                continue
            assert step.held is not None
            assert step.content is not None
            if here is not None and stat.S_ISDIR(here.st_mode):
                tree.remove(step.path)
            owner = here or tree.lstat(".")
            tree.make_folders(step.path.rpartition("/")[0])
            disk.replace_file(
                tree, step.path, step.content, mode=step.held.mode, owner=(owner.st_uid, owner.st_gid)
            )


def describe(found: Mapping[str, Any]) -> list[str]:
    """Return one line for each file of a plan or a result."""
    lines = []
    for step in found["files"]:
        why = {"first-seen": "as it was first seen; nobody has approved that"}.get(step["how"] or "")
        why = why or f"approved by {step['by'] or 'somebody'} with {step['change']}"
        what = "removed: it was never approved" if step["action"] == "remove" else why
        lines.append(f"{step['path']}: {what}")
    return lines
