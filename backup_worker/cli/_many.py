"""Backups and restores of many agents: in several processes, waiting for the disk together, recorded as they end.

An agent that fails does not touch the others. The results come in the order that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from em_bridge import clock
from em_bridge.errors import AgentBackupError
from em_bridge.terminal import fail

if TYPE_CHECKING:
    from pathlib import Path

    from backup_worker.history import History
    from backup_worker.snapshots import AgentFiles, Manifest, Repository, RestoreResult
    from backup_worker.snapshots.together import Outcome, Work

RECORD_AT_ONCE = 64
_DIED = {"error": "the process at work on it died", "hint": "is there enough memory? run it again"}


class RestoreJob(Protocol):
    """What `lay_down` needs to know about one restore."""

    @property
    def name(self) -> str:
        """The agent."""

    @property
    def target(self) -> Path:
        """Where it is restored to."""

    def work(self) -> Work[RestoreResult]:
        """Return the work that does it."""


def back_up(
    repo: Repository,
    history: History,
    agents: Sequence[AgentFiles],
    options: Callable[[float], dict[str, Any]],
    *,
    quiet: bool = False,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Back up `agents`, each with what `options` returns for its time, and record it: (rows made, failures).

    `quiet` shows no progress, also where there is a terminal.
    """
    from backup_worker.approval import standing
    from backup_worker.snapshots.take import taking

    def work(agent: AgentFiles) -> Work[dict[str, Any]]:
        now = clock.now()
        wanted = options(now)
        failed = {"agent": agent.name, "tier": wanted["tier"], "at": now}
        try:
            attest = standing.attest(repo, agent, wanted["include"])
            manifest = yield from taking(repo, agent, attest=attest, **wanted)
        except AgentBackupError as error:
            return failed | {"error": error.message, "hint": error.hint}
        return _row(manifest) | {"facts": _facts(manifest), "at": now}

    def line(result: dict[str, Any]) -> tuple[str, float, dict[str, Any]]:
        if "error" not in result:
            return "backup", result["at"], result["facts"]
        return "backup-failed", result["at"], {key: result[key] for key in ("agent", "tier", "error")}

    died = [{"agent": agent.name, "tier": options(0.0)["tier"], **_DIED} for agent in agents]
    works = [partial(work, agent) for agent in agents]
    results = _run(
        [agent.name for agent in agents], works, died, history, line, _progress("backing up", quiet)
    )
    for result in results:
        result.pop("facts", None)
        result.pop("at", None)
    return [r for r in results if "error" not in r], [r for r in results if "error" in r]


def lay_down(history: History, jobs: Sequence[RestoreJob], *, quiet: bool = False) -> list[dict[str, Any]]:
    """Carry out restores and record them; a result with `ok` False has its `error`. `quiet` as in `back_up`."""

    def work(job: RestoreJob) -> Work[dict[str, Any]]:
        try:
            result = yield from job.work()
        except AgentBackupError as error:
            return _unrestored(job, error.message, error.hint)
        return result.as_json()

    def line(result: dict[str, Any]) -> tuple[str, float, dict[str, Any]]:
        return "restore", clock.now(), {key: value for key, value in result.items() if key != "hint"}

    died = [_unrestored(job, _DIED["error"], _DIED["hint"]) for job in jobs]
    works = [partial(work, job) for job in jobs]
    results = _run([job.name for job in jobs], works, died, history, line, _progress("restoring", quiet))
    for result in results:
        hint = result.pop("hint", None)
        if not result["ok"]:
            fail(result["error"], hint=hint)
    return results


def _progress(
    what: str, quiet: bool
) -> Callable[[Iterable[tuple[int, Any]], int], Iterator[tuple[int, Any]]]:
    from backup_worker.cli._progress import counted

    return lambda items, total: counted(items, what, total, quiet=quiet)


def _unrestored(job: RestoreJob, error: str, hint: str | None) -> dict[str, Any]:
    nothing = {"from": [], "to": str(job.target), "files": 0, "bytes": 0, "evidence": None}
    return {"agent": job.name, **nothing, "ok": False, "error": error, "hint": hint}


def _run(
    names: Sequence[str],
    works: Sequence[Callable[[], Work[dict[str, Any]]]],
    died: Sequence[dict[str, Any]],
    history: History,
    line: Callable[[dict[str, Any]], tuple[str, float, dict[str, Any]]],
    progress: Callable[[Iterable[tuple[int, Any]], int], Iterator[tuple[int, Any]]],
) -> list[dict[str, Any]]:
    from backup_worker.snapshots.together import shared_out, together

    # Everybody takes the agents' locks in the order of their names: so no two can wait for each other.
    order = sorted(range(len(names)), key=lambda index: names[index].lower())

    def run(numbers: Iterator[int]) -> Iterator[tuple[int, Any]]:
        for outcome in together((number, works[order[number]]()) for number in numbers):
            yield outcome.index, _result_of(outcome)

    results: dict[int, dict[str, Any]] = {}
    waiting: list[tuple[str, float, dict[str, Any]]] = []
    try:
        for number, result in progress(shared_out(len(works), run), len(works)):
            index = order[number]
            results[index] = {"at": clock.now(), **died[index]} if result is None else result
            waiting.append(line(results[index]))
            if len(waiting) >= RECORD_AT_ONCE:
                history.extend(waiting)
                waiting = []
    finally:
        history.extend(waiting)
    return [results[index] for index in sorted(results)]


def _result_of(outcome: Outcome) -> Any:
    if outcome.error is not None:
        raise outcome.error
    return outcome.result


def _row(manifest: Manifest) -> dict[str, Any]:
    problems = [problem.as_json() for problem in manifest.problems]
    return manifest.as_row() | {"problems": problems, "warnings": list(manifest.warnings)}


def _facts(manifest: Manifest) -> dict[str, Any]:
    """Return what the record says about a backup, in the words that the worker uses too."""
    return {
        "id": manifest.id,
        "agent": manifest.agent,
        "tier": manifest.tier,
        "status": manifest.status,
        "files": manifest.files,
        "bytes": manifest.bytes,
        "reason": manifest.reason,
        "approved": manifest.approved,
        "problems": [problem.as_json() for problem in manifest.problems],
    }
