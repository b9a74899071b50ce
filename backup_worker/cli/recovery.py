"""Commands about recoveries: recover, incidents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, RedisUrlOption, emit

if TYPE_CHECKING:
    from rich.table import Table


def add_commands(app: typer.Typer) -> None:
    """Add this group's commands to `app`."""
    app.command()(recover)
    app.command()(incidents)


def recover(
    agents: Annotated[list[str], typer.Argument(metavar="AGENT...", help="The agents to recover.")],
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    reason: Annotated[str, typer.Option("--reason", help="Why, for the record.")] = "by hand",
    as_json: JsonOption = False,
) -> None:
    """Open an incident by hand: stop the agent, restore its newest good state, start it, prove that it lives.

    Example: `backup-worker recover rick --reason "stuck since noon"`
    """
    from backup_worker.cli._common import open_runtime
    from backup_worker.recovery.service import RecoveryService

    runtime = open_runtime(config, redis_url)
    for agent in agents:
        runtime.config.agent(agent)
    service = RecoveryService(runtime)
    opened = [service.open(agent, reason).summary() for agent in agents]
    emit(opened, as_json=as_json, render=_print_opened)


def _print_opened(opened: list[dict[str, Any]]) -> None:
    for incident in opened:
        typer.echo(f"{incident['agent']}: incident {incident['id']} is open; follow it with")
        typer.echo(f"  backup-worker incidents {incident['id']}")


def incidents(
    incident: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Show this one with its steps.")
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show recoveries, open and past, the newest first; with an id, the steps of that one.

    Example: `backup-worker incidents rick-20261123T120000-1f2e`
    """
    from backup_worker.cli._common import open_runtime
    from backup_worker.recovery.incident import IncidentStore

    runtime = open_runtime(config, redis_url)
    store = IncidentStore(runtime.redis)
    found = [store.get(incident)] if incident else list(store.all())
    zone = runtime.config.schedule.timezone
    summaries = [one.summary() for one in found]
    emit(summaries, as_json=as_json, render=lambda rows: _print(rows, zone, with_steps=incident is not None))


def _print(rows: list[dict[str, Any]], zone: str, *, with_steps: bool) -> None:
    from backup_worker.cli._common import moment, new_table, show

    if not rows:
        typer.echo("no incidents")
        return
    table = new_table("", "incident", "agent", "state", "opened", "took", "attempts", "why")
    for row in rows:
        took = f"{row['closed_at'] - row['opened_at']:.1f} s" if row["closed_at"] else f"in {row['phase']}"
        table.add_row(
            row["id"], row["agent"], _coloured(row["state"]), moment(row["opened_at"], zone), took,
            str(row["attempts"]), row["reason"],
        )  # fmt: skip
    show(table)
    if with_steps:
        show(*(_steps(row, zone) for row in rows))


def _steps(row: dict[str, Any], zone: str) -> Table:
    from backup_worker.cli._common import moment, new_table

    table = new_table("steps", "at", "step", "", "detail")
    for step in row["steps"]:
        mark = "[green]ok[/]" if step["ok"] else "[red]failed[/]"
        table.add_row(moment(step["at"], zone), step["step"], mark, step["detail"])
    return table


def _coloured(state: str) -> str:
    colour = {"open": "yellow", "recovered": "green", "escalated": "red"}.get(state, "white")
    return f"[{colour}]{state}[/]"
