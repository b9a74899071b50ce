"""Restore a state into a folder: stage, prove, keep evidence, swap.

All or nothing. What stands at the target is kept as evidence before anything changes, and where that is not possible
the restore refuses. What the state says nothing about (excluded paths such as virtual environments, caches and the
agent's outbox, and paths that no snapshot covers) is carried over. A killed restore leaves the old or the new tree;
the next one, or `finish_interrupted`, finishes or undoes it.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backup_worker.snapshots import swap
from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.errors import DamagedSnapshot, SnapshotError, from_os_error, printable
from backup_worker.snapshots.evidence import keeping
from backup_worker.snapshots.exact_copy import dress
from backup_worker.snapshots.manifest import Entry
from backup_worker.snapshots.staging import carry_over, stage, stays_readable
from backup_worker.snapshots.state import RestorePlan, compare
from backup_worker.snapshots.together import Sync, Work, alone, weight
from backup_worker.snapshots.verify import unproven
from em_bridge.errors import UsageError


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """What a restore did. `evidence`: where the tree that stood there before is kept, if there was one."""

    agent: str
    sources: tuple[str, ...]
    target: Path
    files: int
    bytes: int
    evidence: Path | None

    def as_json(self) -> dict[str, Any]:
        """Return the keys that `backup-worker restore --json` promises."""
        return {
            "agent": self.agent,
            "from": list(self.sources),
            "to": str(self.target),
            "files": self.files,
            "bytes": self.bytes,
            "evidence": str(self.evidence) if self.evidence else None,
            "ok": True,
        }


def execute(plan: RestorePlan, target: Path, *, evidence: Path | None, now: float) -> RestoreResult:
    """Make `target` hold the planned state and return what was done.

    `evidence` is the folder that what stands there now is copied to; it is made, with `-2` and so on if it is taken.
    None is only accepted where nothing would be lost. A target that holds the state already is left alone. The caller
    has proven that no process of the agent is alive. Raises DamagedSnapshot (plan again), SnapshotError, NoSpace,
    UsageError; the target is then as it was.
    """
    return alone(restoring(plan, target, evidence=evidence, now=now))


def restoring(plan: RestorePlan, target: Path, *, evidence: Path | None, now: float) -> Work[RestoreResult]:
    """As `execute`, as a work that can share its waits for the disk with others, of other agents."""
    target = Path(os.path.realpath(target))
    doing = f"restoring “{plan.agent.name}” into “{target}”"
    _check_target(plan, target, evidence)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with plan.repo.lock(f"tree.{plan.agent.name.lower()}"), plan.repo.hold(plan.sources):
            swap.finish_interrupted(target)
            changes = compare(plan, target)
            if target.is_dir() and not (changes.added or changes.changed or changes.removed):
                with Tree(target) as tree:
                    dress(tree, (piece.entry for piece in plan.pieces))
                kept = evidence if evidence is not None and evidence.is_dir() else None
                return _result(plan, target, kept)
            if evidence is None and (changes.changed or changes.removed):
                raise UsageError(f"“{target}” is not empty, and there is no place to keep what stands there")
            kept = yield from _Replacing(plan, target, evidence, now).run()
    except OSError as error:
        raise from_os_error(doing, error) from error
    return _result(plan, target, kept)


def _result(plan: RestorePlan, target: Path, evidence: Path | None) -> RestoreResult:
    return RestoreResult(plan.agent.name, plan.sources, target, plan.files, plan.bytes, evidence)


def _check_target(plan: RestorePlan, target: Path, evidence: Path | None) -> None:
    store = plan.repo.root.resolve()
    if target == store or store in target.parents or target in store.parents:
        raise UsageError(
            f"“{target}” and the repository “{store}” lie within each other", hint="choose another folder"
        )
    if evidence is not None and target in (evidence.resolve(), *evidence.resolve().parents):
        raise UsageError(f"the evidence “{evidence}” would lie in “{target}”, which is replaced")
    if os.path.lexists(target) and not target.is_dir():
        raise UsageError(f"“{target}” is not a folder", hint="choose another folder")


class _Replacing:
    """One replacement of a tree, step by step."""

    def __init__(self, plan: RestorePlan, target: Path, evidence: Path | None, now: float) -> None:
        self.plan, self.target, self.evidence, self.now = plan, target, evidence, now
        self.kept: Path | None = None

    def run(self) -> Work[Path | None]:
        workshop = swap.choose(self.target)
        try:
            try:
                yield from self._replace(workshop)
            except swap.CannotExchange:
                workshop = swap.inside(self.target)
                yield from self._replace(workshop)
        except BaseException:
            if self.kept is not None and not swap.is_pending(workshop):
                # Nothing was changed: what stands there is not evidence of anything.
                with contextlib.suppress(OSError), Tree(self.kept.parent) as parent:
                    parent.remove(self.kept.name)
            raise
        root = self.plan.by_path.get(".")
        if root is not None and (workshop.inside or not root.mode & 0o200):
            os.chmod(self.target, root.mode)
            os.utime(self.target, ns=(root.mtime_ns, root.mtime_ns))
        return self.kept

    def _replace(self, workshop: swap.Workshop) -> Work[None]:
        with Tree(workshop.path.parent) as around, swap.opened(workshop):
            with Tree(workshop.tree) as staged:
                entries = stage(self.plan, staged)
                folders: list[Entry] = []
                if self.target.is_dir():
                    with Tree(self.target) as old:
                        folders, blocked = carry_over(self.plan, old, staged)
                    if self.evidence is not None and self.kept is None:
                        self.kept = yield from keeping(
                            self.plan.agent, self.target, self.evidence, also=blocked
                        )
                privileged = os.geteuid() == 0
                # Who is not root may not move a folder that may not be written: the root gets that mode in its place.
                undressed = [
                    entry if privileged or entry.path != "." or workshop.inside
                    else entry._replace(mode=entry.mode | 0o200)
                    for entry in (*entries, *folders)
                ]  # fmt: skip
                dress(staged, (entry for entry in undressed if stays_readable(entry, privileged)))
                yield Sync(staged.fd, weight=weight(len(self.plan.pieces), self.plan.bytes))
                self._prove(staged)
                if secret := [entry for entry in undressed if not stays_readable(entry, privileged)]:
                    dress(staged, secret)
                    yield Sync(staged.fd)
            # Reading and building are over: nothing from here on needs space, or the right to read.
            swap.swap(workshop)
            yield Sync(around.fd)

    def _prove(self, staged: Tree) -> None:
        bad = unproven(staged, (piece.entry for piece in self.plan.pieces))
        if bad:
            self._blame_source(bad[0])
            where = printable(bad[0].path)
            raise SnapshotError(
                f"restoring “{self.plan.agent.name}” failed: “{where}” came back from the disk changed",
                hint="check the disk and the memory of this machine; the target is as it was",
            )

    def _blame_source(self, entry: Entry) -> None:
        """Raise DamagedSnapshot if not the copy, but what was copied is not what it should be."""
        source = next(piece.source for piece in self.plan.pieces if piece.entry is entry)
        with self.plan.repo.files(source) as files:
            if not unproven(files, [entry]):
                return
        self.plan.repo.record_verified(source, now=self.now, ok=False)
        raise DamagedSnapshot(
            f"snapshot “{source}” is damaged: “{printable(entry.path)}” changed; nothing was restored",
            hint="run the restore again: it chooses another snapshot",
        )
