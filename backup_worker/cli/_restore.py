"""The command `restore`: plan every agent first, refuse what must not be, then carry out agent by agent."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zoneinfo import ZoneInfo

import typer

from backup_worker.cli import _completion
from backup_worker.cli._common import opened
from backup_worker.units import counted
from em_bridge.errors import AgentBackupError, UsageError
from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, emit, fail

if TYPE_CHECKING:
    from backup_worker.config import Config
    from backup_worker.snapshots import RestorePlan


AgentsArgument = Annotated[
    list[str],
    typer.Argument(metavar="AGENT...", help="The agents to restore.", autocompletion=_completion.agents),
]
FromOption = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="ID", help="Exactly this snapshot, even a suspect one.",
        autocompletion=_completion.snapshots,
    ),
]  # fmt: skip
AsOfOption = Annotated[
    str | None,
    typer.Option(
        "--as-of", metavar="TIME",
        help="The state of that time: 2026-11-23T07:00 (the schedule's zone), a day (its end), or Unix seconds.",
    ),
]  # fmt: skip
ToOption = Annotated[
    Path | None,
    typer.Option("--to", metavar="DIR", help="Into this empty or new folder, not the agent's root."),
]
PathOption = Annotated[
    list[str] | None,
    typer.Option("--path", metavar="P", help="Only this path or pattern; may be repeated."),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would change, and be lost.")]


def restore(
    agents: AgentsArgument,
    from_id: FromOption = None,
    as_of: AsOfOption = None,
    to: ToOption = None,
    paths: PathOption = None,
    dry_run: DryRunOption = False,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Bring an agent's files back: staged, proven, then swapped in as a whole. What stood there is kept as evidence.

    Example: `backup-worker restore z --as-of 2026-11-22 --dry-run`
    """
    from backup_worker.cli._many import lay_down
    from backup_worker.restoring.restores import Restore

    settings, repo, history = opened(config)
    names = list(dict.fromkeys(agents))
    if from_id is not None and as_of is not None:
        raise UsageError("--from and --as-of exclude each other")
    if from_id is not None and len(names) > 1:
        raise UsageError(
            "--from names one agent's snapshot", hint="restore the agents one by one, or use --as-of"
        )
    moment = parse_time(as_of, settings.schedule.timezone) if as_of is not None else None
    jobs = [
        Restore(settings, repo, name, _target(settings, name, to, several=len(names) > 1), to is None, moment,
                from_id, tuple(paths or ()), _passed_over)
        for name in names
    ]  # fmt: skip
    if dry_run:
        results = [_describe(job.plan(), job.target) for job in jobs]
    else:
        # Whatever one of them lacks is known before the first one is touched.
        for job in jobs:
            job.check()
        results = lay_down(history, jobs, quiet=as_json)
    emit(results, as_json=as_json, render=_print)
    if not all(result["ok"] for result in results):
        raise typer.Exit(1)


def parse_time(text: str, zone: str) -> float:
    """Return Unix seconds for `--as-of`. Raises UsageError."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        hint = "for example 2026-11-23T07:00, 2026-11-23, 2026-11-23T07:00+01:00 or 1795440804"
        raise UsageError(f"“{text}” is not a time", hint=hint) from error
    if len(text) == len("2026-11-23"):
        moment += datetime.timedelta(days=1, microseconds=-1)
    return (moment if moment.tzinfo else moment.replace(tzinfo=ZoneInfo(zone))).timestamp()


def _target(config: Config, name: str, to: Path | None, *, several: bool) -> Path:
    if to is None:
        return config.agent(name).root
    return to / name if several else to


def _passed_over(error: AgentBackupError) -> None:
    fail(error.message, hint="the next older state is taken")


def _describe(plan: RestorePlan, target: Path) -> dict[str, Any]:
    from backup_worker.snapshots import compare
    from backup_worker.snapshots.errors import printable

    changes = compare(plan, target)
    result: dict[str, Any] = {"agent": plan.agent.name, "from": list(plan.sources), "to": str(target)}
    result |= {"files": plan.files, "bytes": plan.bytes, "evidence": None, "ok": True, "dry_run": True}
    for kind in ("added", "changed", "removed", "lost"):
        result[kind] = [printable(path) for path in getattr(changes, kind)]
    return result


def _print(results: list[dict[str, Any]]) -> None:
    from backup_worker.cli._common import size

    for result in results:
        sources = ", ".join(result["from"])
        if "dry_run" in result:
            typer.echo(f"{result['agent']}: would restore {sources} to {result['to']}")
            for mark, kind in (("+", "added"), ("~", "changed"), ("-", "removed")):
                for path in result[kind]:
                    typer.echo(f"  {mark} {path}")
            for path in result["lost"]:
                typer.echo(
                    f"  ! {path}: what is there now is in no newest backup; only the evidence would hold it"
                )
            if not (result["added"] or result["changed"] or result["removed"]):
                typer.echo("  nothing to do: the files are in that state")
        elif result["ok"]:
            typer.echo(
                f"{result['agent']}: {counted(result['files'], 'file')}, {size(result['bytes'])} from {sources}"
            )
            typer.echo(f"  to {result['to']}")
            if result["evidence"]:
                typer.echo(f"  what stood there is in {result['evidence']}")
