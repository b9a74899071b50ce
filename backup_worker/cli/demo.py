"""The command `demo`."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from em_bridge.errors import UsageError
from em_bridge.terminal import JsonOption


def add_commands(app: typer.Typer) -> None:
    """Add this group's commands to `app`."""
    app.command()(demo)


def demo(
    folder: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="Where to make the fleet; default: a temporary folder."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Live through it all with a real small fleet: back up, kill, recover, EM crash, replay, escalation.

    Exit 0 only if all of it worked. Example: `backup-worker demo`
    """
    from rich.console import Console

    from backup_worker.demo.run import run
    from backup_worker.demo.show import Show

    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise UsageError(
            f"“{folder}” is not empty", hint="the demo makes its own fleet; give it an empty folder"
        )
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    place = folder or Path(tempfile.mkdtemp(prefix="agent-backup-demo-"))
    console = Console(file=sys.stderr if as_json else sys.stdout, highlight=False)
    if not console.is_terminal:
        console = Console(file=console.file, highlight=False, width=120)
    show = Show(console)
    worked = False
    try:
        worked = run(place.resolve(), show)
    finally:
        if as_json:
            sys.stdout.write(json.dumps(show.as_json(), indent=2) + "\n")
    console.print()
    seconds = sum(step.seconds for step in show.steps)
    if worked:
        console.print(f"[bold green]all of it worked[/] in {seconds:.0f} s, and no process is left")
    else:
        console.print(
            f"[bold red]it did not work[/]: {show.steps[-1].step}: {show.steps[-1].error}; see {place}/up.log"
        )
        raise typer.Exit(1)
