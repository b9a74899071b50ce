"""The command `status`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backup_worker.units import counted
from em_bridge import clock
from em_bridge.errors import UsageError
from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, RedisUrlOption, emit

if TYPE_CHECKING:
    from rich.text import Text


def add_commands(app: typer.Typer) -> None:
    """Add this group's commands to `app`."""
    app.command()(status)


def status(
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Stay, and show it anew all the time; Ctrl-C leaves.")
    ] = False,
    every: Annotated[
        float, typer.Option("--every", metavar="S", min=0.2, help="Seconds between two looks of --watch.")
    ] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Show whether everything is backed up and running; exit 1 if a backup, a verification or the proof
    of a restore is overdue, the newest good snapshot stale or a snapshot is damaged, 3 if Redis is away.

    Example: `backup-worker status --watch`
    """
    from backup_worker.cli._common import try_runtime
    from backup_worker.status import is_late, overview

    if watch:
        if as_json or not sys.stdout.isatty():
            raise UsageError(
                "--watch needs a terminal",
                hint="in a script, call `backup-worker status --json` as often as needed",
            )
        from backup_worker.cli._watch import stay

        stay(config, redis_url, every)
        return
    runtime, away = try_runtime(config, redis_url)
    result = overview(runtime, clock.now())
    zone = runtime.config.schedule.timezone
    emit(result, as_json=as_json, render=lambda facts: _print(facts, zone))
    if is_late(result) or result["scrub"]["damaged"]:
        raise typer.Exit(1)
    if away is not None:
        raise away


def _print(facts: dict[str, Any], zone: str) -> None:
    from backup_worker.cli._common import age, coloured, described_pause, moment, new_table, show, size

    tiers = list(facts["next_runs"])
    table = new_table("newest good snapshot", "agent", "state", *tiers, "restore proven")
    for row in facts["agents"]:
        cells: list[str | Text] = []
        for tier in tiers:
            cell = row["tiers"][tier]
            text = f"{age(cell['age_s'])} ago" if cell["age_s"] is not None else "none"
            late = (
                f", {cell['overdue']} is overdue" if cell["overdue"] else ", stale" if cell["stale"] else ""
            )
            cells.append(coloured(text + late, "red") if late else text)
        table.add_row(row["agent"], row["state"] or "unknown", *cells, _proven(row["drill"]))
    runs = ", ".join(f"{tier} {moment(at, zone)}" for tier, at in facts["next_runs"].items() if at)
    show(table, f"next runs ({zone}): {runs or 'none'}")
    _print_scrub(facts["scrub"])
    if not facts["redis"]:
        show(coloured("Redis cannot be reached: queues, incidents and alerts are unknown", "yellow"))
        return
    waiting = ", ".join(f"{name} {count}" for name, count in facts["queues"].items())
    show(
        f"jobs waiting: {waiting}; oldest event waits {age(facts['lag_s'])}; dead letters: {facts['dead_letters']}"
    )
    if facts["memory"]:
        used, limit = (size(facts["memory"][key]) for key in ("used_bytes", "limit_bytes"))
        show(f"Redis uses {used}" + (f" of {limit}" if facts["memory"]["limit_bytes"] else ""))
    for stream, queue in facts["held"].items():
        show(
            coloured("held", "yellow").append(f" {stream} is not read: the {queue} queue is full", "default")
        )
    if facts["recovery_paused"] is not None:
        text = " " + described_pause(facts["recovery_paused"], zone)
        show(coloured("RECOVERY IS PAUSED: dead agents stay dead,", "bold red").append(text, "default"))
    for incident in facts["incidents"]:
        text = f" {incident['id']} in {incident['phase']}: {incident['reason']}"
        show(coloured("open incident", "yellow").append(text, "default"))
    for alert in facts["alerts"]:
        silent = " (silent)" if alert["silenced_by"] else ""
        show(coloured("alert", "red").append(f" {alert['severity']}: {alert['title']}{silent}", "default"))
    for row in facts["receivers"]:
        if row["failures"]:
            text = f" {row['receiver']}: {counted(row['failures'], 'time')} in a row, {row['last_failure']}"
            show(coloured("alerts do not arrive", "red").append(text, "default"))


def _proven(drill: dict[str, Any]) -> str | Text:
    from backup_worker.cli._common import age, coloured

    text = "never" if drill["age_s"] is None else f"{age(drill['age_s'])} ago"
    if drill["last_ok"] is False:
        return coloured(f"{text}, the last drill failed", "red")
    return coloured(f"{text}, overdue", "red") if drill["overdue"] else text


def _print_scrub(scrub: dict[str, Any]) -> None:
    from backup_worker.cli._common import age, coloured, show

    if scrub["oldest_age_s"] is not None:
        text = f"verified: {counted(scrub['snapshots'], 'snapshot')}, the oldest {age(scrub['oldest_age_s'])} ago"
        late = f", {scrub['overdue']} are overdue" if scrub["overdue"] else ""
        show(coloured(text + late, "red" if late else ""))
    for identifier in scrub["damaged"]:
        show(coloured("damaged", "red").append(f" {identifier}", "default"))
