"""Which state an agent is brought back to: the snapshot engine, as recovery sees it."""

from __future__ import annotations

import logging
import stat
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from backup_worker.approval.changes import Change
from backup_worker.config import Config
from backup_worker.recovery.incident import Missed
from backup_worker.recovery.loss import Loss, missed_changes
from backup_worker.snapshots import (
    AgentFiles,
    Entry,
    Limits,
    Repository,
    RestorePlan,
    RestoreResult,
    compare,
    execute,
    finish_interrupted,
    plan_restore,
)
from backup_worker.snapshots.disk import Tree, walk
from backup_worker.snapshots.sanity import judge
from em_bridge import clock
from em_bridge.errors import AgentBackupError, NotFound

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class States:
    """The states of every agent: those in the repository, and the one on disk."""

    config: Config
    repository: Repository

    def choose(self, agent: str, *, as_of: float, exclude: Collection[str]) -> RestorePlan:
        """Return the newest good state as of `as_of` (Unix seconds) that is none of `exclude`, proven just now.

        A state of some classes of files alone is passed over, if it would leave the root without what is required.
        Raises NotFound if there is none.
        """
        files = self.config.files_of(agent)
        passed_over = set(exclude)
        lacks = ""
        while True:
            try:
                plan = plan_restore(self.repository, files, as_of=as_of, exclude_states=passed_over)
            except NotFound as none:
                raise (NotFound(f"{none.message}; {lacks}", hint=none.hint) if lacks else none) from None
            lacking = [path for path in plan.missing_required if not _is_there(files.root / path)]
            if not lacking:
                return plan
            lacks = f"{plan.state} does not hold “{lacking[0]}”, which is required, and neither does the disk"
            passed_over.add(plan.state)

    def restore(
        self, agent: str, *, as_of: float, exclude: Collection[str], evidence: Path
    ) -> tuple[RestoreResult, RestorePlan]:
        """Lay that state down in the agent's root; what stood there is kept in the folder `evidence` first.

        Raises NotFound if there is none, SnapshotError or NoSpace if it cannot be laid down (nothing has changed).
        """
        plan = self.choose(agent, as_of=as_of, exclude=exclude)
        result = execute(plan, self.config.agent(agent).root, evidence=evidence, now=clock.now())
        return result, plan

    def put_back(self, agent: str, change: Missed, *, evidence: Path) -> str:
        """Lay the paths of an approved change into the agent's root, as the snapshot that was made of it holds them.

        Returns what is in the way, empty if it is done. What stood there is kept in the folder `evidence`.
        """
        if not (change.snapshot and change.paths):
            return "there is no snapshot of it"
        files = self.config.files_of(agent)
        try:
            plan = plan_restore(self.repository, files, from_id=change.snapshot, paths=change.paths)
            execute(plan, files.root, evidence=evidence, now=clock.now())
        except (AgentBackupError, OSError) as error:
            return str(error)
        return ""

    def loss(
        self, plan: RestorePlan, kept: Path | None, known: Iterable[Change], *, stood: bool, until: float
    ) -> Loss:
        """Return what the restore of `plan` has cost, against the tree `kept` that stood there at the death.

        Without `kept`, `stood` tells whether the state stood there already, or no root did. Never fails: what cannot
        be found out is said to be unknown.
        """
        try:
            heads = self.repository.snapshots(plan.agent.name)
            state_at = next((head.created_at for head in heads if head.id == plan.state), None)
            lost = compare(plan, kept).lost if kept is not None else () if stood else None
            return Loss(state_at, lost, missed_changes(plan, heads, known, until=until))
        except (AgentBackupError, OSError) as error:
            log.error("what %s has lost cannot be found out: %s", plan.agent.name, error)
            return Loss(None, None)

    def problems_on_disk(self, agent: str) -> list[str]:
        """Return why the files in the agent's root cannot be trusted as they are; empty if they look sane."""
        files = self.config.files_of(agent)
        try:
            # A restore that was killed left the old or the new tree, or, inside a mount point, something in between.
            finish_interrupted(files.root)
            if not files.root.is_dir():
                return [f"{files.root} is not a folder"]
            return _judged(files)
        except (AgentBackupError, OSError) as error:
            return [f"{files.root} cannot be judged: {error}"]


def _is_there(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _judged(files: AgentFiles) -> list[str]:
    scope = files.scope(["*"])
    with Tree(files.root, follow=True) as tree:
        entries = {
            path: Entry(path, kind, info.st_size, stat.S_IMODE(info.st_mode), info.st_mtime_ns)
            for path, info in walk(tree)
            if scope.covers(path) and (kind := _kind(info.st_mode)) is not None
        }
        found = judge(files, scope, tree, entries, None, Limits(shrink=None))
    return [f"{problem.path} {problem.problem}" for problem in found]


def _kind(mode: int) -> Literal["file", "dir", "link"] | None:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "dir"
    return "link" if stat.S_ISLNK(mode) else None
