"""One agent's restore, as a command or a person in the console asks for it: plan, refuse what must not be, carry out.

A living agent is never overwritten: its process is looked for before and again under the lock that recoveries take,
and where nobody can say whether it runs, nothing is changed.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from backup_worker.recovery.adapters import adapter_for
from backup_worker.recovery.locks import acting_on
from backup_worker.recovery.processes import find
from backup_worker.snapshots import DamagedSnapshot, good_heads, plan_restore, restoring
from em_bridge import clock
from em_bridge.errors import AgentBackupError, UsageError

if TYPE_CHECKING:
    from backup_worker.config import Config
    from backup_worker.recovery.processes import Running
    from backup_worker.snapshots import Repository, RestorePlan, RestoreResult
    from backup_worker.snapshots.together import Work


class AgentLives(AgentBackupError):
    """The agent runs, so its files are not touched."""


def running(config: Config, name: str) -> list[Running]:
    """Return the living processes of an agent. Raises AgentBackupError if nobody can say whether there are any."""
    agent, state = config.agent(name), config.schedule.state
    if agent.start is None:
        return find(name, agent.root, state=state)
    return adapter_for(name, agent, state).running()


@dataclass(frozen=True)
class Restore:
    """The restore of one agent: where to, and of which state."""

    config: Config
    repo: Repository
    name: str
    target: Path
    in_place: bool
    as_of: float | None
    from_id: str | None
    paths: tuple[str, ...]
    say: Callable[[AgentBackupError], None]
    """Is told why the newest state is passed over, while an older one is tried."""

    def plan(self, *, proven: bool = True) -> RestorePlan:
        """Plan it now; raises as `plan_restore`."""
        return plan_restore(
            self.repo, self.config.files_of(self.name), as_of=self.as_of, from_id=self.from_id, paths=self.paths,
            proven=proven,
        )  # fmt: skip

    def check(self) -> None:
        """Refuse what has no state, what would write over a living agent, or into a folder with something else."""
        if self.from_id is None and not self.paths:
            # Only whether there is a state: which it is shows when it is this agent's turn.
            good_heads(self.repo, self.name, self.as_of)
        else:
            self.plan(proven=False)
        if self.in_place:
            self.refuse_living()
        elif self.target.is_dir() and any(self.target.iterdir()):
            raise UsageError(
                f"“{self.target}” is not empty", hint="restore into a new folder, and copy from there"
            )

    def refuse_living(self) -> None:
        """Raise AgentLives if a process of the agent is alive, AgentBackupError if nobody can say whether one is."""
        if found := running(self.config, self.name):
            raise AgentLives(
                f"“{self.name}” is running: {found[0]}; a living agent is never overwritten",
                hint=f"stop it first, or let `backup-worker recover {self.name}` do it all, "
                "or restore elsewhere with --to DIR",
            )

    def work(self) -> Work[RestoreResult]:
        """Carry out while no recovery can start the agent; it may have been started since the first look."""
        if not self.in_place:
            return (yield from self._restored(None))
        with acting_on(self.name, self.config.schedule.state) as held:
            if not held:
                raise AgentBackupError(
                    f"a recovery of “{self.name}” is at work",
                    hint="wait for it: see `backup-worker incidents`; or restore elsewhere with --to DIR",
                )
            self.refuse_living()
            stamp = datetime.datetime.fromtimestamp(clock.now(), datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
            name = f"restore-{self.name}-{stamp}"
            return (yield from self._restored(self.config.schedule.state / "evidence" / name))

    def _restored(self, evidence: Path | None) -> Work[RestoreResult]:
        while True:
            # Not read beforehand: what is laid down is read back and compared, and that finds damage too.
            plan = self.plan(proven=self.from_id is not None)
            try:
                return (yield from restoring(plan, self.target, evidence=evidence, now=clock.now()))
            except DamagedSnapshot as error:
                if self.from_id is not None:
                    raise
                self.say(error)
