"""`log`, `replay`, `lag`, `export`, `import`: the message log, looked into, delivered again, kept, brought back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from em_bridge.cli._common import RecipientOption, reached
from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, RedisUrlOption, emit

FromOption = Annotated[
    str | None,
    typer.Option("--from", metavar="ID|TIME", help="First entry: its id, ISO 8601, or Unix seconds."),
]
ToOption = Annotated[
    str | None,
    typer.Option("--to", metavar="ID|TIME", help="Last entry: its id, ISO 8601, or Unix seconds."),
]
SenderOption = Annotated[
    str | None, typer.Option("--sender", metavar="AGENT", help="Only messages from this agent.")
]


def add_commands(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    for command in (log, replay, lag, export):
        app.command()(command)
    app.command("import")(import_)


def log(
    start: FromOption = None,
    end: ToOption = None,
    recipient: RecipientOption = None,
    sender: SenderOption = None,
    stream: Annotated[
        str, typer.Option("--stream", metavar="NAME", help="Another stream of events.")
    ] = "em:messages",
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="At most N entries.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Wait for new entries; ends with Ctrl-C.")
    ] = False,
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the message log. With --json: a list, or with --follow one JSON object a line.

    Example: `em-bridge log --from 2026-11-23T07:00:00Z --recipient z`
    """
    from em_bridge import logview

    view = logview.View(start=start, end=end, recipient=recipient, sender=sender, stream=stream, limit=limit)
    with reached(redis_url, config) as client:
        if as_json and not follow:
            emit(list(view.rows(client)), as_json=True, render=typer.echo)
            return
        line: Callable[[dict[str, Any]], str] = logview.json_line if as_json else logview.text_line
        rows: Iterator[dict[str, Any]] = view.followed(client) if follow else view.rows(client)
        for row in rows:
            sys.stdout.write(line(row) + "\n")
            if follow:
                sys.stdout.flush()


def replay(
    start: Annotated[str, typer.Option("--from", metavar="ID|TIME", help="First entry, as in `log`.")],
    end: ToOption = None,
    recipient: RecipientOption = None,
    into: Annotated[
        str | None,
        typer.Option("--into", metavar="STREAM", help="Copy them into this stream of your own instead."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be delivered; change nothing.")
    ] = False,
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Deliver messages again to agents that do not have them; nobody gets one twice.

    With --into nobody gets anything: the messages are copied into a stream of your own, each once.

    Example: `em-bridge replay --from 2026-11-23T07:00:00Z --recipient z --dry-run`
    """
    from em_bridge import logview
    from em_bridge import replay as replaying
    from em_bridge.copying import copy_into

    first, last = logview.position(start), logview.position(end, last=True) if end else "+"
    with reached(redis_url, config) as client:
        if into is not None:
            result = copy_into(client, into, first, last, recipient=recipient, dry_run=dry_run)
            emit(result, as_json=as_json, render=_render_copy)
            return
        plan = replaying.plan_replay(client, first, last, recipient=recipient)
        if not dry_run:
            plan = replaying.execute(client, plan)
    emit({**plan.as_dict(), "dry_run": dry_run}, as_json=as_json, render=_render_replay)


def lag(
    config: ConfigOption = DEFAULT_CONFIG, redis_url: RedisUrlOption = None, as_json: JsonOption = False
) -> None:
    """Show what waits: for each stream and consumer group, in each inbox, and how much memory it takes.

    Example: `em-bridge lag --json`
    """
    from em_bridge.lag import measure

    with reached(redis_url, config) as client:
        result = measure(client)
    emit(result, as_json=as_json, render=_render_lag)


def export(
    target: Annotated[
        Path,
        typer.Argument(metavar="FILE|DIR", help="A file (the whole log, new), or a folder (continued)."),
    ],
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy the message log out of Redis, so that a lost Redis can be rebuilt. The EM does it by itself.

    Example: `em-bridge export message-log.jsonl`
    """
    from em_bridge.exporter import Exporter, export_file

    with reached(redis_url, config, retrying=False) as client:
        if target.is_dir():
            exporter = Exporter(client, target)
            try:
                count = exporter.step()
            finally:
                exporter.close()
        else:
            count = export_file(client, target)
    emit(
        {"messages": count, "to": str(target)},
        as_json=as_json,
        render=lambda result: typer.echo(f"{result['messages']} messages exported to {result['to']}"),
    )


def import_(
    source: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="What `export` or the EM has written.")],
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="The EM's agent id.")] = "em",
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring an exported message log back into a Redis that has lost it; nobody gets a message twice.

    A running EM waits meanwhile, and then goes on routing where it stopped.

    Example: `em-bridge import agents/em/message-log`
    """
    import dataclasses

    from em_bridge.importer import import_log

    with reached(redis_url, config, retrying=False) as client:
        result = dataclasses.asdict(import_log(client, source, name=name))
    emit(result, as_json=as_json, render=_render_import)


def _render_replay(result: dict[str, Any]) -> None:
    would = "would be delivered again" if result["dry_run"] else "delivered again"
    typer.echo(
        f"{result['messages']} messages: {result['redelivered']} {would}, {result['already_there']} dealt with before, "
        f"{result['waiting_in_inbox']} waiting in inboxes, {result['not_yet_routed']} not routed yet, "
        f"{result['unknown_recipient']} to unknown recipients"
    )
    for row in result["agents"]:
        if row["redelivered"]:
            typer.echo(f"  {row['agent']}: {row['redelivered']}")


def _render_copy(result: dict[str, Any]) -> None:
    would = "would be copied" if result["dry_run"] else "copied"
    typer.echo(
        f"{result['messages']} messages: {result['copied']} {would} into {result['into']}, "
        f"{result['already_there']} there already"
    )


def _render_import(result: dict[str, Any]) -> None:
    typer.echo(
        f"{result['messages']} messages in the export: {result['added']} were not in the log, "
        f"{result['redelivered']} put into inboxes"
    )


def _render_lag(result: dict[str, Any]) -> None:
    streams: list[tuple[str, ...]] = []
    for row in result["streams"]:
        head = (row["stream"], str(row["length"]), _bytes(row["bytes"]))
        groups = row["groups"] or [None]
        for number, group in enumerate(groups):
            first = head if number == 0 else ("", "", "")
            streams.append((*first, *_group_cells(group)))
    _table(("stream", "entries", "size", "group", "pending", "unread", "oldest waiting"), streams)
    inboxes: list[tuple[str, ...]] = [
        (r["agent"], str(r["length"]), _bytes(r["bytes"]), _number(r["waiting"]), _age(r["oldest_waiting_s"]))
        for r in result["inboxes"]
    ]
    if inboxes:
        _table(("inbox", "entries", "size", "waiting", "oldest waiting"), inboxes)
    memory = result["memory"]
    if memory:
        limit = f" of {_bytes(memory['limit_bytes'])}" if memory["limit_bytes"] else ", no limit set"
        typer.echo(f"memory of the server: {_bytes(memory['used_bytes'])}{limit}")


def _group_cells(group: dict[str, Any] | None) -> tuple[str, str, str, str]:
    if group is None:
        return "", "", "", ""
    age = _age(group["oldest_waiting_s"])
    return group["group"], str(group["pending"]), _number(group["unread"]), age


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        words = column in ("stream", "group", "inbox")
        table.add_column(column, justify="left" if words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=160)
    console.print(table)


def _number(value: int | None) -> str:
    return "?" if value is None else str(value)


def _age(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds else "—"


def _bytes(number: int | None) -> str:
    if number is None:
        return "?"
    value = float(number)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
