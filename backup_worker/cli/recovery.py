"""Commands about recoveries: recover, incidents, pause-recovery, resume-recovery."""

from __future__ import annotations

import getpass
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backup_worker.cli import _completion
from backup_worker.cli._common import ByOption
from em_bridge import clock
from em_bridge.errors import NotFound, UsageError
from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, RedisUrlOption, emit, fail

if TYPE_CHECKING:
    from rich.table import Table

    from backup_worker.config import Tier
    from backup_worker.recovery.incident import Incident, IncidentStore
    from backup_worker.recovery.service import RecoveryService

COLOURS = {"open": "yellow", "recovered": "green", "escalated": "red"}
POLL_S = 0.2
NOBODY_AFTER_S = 5.0
"""If no step was done for so long, it is said that probably no worker runs."""


def add_commands(app: typer.Typer) -> None:
    """Add this group's commands to `app`."""
    app.command()(recover)
    app.command()(incidents)
    app.command(name="pause-recovery")(pause_recovery)
    app.command(name="resume-recovery")(resume_recovery)


def recover(
    agents: Annotated[
        list[str],
        typer.Argument(metavar="AGENT...", help="The agents to recover.", autocompletion=_completion.agents),
    ],
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    reason: Annotated[str, typer.Option("--reason", help="Why, for the record.")] = "by hand",
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow until it is over; exit 1 if one could not be recovered.")
    ] = False,
    reapply: Annotated[
        bool,
        typer.Option(
            "--reapply",
            help="Put back approved changes that the last recovery has left out; a running agent is backed up first.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Open an incident by hand: stop the agent, restore its newest good state, start it, prove that it lives.

    Example: `backup-worker recover rick --reason "stuck since noon" --wait`
    """
    from backup_worker.cli._common import open_runtime
    from backup_worker.recovery.incident import ESCALATED
    from backup_worker.recovery.service import RecoveryService
    from em_bridge.connection import translate_errors

    runtime = open_runtime(config, redis_url)
    zone = runtime.config.schedule.timezone
    names = list(dict.fromkeys(agents))
    for agent in names:
        runtime.config.agent(agent)
    service = RecoveryService(runtime)
    with translate_errors(runtime.redis):
        if reapply:
            _prepare_to_reapply(service, names)
        opened = [service.open(agent, reason, reapply=reapply) for agent in names]
        _say_if_paused(service, zone)
        if wait:
            opened = _follow(service.store, [one.id for one in opened], zone, quiet=as_json)
    emit(
        [one.summary() for one in opened],
        as_json=as_json,
        render=lambda rows: _print(rows, zone, with_steps=False) if wait else _print_opened(rows),
    )
    if any(one.state == ESCALATED for one in opened):
        raise typer.Exit(1)


def _prepare_to_reapply(service: RecoveryService, names: list[str]) -> None:
    """Back up each agent that runs: what it has done since its recovery is the state that the changes are laid over.

    Raises NotFound if an agent's last recovery has left no approved change out.
    """
    from backup_worker import backups
    from backup_worker.recovery.adapters import adapter_for

    runtime = service.runtime
    for agent in names:
        if not service.left_out(agent):
            raise NotFound(
                f"the last recovery of “{agent}” has left no approved change out",
                hint="see `backup-worker incidents`; a change that was never applied is applied by whoever proposed it",
            )
    for agent in names:
        config = runtime.config.agent(agent)
        if adapter_for(agent, config, runtime.config.schedule.state).running():
            for tier in _whole(runtime.config.schedule.tiers):
                backups.by_hand(runtime, agent, tier, now=clock.now())


def _whole(tiers: Mapping[str, Tier]) -> list[str]:
    """Return a tier that holds everything, or all scheduled ones if none does."""
    whole = [name for name, tier in tiers.items() if "*" in tier.include]
    return whole[:1] or [name for name, tier in tiers.items() if tier.cron is not None]


def _follow(store: IncidentStore, ids: list[str], zone: str, *, quiet: bool) -> list[Incident]:
    """Print each step of the incidents as it is done, unless `quiet`, and return them when all are closed."""
    from backup_worker.cli._common import moment, plain

    shown = dict.fromkeys(ids, 0)
    silent_until = clock.monotonic() + NOBODY_AFTER_S
    while True:
        found = [store.get(one) for one in ids]
        for incident in found:
            for step in incident.steps[shown[incident.id] :]:
                silent_until = float("inf")
                if not quiet:
                    mark = "ok" if step.ok else "FAILED"
                    what = f"{incident.agent:<12} {step.step:<8} {mark:<6} {plain(step.detail)}"
                    typer.echo(f"{moment(step.at, zone)}  {what}")
            shown[incident.id] = len(incident.steps)
        if not any(incident.is_open for incident in found):
            return found
        if clock.monotonic() > silent_until:
            silent_until = float("inf")
            typer.echo("nobody has taken it up yet: do a dispatcher and a worker run?", err=True)
        clock.sleep(POLL_S)


def _say_if_paused(service: RecoveryService, zone: str) -> None:
    from backup_worker.cli._common import described_pause
    from backup_worker.recovery.breakers import paused

    pause = paused(service.runtime.redis, clock.now())
    if pause is not None:
        fail("recovery is paused: this waits", hint=described_pause(pause.as_json(), zone))


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


def pause_recovery(
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    reason: Annotated[str, typer.Option("--reason", help="Why, for the record and the alert.")] = "",
    until: Annotated[
        str | None,
        typer.Option(
            "--until",
            metavar="TIME",
            help="Go on by itself then: 2026-11-23T18:00 (the schedule's zone), a day (its end), or Unix seconds.",
        ),
    ] = None,
    by: ByOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hold all recoveries that have not begun to act; those that are opened meanwhile wait. It alerts while it lasts.

    Example: `backup-worker pause-recovery --reason "moving the disks" --until 2026-11-23T18:00`
    """
    from backup_worker.cli._common import described_pause, open_runtime
    from backup_worker.cli._restore import parse_time
    from backup_worker.recovery.service import RecoveryService

    runtime = open_runtime(config, redis_url)
    zone = runtime.config.schedule.timezone
    end = parse_time(until, zone) if until is not None else None
    if end is not None and end <= clock.now():
        raise UsageError(f"“{until}” is over already", hint="name a time that is to come")
    pause = RecoveryService(runtime).pause(by or getpass.getuser(), reason, until=end)
    emit(
        {"paused": True, **pause.as_json()},
        as_json=as_json,
        render=lambda facts: typer.echo("recovery is " + described_pause(facts, zone)),
    )


def resume_recovery(
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    by: ByOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let recovery go on, with what has waited; exit 4 if it is not paused.

    Example: `backup-worker resume-recovery`
    """
    from backup_worker.cli._common import open_runtime
    from backup_worker.recovery.service import RecoveryService

    runtime = open_runtime(config, redis_url)
    service = RecoveryService(runtime)
    ended = service.resume(by or getpass.getuser())
    if ended is None:
        raise NotFound("recovery is not paused")
    waited = sorted(service.store.open_ids())
    emit(
        {"paused": False, **ended.as_json(), "waiting": waited},
        as_json=as_json,
        render=lambda _: typer.echo(f"recovery goes on; open recoveries: {', '.join(waited) or 'none'}"),
    )


def _print(rows: list[dict[str, Any]], zone: str, *, with_steps: bool) -> None:
    from backup_worker.cli._common import coloured, moment, new_table, show

    if not rows:
        typer.echo("no incidents")
        return
    table = new_table("", "incident", "agent", "state", "opened", "took", "attempts", "why")
    for row in rows:
        took = f"{row['closed_at'] - row['opened_at']:.1f} s" if row["closed_at"] else f"in {row['phase']}"
        table.add_row(
            row["id"], row["agent"], coloured(row["state"], COLOURS[row["state"]]),
            moment(row["opened_at"], zone), took, str(row["attempts"]), row["reason"],
        )  # fmt: skip
    show(table)
    if with_steps:
        show(*(_steps(row, zone) for row in rows))


def _steps(row: dict[str, Any], zone: str) -> Table:
    from backup_worker.cli._common import coloured, moment, new_table

    table = new_table("steps", "at", "step", "", "detail")
    for step in row["steps"]:
        mark = coloured("ok", "green") if step["ok"] else coloured("failed", "red")
        table.add_row(moment(step["at"], zone), step["step"], mark, step["detail"])
    return table
