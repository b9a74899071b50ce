"""The command `bisect`: the change that killed an agent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from backup_worker.cli import _completion
from backup_worker.cli._common import opened
from em_bridge import clock
from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, emit

if TYPE_CHECKING:
    from backup_worker.recovery.bisecting import Tried


def add_commands(app: typer.Typer) -> None:
    """Add this group's commands to `app`."""
    app.command()(bisect)


def bisect(
    agent: Annotated[str, typer.Argument(help="The agent.", autocompletion=_completion.agents)],
    for_s: Annotated[
        float | None,
        typer.Option(
            "--for",
            metavar="SECONDS",
            min=0.1,
            help="Not its health command: start it on each state; it works if it stays up for so long.",
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Try every state, not only those of a binary search.")
    ] = False,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Find the newest stored state on which an agent works, the first bad one, and what changed between the two.

    States are tried in scratch folders with the agent's `health` command and without Redis; the agent itself is not
    touched. What its files name by absolute paths is not in the folder, though. Exit code 1 if it works on none.

    Example: `backup-worker bisect z --for 10`
    """
    from backup_worker.recovery.bisecting import Bisector

    settings, repo, _ = opened(config)
    zone = settings.schedule.timezone
    bisector = Bisector(settings, repo, agent, for_s=for_s, now=clock.now())
    if not as_json:
        typer.echo(f"{agent}: {len(bisector.states)} different states")
    done = bisector.run(everything=everything, told=None if as_json else lambda one: _print_tried(one, zone))
    emit(done.as_json(), as_json=as_json, render=lambda facts: _print(facts, zone))
    if done.newest_working is None:
        raise typer.Exit(1)


def _print_tried(one: Tried, zone: str) -> None:
    from backup_worker.cli._common import moment

    mark = typer.style("works", fg="green") if one.works else typer.style("fails", fg="red")
    # Of what a program says before it ends, the last line tells most; `--json` has more.
    typer.echo(f"  {mark}  {moment(one.at, zone)}  {one.sources[0]}  {one.detail.rpartition(' / ')[2]}")


def _print(facts: dict[str, Any], zone: str) -> None:
    from backup_worker.cli._common import moment
    from backup_worker.cli.snapshots import print_diff

    good, bad = facts["newest_working"], facts["first_bad"]
    agent = facts["agent"]
    if good is None:
        typer.echo(f"{agent} works on none of the {len(facts['tried'])} states that were tried")
    elif bad is None:
        typer.echo(f"{agent} works on its newest state, {good['state']}: what killed it is in no snapshot")
    else:
        typer.echo(f"newest that works: {', '.join(good['sources'])}, of {moment(good['at'], zone)}")
        typer.echo(f"first that fails:  {', '.join(bad['sources'])}, of {moment(bad['at'], zone)}")
        typer.echo("what changed between the two:")
        print_diff(facts["difference"])
        typer.echo(f"to go back: backup-worker restore {agent} --as-of {good['at'] + 0.001:.3f} --dry-run")
    if not facts["monotonic"]:
        typer.echo("it works on and off: there may be more than one cause; --all tries every state", err=True)
    if not facts["steady"]:
        typer.echo("the same state gave different answers: do not trust this result", err=True)
