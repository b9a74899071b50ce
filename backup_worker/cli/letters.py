"""The dead letters: list, retry, drop."""

from __future__ import annotations

import getpass
from typing import Annotated, Any

import typer

from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, RedisUrlOption, emit, group

EntryArgument = Annotated[str, typer.Argument(metavar="ENTRY", help="The letter's entry id.")]


def add_commands(app: typer.Typer) -> None:
    """Add this group's commands to `app`."""
    letters = group(
        app, "dead-letters", "Events that could not be handled. Example: `backup-worker dead-letters list`"
    )
    letters.command("list")(list_letters)
    letters.command()(retry)
    letters.command()(drop)


def list_letters(
    config: ConfigOption = DEFAULT_CONFIG, redis_url: RedisUrlOption = None, as_json: JsonOption = False
) -> None:
    """Show the events that could not be handled, the newest first.

    Example: `backup-worker dead-letters list`
    """
    from backup_worker import letters
    from backup_worker.cli._common import open_runtime

    runtime = open_runtime(config, redis_url)
    rows = [letter.summary() for letter in letters.newest(runtime.redis)]
    zone = runtime.config.schedule.timezone
    emit(rows, as_json=as_json, render=lambda found: _print(found, zone))


def _print(rows: list[dict[str, Any]], zone: str) -> None:
    from backup_worker.cli._common import moment, new_table, show

    if not rows:
        typer.echo("no dead letters: every event could be handled")
        return
    table = new_table("", "entry", "at", "stream", "why")
    for row in rows:
        table.add_row(row["entry"], moment(row["at"], zone), row["stream"], row["reason"])
    show(table)


def retry(
    entry: EntryArgument,
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have an event tried again: it is put back onto its stream, a message into its recipient's inbox.

    Example: `backup-worker dead-letters retry 1795440804000-0`
    """
    from backup_worker import letters
    from backup_worker.cli._common import open_runtime

    runtime = open_runtime(config, redis_url)
    came_of_it = letters.retry(runtime.redis, entry)
    runtime.record("dead-letter", action="retry", entry=entry, by=getpass.getuser())
    result = {"entry": entry, "action": "retry", "came_of_it": came_of_it}
    emit(result, as_json=as_json, render=lambda _: typer.echo(f"{entry} {came_of_it}"))


def drop(
    entry: EntryArgument,
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take a letter away for good; what it held stays in the record.

    Example: `backup-worker dead-letters drop 1795440804000-0`
    """
    from backup_worker import letters
    from backup_worker.cli._common import open_runtime

    runtime = open_runtime(config, redis_url)
    letter = letters.drop(runtime.redis, entry)
    runtime.record("dead-letter", action="drop", by=getpass.getuser(), letter=letter.summary())
    result = {"entry": entry, "action": "drop", "letter": letter.summary()}
    said = f"{entry} is dropped; the record holds what it was"
    emit(result, as_json=as_json, render=lambda _: typer.echo(said))
