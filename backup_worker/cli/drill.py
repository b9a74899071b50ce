"""The command `drill`: prove that restoring works, by doing it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from backup_worker.cli import _completion
from backup_worker.cli._progress import shown
from backup_worker.units import counted
from em_bridge import clock
from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, RedisUrlOption, emit

if TYPE_CHECKING:
    from backup_worker.maintenance.drill import Drill


def add_commands(app: typer.Typer) -> None:
    """Add this group's commands to `app`."""
    app.command()(drill)


def drill(
    agents: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[AGENT...]", help="The agents; all if none is named.", autocompletion=_completion.agents
        ),
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Restore each agent's newest good state into a scratch folder, check every file, and run its `health` command.

    Nothing of the agent is touched, and the scratch folder is removed. Works without Redis. Exit code 1 if a restore
    does not work.

    Example: `backup-worker drill z jay`
    """
    from backup_worker.cli._common import try_runtime
    from backup_worker.maintenance.drill import run

    runtime, _ = try_runtime(config, redis_url)
    names = list(dict.fromkeys(agents or runtime.config.agents))
    for name in names:
        runtime.config.agent(name)
    done: list[Drill] = [run(runtime, name, clock.now()) for name in shown(names, "drilling", quiet=as_json)]
    emit([one.as_json() for one in done], as_json=as_json, render=_print)
    if not all(one.ok for one in done):
        raise typer.Exit(1)


def _print(rows: list[dict[str, Any]]) -> None:
    from backup_worker.cli._common import size

    for row in rows:
        if row["ok"]:
            well = ", and is well" if row["health"] else ""
            well += "" if row["owners"] else "; owners come back only as root, and were not compared"
            sources = ", ".join(row["from"])
            typer.echo(
                f"{row['agent']}: restored {counted(row['files'], 'file')}, {size(row['bytes'])} from {sources} "
                f"in {row['took_s']:.1f} s{well}"
            )
            continue
        typer.echo(f"{row['agent']}: the restore does not work")
        for problem in row["problems"]:
            typer.echo(f"  {problem['path']}: {problem['problem']}")
