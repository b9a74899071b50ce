"""The rehearsal: restore an agent's newest good state for real, into a scratch folder, and check what came out.

A drill succeeds only if the state was restored, every file is as the manifests say, the required ones are there, JSON,
Python and databases are sound, and the agent's own health command, if it has one, exits 0 there in time. Whatever is in
the way makes it fail, with the reason. It touches neither the agent nor its files, holds up no backup and no recovery
of it, and leaves nothing behind: the scratch folder of a killed drill is removed by the next one.

When a restore was last proven stands in the repository's own bookkeeping: see `proofs`.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backup_worker.config import Config
from backup_worker.maintenance import rolling, scrub
from backup_worker.restoring import scratch
from backup_worker.restoring.health_command import Health, run_health
from backup_worker.restoring.proofs import Note, note_of, write_note
from backup_worker.runtime import Runtime
from backup_worker.snapshots import (
    AgentFiles,
    Entry,
    Head,
    Limits,
    NoSpace,
    Problem,
    Repository,
    RestorePlan,
    Scope,
    disk,
    execute,
    plan_restore,
)
from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.errors import from_os_error
from backup_worker.snapshots.sanity import judge
from backup_worker.snapshots.verify import unproven
from backup_worker.units import size
from em_bridge import clock
from em_bridge.errors import AgentBackupError, NotFound

FOLDER = "drills"
"""The scratch folders, below the state folder."""

RUN_S = 60.0
"""After how many seconds a scheduled run begins no further drill: other maintenance waits meanwhile."""

ARRIVING_S = 600.0
"""How long a new agent may take until each scheduled tier has a snapshot: one alone need not be a whole state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drill:
    """What a drill did. `sources`: the snapshots restored, newest first; `took_s` seconds."""

    agent: str
    at: float
    sources: tuple[str, ...] = ()
    files: int = 0
    bytes: int = 0
    took_s: float = 0.0
    problems: tuple[Problem, ...] = ()
    health: Health | None = None
    owners: bool = False
    """Whether owners were compared: only root can give files to others, so that only then they come back."""

    @property
    def ok(self) -> bool:
        """Whether the restore is proven."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """Return what `backup-worker drill --json` prints of one agent, and the record holds."""
        return {
            "agent": self.agent,
            "ok": self.ok,
            "from": list(self.sources),
            "files": self.files,
            "bytes": self.bytes,
            "took_s": round(self.took_s, 3),
            "problems": [problem.as_json() for problem in self.problems],
            "health": self.health.as_json() if self.health else None,
            "owners": self.owners,
        }


# -- one drill ---------------------------------------------------------------------------------------------


def run(runtime: Runtime, agent: str, now: float) -> Drill:
    """Drill `agent`, write down the result, and open or close its alerts. Raises NotFound for an unknown agent."""
    repo = runtime.repository
    done, damaged = rehearse(runtime.config, repo, agent, now=now)
    healed = [_is_healed(runtime, identifier, now) for identifier in damaged]
    if healed and all(healed):
        done, _ = rehearse(runtime.config, repo, agent, now=now)
    before = note_of(repo, agent)
    proven = (now, done.sources[0]) if done.ok else (before.proven_at, before.proven_from) if before else ()
    try:
        write_note(repo, agent, Note(now, done.ok, *proven))
    except OSError as error:
        why = from_os_error("writing down the result of the drill", error).message
        done = replace(done, problems=(*done.problems, Problem(".", why)))
    runtime.record("drill", **done.as_json())
    key = f"drill/{agent}"
    if done.ok:
        runtime.resolve(key)
        runtime.resolve(f"drill-overdue/{agent}")
    else:
        body = "; ".join(f"{one['path']}: {one['problem']}" for one in done.as_json()["problems"][:10])
        runtime.alert(key, "critical", f"restoring {agent} does not work", body, agent=agent)
    return done


def _is_healed(runtime: Runtime, identifier: str, now: float) -> bool:
    """Have the scrub look at a damaged snapshot at once: it heals, records and alerts."""
    try:
        return scrub.verify(runtime, identifier, now)
    except NotFound:
        return False  # pruned meanwhile


def rehearse(config: Config, repo: Repository, name: str, *, now: float) -> tuple[Drill, list[str]]:
    """Restore and check; return the drill, and the ids of snapshots that turned out to be damaged on the way.

    Raises NotFound for an agent that is not configured, and nothing else: what goes wrong is in the result.
    """
    agent, health = config.files_of(name), config.agent(name).health
    reserve_bytes = config.schedule.limits.reserve_bytes
    started = clock.monotonic()
    good = {head.id for head in repo.snapshots(name) if head.is_good}
    done = Drill(agent=name, at=now, owners=os.geteuid() == 0)
    problems: list[Problem] = []
    try:
        plan = plan_restore(repo, agent)
        done = replace(done, sources=plan.sources, files=plan.files, bytes=plan.bytes)
        with scratch.folder(config.schedule.state / FOLDER) as place:
            _check_space(plan, place, reserve_bytes)
            target = place / "root"
            # A name of its own, for a lock of its own: a drill must hold up no backup and no recovery of the agent.
            stand_in = replace(agent, name=f"drill-{name}"[:63])
            execute(replace(plan, agent=stand_in), target, evidence=None, now=now)
            problems += _examine(plan, agent, target)
            if health is not None:
                done = replace(done, health=run_health(health, target, name))
                problems += _health_problem(done.health)
    except AgentBackupError as error:
        problems.append(Problem(".", error.message))
    except OSError as error:
        problems.append(Problem(".", from_os_error("the drill", error).message))
    damaged = [head.id for head in repo.snapshots(name) if head.damaged and head.id in good]
    # An older state could be restored instead, perhaps; but the newest is lost, and that must be seen.
    problems += [Problem(".", f"snapshot “{identifier}” is damaged") for identifier in damaged]
    return replace(done, problems=tuple(problems), took_s=clock.monotonic() - started), damaged


def _check_space(plan: RestorePlan, place: Path, reserve_bytes: int) -> None:
    free = shutil.disk_usage(place).free - reserve_bytes
    if plan.bytes > free:
        raise NoSpace(
            f"the drill of “{plan.agent.name}” needs {size(plan.bytes)} below “{place.parent}”, "
            f"and {size(max(free, 0))} are free beyond the reserve"
        )


def _examine(plan: RestorePlan, agent: AgentFiles, target: Path) -> list[Problem]:
    """Compare what came out with the manifests, and judge it as a snapshot is judged."""
    wanted = {path: entry for path, entry in plan.by_path.items() if path != "."}
    with Tree(target) as tree:
        problems = list(_differences(tree, wanted, owners=os.geteuid() == 0))
        problems += [
            Problem(entry.path, "came back changed")
            for entry in unproven(tree, wanted.values())
            if tree.find(entry.path) is not None
        ]
        differing = {problem.path for problem in problems}
        whole = {path: entry for path, entry in wanted.items() if path not in differing}
        doubts = judge(agent, Scope(("**",)), tree, whole, None, Limits())
    return problems + [doubt for doubt in doubts if doubt.path not in differing]


def _differences(tree: Tree, wanted: Mapping[str, Entry], *, owners: bool) -> Iterator[Problem]:
    missing = dict(wanted)
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "link"}
    for path, info in disk.walk(tree):
        entry = missing.pop(path, None)
        if entry is None:
            yield Problem(path, "is in no snapshot")
            continue
        if owners and (info.st_uid, info.st_gid) != (entry.uid, entry.gid):
            yield Problem(path, f"belongs to {info.st_uid}:{info.st_gid}, not {entry.uid}:{entry.gid}")
        if kinds.get(stat.S_IFMT(info.st_mode)) != entry.kind:
            yield Problem(path, f"is no {entry.kind}")
        elif entry.kind == "link":
            folder, name = tree.at(path)
            if os.readlink(name, dir_fd=folder) != entry.target:
                yield Problem(path, "points elsewhere")
        elif stat.S_IMODE(info.st_mode) != entry.mode:
            yield Problem(path, f"has the mode {stat.S_IMODE(info.st_mode):04o}, not {entry.mode:04o}")
        elif entry.kind == "file" and info.st_mtime_ns != entry.mtime_ns:
            yield Problem(path, "has another time of modification")
    for path in missing:
        yield Problem(path, "is missing")


def _health_problem(health: Health | None) -> list[Problem]:
    if health is None or health.ok:
        return []
    what = "did not end in time" if health.exit_code is None else f"exited with {health.exit_code}"
    last = health.output.strip().rpartition("\n")[2]
    return [Problem(".", f"the health command {what}" + (f": {last}" if last else ""))]


# -- all agents --------------------------------------------------------------------------------------------


def plan(config: Config, repo: Repository, heads: Sequence[Head], *, now: float, every_s: float) -> list[str]:
    """Return the agents to drill in a run at `now`, if there is a run every `every_s` seconds.

    `heads` are all snapshots, oldest first. Agents without any are left out: that they have none alerts elsewhere.
    """
    period_s = config.schedule.drill.days * 86400
    first, newest = _first_and_newest(heads)
    items = []
    for agent in config.agents.keys() & first.keys():
        note = note_of(repo, agent)
        if note is None:
            if _is_arriving(config, heads, agent, now):
                continue
            items.append(rolling.Item(agent, first[agent], period_s * rolling.SPREAD))
        elif note.ok:
            items.append(rolling.after_success(agent, note.tried_at, period_s))
        else:
            again = rolling.after_failure(agent, note.tried_at, period_s)
            # A newer snapshot may be what mends it.
            sooner = newest[agent] if newest[agent] > note.tried_at else again.due_at
            items.append(replace(again, due_at=min(again.due_at, sooner)))
    return rolling.choose(items, now=now, every_s=every_s)


def _is_arriving(config: Config, heads: Sequence[Head], agent: str, now: float) -> bool:
    """Tell whether a new agent's first round of snapshots, one in each scheduled tier, is still being made."""
    mine = [head for head in heads if head.agent == agent]
    scheduled_tiers = {name for name, tier in config.schedule.tiers.items() if tier.cron}
    return bool(scheduled_tiers - {head.tier for head in mine}) and now - mine[0].created_at < ARRIVING_S


def scheduled(runtime: Runtime, now: float, *, every_s: float) -> dict[str, Any]:
    """Drill the share of one run; return the agents that were `drilled`, and those that `failed`."""
    started = clock.monotonic()
    drilled, failed = [], []
    heads = runtime.repository.snapshots()
    for agent in plan(runtime.config, runtime.repository, heads, now=now, every_s=every_s):
        if clock.monotonic() - started > RUN_S:
            break
        drilled.append(agent)
        if not run(runtime, agent, now).ok:
            failed.append(agent)
    return {"drilled": drilled, "failed": failed}


def overdue(config: Config, repo: Repository, heads: Sequence[Head], now: float) -> dict[str, float | None]:
    """Return agent -> when a restore was last proven (None: never), of those where that is too long ago.

    An agent that was never drilled has its time from its first snapshot.
    """
    limit_s = config.schedule.drill.days * 86400
    first, _ = _first_and_newest(heads)
    late: dict[str, float | None] = {}
    for agent in config.agents:
        if agent in first:
            note = note_of(repo, agent)
            proven_at = note.proven_at if note else None
            if now - (first[agent] if proven_at is None else proven_at) > limit_s:
                late[agent] = proven_at
    return late


def tell_of_overdue(runtime: Runtime, heads: Sequence[Head], now: float) -> list[str]:
    """Open or close each agent's alert that its last proven restore is too old; return the agents."""
    late = overdue(runtime.config, runtime.repository, heads, now)
    days = runtime.config.schedule.drill.days
    for agent in runtime.config.agents:
        key = f"drill-overdue/{agent}"
        if agent not in late:
            runtime.resolve(key)
            continue
        proven_at = late[agent]
        last = "never" if proven_at is None else f"{(now - proven_at) / 86400:.1f} days ago"
        body = f"a restore was last proven {last}, and should be every {days:g} days"
        runtime.alert(key, "warning", f"restoring {agent} was not proven in time", body, agent=agent)
    return list(late)


def _first_and_newest(heads: Sequence[Head]) -> tuple[dict[str, float], dict[str, float]]:
    first: dict[str, float] = {}
    newest: dict[str, float] = {}
    for head in heads:
        first.setdefault(head.agent, head.created_at)
        newest[head.agent] = head.created_at
    return first, newest
