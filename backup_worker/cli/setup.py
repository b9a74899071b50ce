"""Commands that set a machine up: init, doctor."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backup_worker.units import counted
from em_bridge import clock
from em_bridge.errors import ConfigError, NotFound, UsageError
from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, RedisUrlOption, emit, fail

if TYPE_CHECKING:
    from collections.abc import Mapping

    from backup_worker.discovery.fleet import Survey
    from backup_worker.discovery.fleet_files import Found


def add_commands(app: typer.Typer) -> None:
    """Add this group's commands to `app`."""
    app.command()(init)
    app.command()(doctor)


def init(
    directory: Annotated[
        Path, typer.Argument(metavar="[DIR]", envvar="BACKUP_CONFIG", help="Folder to write into.")
    ] = DEFAULT_CONFIG,
    fleet: Annotated[
        Path | None,
        typer.Option("--from", metavar="FLEET", help="Protect every folder with a SOUL.md below this one."),
    ] = None,
    add: Annotated[
        bool,
        typer.Option(
            "--add", help="With --from: add the agents that agents.json lacks; change nothing else."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a starting configuration: backup_schedule.json, agents.json and their schemas for editors.

    With `--from`, an existing fleet comes under protection: each folder with a SOUL.md becomes an agent, its files
    sorted by their usual names; what looks like one and is not taken is named. Nothing in the fleet is changed. When
    the fleet has grown, `--add` adds what is new to the configuration, and leaves what you have edited as it is.

    Example: `backup-worker init --from ~/agents && backup-worker backup --tier weekly`
    """
    from backup_worker.discovery import starter

    if add and (fleet is None or force):
        raise UsageError(
            "--add goes with --from, and without --force",
            hint="name the folder that holds the agents with --from",
        )
    survey = _discover(fleet, directory, _known(directory) if add else {}) if fleet is not None else None
    found = survey.agents if survey is not None else []
    if add:
        files = starter.with_more(directory, found, os.environ) if found else {}
    else:
        files = starter.contents(directory, found, starter.machine_zone(os.environ))
    written = starter.write(directory, files, force=force or add)
    result = {
        "written": [str(path) for path in written],
        "agents": [one.as_json() for one in found],
        "passed_over": [one.as_json() for one in survey.passed_over] if survey is not None else [],
    }
    emit(result, as_json=as_json, render=lambda _: _print_init(directory, written, survey, fleet))


def doctor(
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    test_alert: Annotated[
        bool, typer.Option("--test-alert", help="Send a real test message to every receiver of alerts.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check the set-up, and say how to mend what is wrong. Exit 1 if anything fails.

    Example: `backup-worker doctor --test-alert`
    """
    from backup_worker.doctor import examine

    checks = examine(config, redis_url, now=clock.now(), test_alert=test_alert)
    rows = [
        {"check": one.check, "status": one.status, "detail": one.detail, "mend": one.mend} for one in checks
    ]
    emit(rows, as_json=as_json, render=_print_checks)
    if any(one.status == "fail" for one in checks):
        raise typer.Exit(1)


def _known(directory: Path) -> dict[str, Path]:
    """Return the roots of the agents that the configuration holds. Raises `ConfigError`."""
    from backup_worker.config import load

    return {name: agent.root for name, agent in load(directory).agents.items()}


def _discover(fleet: Path, directory: Path, known: Mapping[str, Path]) -> Survey:
    from backup_worker.discovery.fleet import discover

    if not fleet.is_dir():
        raise UsageError(
            f"there is no folder “{fleet}”", hint="--from takes the folder that holds the agents"
        )
    survey = discover(Path(os.path.abspath(fleet)), _ours(directory), known)
    if not survey.agents and not known:
        for one in survey.passed_over:
            fail(f"{one.path} {one.why}")
        raise NotFound(
            f"there is no folder with a SOUL.md below “{fleet}”",
            hint="name the folder that holds the agents, or run `backup-worker init` and edit agents.json",
        )
    return survey


def _ours(directory: Path) -> list[Path]:
    """Return where an earlier configuration in `directory` keeps its snapshots and evidence."""
    from backup_worker.config import load

    try:
        schedule = load(directory).schedule
    except ConfigError:
        return []
    return [schedule.repository, schedule.state]


def _print_init(directory: Path, written: list[Path], survey: Survey | None, fleet: Path | None) -> None:
    if survey is not None and fleet is not None:
        _print_survey(survey, Path(os.path.abspath(fleet)))
    if not written:
        typer.echo(f"nothing to add: {directory / 'agents.json'} has every agent that was found")
        return
    typer.echo(f"written into {directory}: {', '.join(path.name for path in written)}")
    typer.echo("\nNext:")
    option = "" if directory == DEFAULT_CONFIG else f" --config {directory}"
    steps = [
        f"look through {directory / 'agents.json'}; an editor that knows JSON Schema explains every key",
        f"backup-worker backup --tier weekly{option}     # the first backup, at once",
        f"backup-worker doctor{option}                   # what is still missing",
    ]
    if survey is not None:
        steps.append(_how_to_start(survey.agents))
        if not any(one.agent == "em" for one in survey.agents):
            steps.append(
                "no execution manager was found: to have deaths noticed, add an agent “em” with a folder of its own\n"
                '     and "start": {"command": ["em-bridge", "em"]}, unless a program of yours publishes them'
            )
    for number, step in enumerate(steps, 1):
        typer.echo(f"  {number}. {step}")


def _print_survey(survey: Survey, fleet: Path) -> None:
    from backup_worker.cli._common import new_table, show, size

    table = new_table("", "agent", "files found", "size", "required", f"folder in {fleet}")
    for one in survey.agents:
        counts = ", ".join(f"{count} {kind}" for kind, count in one.counts.items() if count)
        table.add_row(
            one.agent, counts, size(one.bytes), ", ".join(one.required), str(one.root.relative_to(fleet))
        )
    show(table)
    for one in survey.agents:
        for remark in one.remarks:
            show(f"{one.agent}: {remark}")
    for passed in survey.passed_over:
        show(f"not taken: {passed.path}: {passed.why}")
    if survey.passed_over or any(one.remarks for one in survey.agents):
        typer.echo()


def _how_to_start(found: list[Found]) -> str:
    """Say what is missing for recoveries, with an example of this fleet if there is a likely one."""
    likely = next((one for one in found if one.program is not None), None)
    name, program = (likely.agent, likely.program or "") if likely else ("NAME", "agent.py")
    interpreter = {".py": "python3", ".sh": "sh", ".js": "node"}[Path(program).suffix]
    such = f", such as {name}'s" if likely else ""
    start = json.dumps({"command": ["em-bridge", "run", name, "--", interpreter, program]})
    return (
        'then give each agent its "start", and "depends_on" where order matters: neither can be seen from files.\n'
        "     Until then it is backed up and can be restored, but not be started again after a death. For a program\n"
        f'     that knows nothing of this{such}: "start": {start}'
    )


def _print_checks(rows: list[dict[str, Any]]) -> None:
    marks = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "red")}
    width = max(len(row["check"]) for row in rows)
    for row in rows:
        mark, colour = marks[row["status"]]
        typer.echo(f"{typer.style(mark, fg=colour)}  {row['check']:<{width}} {row['detail']}")
        if row["mend"] and row["status"] != "ok":
            typer.echo(f"{'':<{width + 7}}→ {row['mend']}")
    failed = sum(row["status"] == "fail" for row in rows)
    warned = sum(row["status"] == "warn" for row in rows)
    typer.echo(f"\n{counted(len(rows), 'check')}: {failed} failed, {warned} to look at")
