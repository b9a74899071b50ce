"""Commands about alerts: alerts, ack."""

from __future__ import annotations

import getpass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from em_bridge import clock
from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, RedisUrlOption, emit

if TYPE_CHECKING:
    from backup_worker.runtime import Runtime


def add_commands(app: typer.Typer) -> None:
    """Add this group's commands to `app`."""
    app.command(name="alerts")(list_alerts)
    app.command()(ack)


def list_alerts(
    config: ConfigOption = DEFAULT_CONFIG, redis_url: RedisUrlOption = None, as_json: JsonOption = False
) -> None:
    """Show the open alerts, and whether somebody has seen them.

    Example: `backup-worker alerts`
    """
    from backup_worker.cli._common import open_runtime
    from backup_worker.status import open_alerts

    runtime = open_runtime(config, redis_url)
    zone = runtime.config.schedule.timezone
    emit(open_alerts(runtime.redis), as_json=as_json, render=lambda rows: _print(rows, zone))


def _print(rows: list[dict[str, Any]], zone: str) -> None:
    from rich.markup import escape

    from backup_worker.cli._common import moment, new_table, show

    if not rows:
        typer.echo("no open alerts")
        return
    table = new_table("", "key", "severity", "since", "seen by", "what")
    for row in rows:
        what = f"{row['title']}: {row['body']}"
        table.add_row(
            escape(row["key"]), row["severity"], moment(row["opened_at"], zone),
            escape(row["acknowledged_by"] or "nobody"), escape(what),
        )  # fmt: skip
    show(table)


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


def _key_of(runtime: Runtime, name: str) -> str:
    """Return the key of the alert that `name` means: itself, or that of the incident's escalation."""
    from backup_worker import alerts
    from backup_worker.recovery.incident import IncidentStore
    from em_bridge.errors import NotFound

    if any(one.key == name for one in alerts.open_alerts(runtime.redis)):
        return name
    try:
        agent = IncidentStore(runtime.redis).get(name).agent
    except NotFound:
        raise NotFound(
            f"there is no open alert and no incident “{name}”", hint="see `backup-worker alerts`"
        ) from None
    return f"escalation/{agent}"
