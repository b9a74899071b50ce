"""Commands about alerts: alerts, alerts test, ack, silence, silences, unsilence."""

from __future__ import annotations

import getpass
import inspect
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backup_worker.cli._common import ByOption
from backup_worker.units import counted
from em_bridge import clock
from em_bridge.errors import UsageError
from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, RedisUrlOption, emit, group

if TYPE_CHECKING:
    from backup_worker.runtime import Runtime


def add_commands(app: typer.Typer) -> None:
    """Add this group's commands to `app`."""
    sub = group(app, "alerts", inspect.cleandoc(list_alerts.__doc__ or ""))
    sub.callback(invoke_without_command=True)(list_alerts)
    sub.command(name="test")(test)
    app.command()(ack)
    app.command()(silence)
    app.command(name="silences")(list_silences)
    app.command()(unsilence)


def list_alerts(
    context: typer.Context,
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the open alerts, whether somebody has seen them, and which receivers could not be reached.

    Example: `backup-worker alerts`
    """
    if context.invoked_subcommand is not None:
        if config != DEFAULT_CONFIG:
            os.environ["BACKUP_CONFIG"] = str(config)
        if redis_url is not None:
            os.environ["REDIS_URL"] = redis_url
        return
    from backup_worker.cli._common import open_runtime
    from backup_worker.status import open_alerts, receivers

    runtime = open_runtime(config, redis_url)
    now = clock.now()
    zone = runtime.config.schedule.timezone
    emit(open_alerts(runtime.redis, now), as_json=as_json, render=lambda rows: _print(rows, zone))
    if not as_json:
        _print_receivers(receivers(runtime), zone)


def test(
    config: ConfigOption = DEFAULT_CONFIG, redis_url: RedisUrlOption = None, as_json: JsonOption = False
) -> None:
    """Send a test page to every receiver now, and say which of them took it. Works without Redis.

    Exit 1 if one did not take it, or if there is none.

    Example: `backup-worker alerts test`
    """
    from backup_worker.cli._common import coloured, show, try_runtime
    from backup_worker.maintenance import notices

    runtime, _ = try_runtime(config, redis_url)
    rows = notices.try_receivers(runtime, clock.now())

    def render(found: list[dict[str, Any]]) -> None:
        for row in found:
            mark = coloured("took it", "green") if row["ok"] else coloured(f"did not: {row['detail']}", "red")
            show(mark.append(f"  {row['receiver']} ({', '.join(row['severities'])})", "default"))
        if not found:
            show(coloured("no receiver is configured: nobody is told of anything", "red"))

    emit(rows, as_json=as_json, render=render)
    if not rows or not all(row["ok"] for row in rows):
        raise typer.Exit(1)


def ack(
    alert: Annotated[
        str, typer.Argument(metavar="KEY|INCIDENT", help="The alert's key, or an incident's id.")
    ],
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    by: Annotated[
        str | None,
        typer.Option("--by", metavar="WHO", help="Who has seen it; default: the user you are logged in as."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say that you have seen an alert: it is not repeated any more, and stays open until it is resolved.

    Example: `backup-worker ack missing/daily/z --by kari`
    """
    from backup_worker import alerts
    from backup_worker.cli._common import open_runtime

    runtime = open_runtime(config, redis_url)
    who = by or getpass.getuser()
    seen = alerts.acknowledge(runtime.redis, _key_of(runtime, alert), who, clock.now())
    runtime.record("action", action="acknowledge", key=seen.key, by=who, agent=seen.agent)
    result = {"key": seen.key, "by": who, "title": seen.title}
    emit(result, as_json=as_json, render=lambda _: typer.echo(f"{who} has seen: {seen.title}"))


def silence(
    names: Annotated[
        list[str],
        typer.Argument(metavar="KIND|AGENT|KEY...", help="Kinds of alerts, agents, or keys of alerts."),
    ],
    for_: Annotated[
        str, typer.Option("--for", metavar="TIME", help="How long: 30min, 2h, 1d; at most 30 days.")
    ],
    why: Annotated[str, typer.Option("--why", help="Why, for the record.")],
    by: ByOption = None,
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Do not send some alerts for a while. They are still raised, shown and on the record.

    With kinds and agents, it means these kinds of these agents. An escalation, a pause of recovery and a standstill are
    silenced only by their kind or key, not by an agent alone.

    Example: `backup-worker silence missing z --for 2h --why "moving the disks"`
    """
    from backup_worker.cli._common import moment, open_runtime

    runtime = open_runtime(config, redis_url)
    begun = runtime.silence(names, for_s=_seconds(for_), by=by or getpass.getuser(), why=why)
    zone = runtime.config.schedule.timezone
    emit(
        begun.as_json(),
        as_json=as_json,
        render=lambda _: typer.echo(
            f"{begun.id}: {_meaning(begun.as_json())} is silent until {moment(begun.until, zone)}; "
            f"end it early with `backup-worker unsilence {begun.id}`"
        ),
    )


def list_silences(
    config: ConfigOption = DEFAULT_CONFIG, redis_url: RedisUrlOption = None, as_json: JsonOption = False
) -> None:
    """Show what is silent, until when, by whom and why.

    Example: `backup-worker silences`
    """
    from backup_worker import alerts
    from backup_worker.cli._common import moment, new_table, open_runtime, show

    runtime = open_runtime(config, redis_url)
    zone = runtime.config.schedule.timezone

    def render(rows: list[dict[str, Any]]) -> None:
        if not rows:
            typer.echo("nothing is silent")
            return
        table = new_table("", "silence", "what", "until", "by", "why")
        for row in rows:
            table.add_row(row["id"], _meaning(row), moment(row["until"], zone), row["by"], row["why"])
        show(table)

    rows = [one.as_json() for one in alerts.silences.active(runtime.redis, clock.now())]
    emit(rows, as_json=as_json, render=render)


def unsilence(
    silence: Annotated[str, typer.Argument(metavar="SILENCE", help="Its id: see `backup-worker silences`.")],
    by: ByOption = None,
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a silence early: what it held back is sent.

    Example: `backup-worker unsilence s3`
    """
    from backup_worker.cli._common import open_runtime

    ended = open_runtime(config, redis_url).unsilence(silence, by=by or getpass.getuser())
    emit(
        ended.as_json(),
        as_json=as_json,
        render=lambda row: typer.echo(f"{ended.id} has ended: {_meaning(row)} is sent again"),
    )


def _seconds(text: str) -> float:
    from backup_worker.cli.record import duration_s

    found = duration_s(text)
    if found is None:
        raise UsageError(f"“{text}” is not a duration", hint="write for example 30min, 2h or 1d")
    return found


def _meaning(row: dict[str, Any]) -> str:
    """Return in words what a silence covers."""
    parts = [", ".join(row["keys"])] if row["keys"] else []
    if row["kinds"] or row["agents"]:
        what = ", ".join(row["kinds"]) or "everything"
        parts.append(what + (f" of {', '.join(row['agents'])}" if row["agents"] else ""))
    return " and ".join(parts)


def _print(rows: list[dict[str, Any]], zone: str) -> None:
    from backup_worker.cli._common import moment, new_table, show

    if not rows:
        typer.echo("no open alerts")
        return
    table = new_table("", "key", "severity", "since", "sent", "seen by", "what")
    for row in rows:
        what = f"{row['title']}: {row['body']}" + (
            f" (not sent: {row['last_failure']})" if row["last_failure"] else ""
        )
        sent = f"silent ({row['silenced_by']})" if row["silenced_by"] else moment(row["told_at"], zone)
        table.add_row(
            row["key"], row["severity"], moment(row["opened_at"], zone), sent, row["acknowledged_by"] or "nobody",
            what,
        )  # fmt: skip
    show(table)


def _print_receivers(rows: list[dict[str, Any]], zone: str) -> None:
    """Show the receivers that could not be reached."""
    from backup_worker.cli._common import coloured, moment, show

    if not rows:
        show(coloured("no receiver is configured: nobody is told", "yellow"))
    for row in rows:
        if row["failures"]:
            text = (
                f" {row['receiver']}: {counted(row['failures'], 'time')} in a row, {row['last_failure']}; "
                f"tried again {moment(row['retry_at'], zone)}"
            )
            show(coloured("not reached", "red").append(text, "default"))


def _key_of(runtime: Runtime, name: str) -> str:
    """Return the key of the alert that `name` means: itself, or the worst of those about the incident."""
    from backup_worker import alerts
    from backup_worker.recovery.incident import IncidentStore
    from em_bridge.errors import NotFound

    known = [one.key for one in alerts.open_alerts(runtime.redis)]
    if name in known:
        return name
    try:
        agent = IncidentStore(runtime.redis).get(name).agent
    except NotFound:
        raise NotFound(
            f"there is no open alert and no incident “{name}”", hint="see `backup-worker alerts`"
        ) from None
    about = [f"{kind}/{agent}" for kind in ("escalation", "attempt", "recovery")]
    return next((key for key in about if key in known), about[0])
