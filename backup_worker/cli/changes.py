"""The approval inbox: changes, approve, reject."""

from __future__ import annotations

import getpass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, RedisUrlOption, emit

if TYPE_CHECKING:
    from pathlib import Path

ByOption = Annotated[
    str | None,
    typer.Option("--by", metavar="WHO", help="Who decides; default: the user you are logged in as."),
]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why, for the record.")]


def add_commands(app: typer.Typer) -> None:
    """Add this group's commands to `app`."""
    app.command(name="changes")(list_changes)
    app.command()(approve)
    app.command()(reject)


def list_changes(
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also those that are decided or applied.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the changes that wait for a human.

    Example: `backup-worker changes --all`
    """
    from backup_worker import changes
    from backup_worker.cli._common import open_runtime

    runtime = open_runtime(config, redis_url)
    found = [
        change.summary()
        for change in changes.all_changes(runtime.redis)
        if everything or change.state == changes.PROPOSED
    ]
    zone = runtime.config.schedule.timezone
    emit(found, as_json=as_json, render=lambda rows: _print(rows, zone))


def _print(rows: list[dict[str, Any]], zone: str) -> None:
    from backup_worker.cli._common import moment, new_table, show

    if not rows:
        typer.echo("no change waits for a decision")
        return
    table = new_table("", "change", "state", "agent", "paths", "asked by", "since", "decided by", "why")
    for row in rows:
        since = moment(row["proposed_at"] or row["applied_at"], zone)
        table.add_row(
            row["change"], row["state"], row["agent"], ", ".join(row["paths"]), row["by"], since,
            row["decided_by"], row["reason"],
        )  # fmt: skip
    show(table)


def approve(
    change: Annotated[str, typer.Argument(help="The change's id.")],
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    by: ByOption = None,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Say yes to a proposed change; the EM may then apply it.

    Example: `backup-worker approve c1 --by kari --reason "tested on staging"`
    """
    _decide(change, config, redis_url, by, reason, as_json, yes=True)


def reject(
    change: Annotated[str, typer.Argument(help="The change's id.")],
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    by: ByOption = None,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Say no to a proposed change.

    Example: `backup-worker reject c1 --by kari --reason "too steep"`
    """
    _decide(change, config, redis_url, by, reason, as_json, yes=False)


def _decide(
    change: str, config: Path, redis_url: str | None, by: str | None, reason: str, as_json: bool, *, yes: bool
) -> None:
    from backup_worker import changes
    from backup_worker.cli._common import open_runtime
    from em_bridge import Publisher

    runtime = open_runtime(config, redis_url)
    who = by or getpass.getuser()
    known = changes.get(runtime.redis, change)
    changes.check_decision(known, who, yes=yes, signers=runtime.config.allowed_signers)
    publisher = Publisher(runtime.redis)
    publish = publisher.config_approved if yes else publisher.config_rejected
    entry = publish(change=change, by=who, reason=reason)
    word = "approved" if yes else "rejected"
    result = {"change": change, "decision": word, "by": who, "entry": entry}
    emit(result, as_json=as_json, render=lambda _: typer.echo(f"change {change} {word} by {who}"))
