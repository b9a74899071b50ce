"""The command `revert`: the last approved weights, rules and charter of an agent, put back."""

from __future__ import annotations

import getpass
from typing import Annotated, Any

import typer

from backup_worker.cli import _completion
from em_bridge import clock
from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, RedisUrlOption, emit


def add_commands(app: typer.Typer) -> None:
    """Add this group's command to `app`."""
    app.command()(revert)


def revert(
    agent: Annotated[
        str, typer.Argument(metavar="AGENT", help="The agent.", autocompletion=_completion.agents)
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be put back.")] = False,
    while_running: Annotated[
        bool,
        typer.Option(
            "--while-running",
            help="Also if the agent runs: each file is replaced in one step, and the agent has to read it anew.",
        ),
    ] = False,
    by: Annotated[
        str | None, typer.Option("--by", metavar="WHO", help="Who does it; default: who is logged in.")
    ] = None,
    reason: Annotated[str, typer.Option("--reason", help="Why, for the record.")] = "",
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put the last approved state of an agent's guarded files back; what stood there is kept as evidence.

    Example: `backup-worker revert z --dry-run`
    """
    from backup_worker.cli._common import try_runtime
    from backup_worker.restoring import revert as reverting

    runtime, _ = try_runtime(config, redis_url)
    if dry_run:
        wanted = reverting.plan(runtime, agent, clock.now())
        files = [step.as_json() for step in wanted.steps]
        result: dict[str, Any] = {"agent": agent, "files": files, "evidence": None, "dry_run": True}
    else:
        result = reverting.execute(
            runtime,
            agent,
            by=by or getpass.getuser(),
            reason=reason,
            now=clock.now(),
            while_running=while_running,
        )
    emit(result, as_json=as_json, render=_print)


def _print(result: dict[str, Any]) -> None:
    from backup_worker.restoring.revert import describe

    if not result["files"]:
        typer.echo(f"{result['agent']}: nothing to do: its guarded files are as approved")
        return
    would = "would put back" if "dry_run" in result else "put back"
    count = len(result["files"])
    typer.echo(f"{result['agent']}: {would} {count} file{'s' * (count != 1)}")
    for line in describe(result):
        typer.echo(f"  {line}")
    if result["evidence"]:
        typer.echo(f"  what stood there is in {result['evidence']}")
    if result.get("running"):
        typer.echo("  the agent runs: make sure that it reads these files anew, or restart it")
