"""Commands about the record: history, history verify."""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from collections import deque
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zoneinfo import ZoneInfo

import typer

from backup_worker.cli import _completion
from backup_worker.units import counted
from em_bridge import clock
from em_bridge.errors import NotFound, UsageError
from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, emit, group

if TYPE_CHECKING:
    from backup_worker.history import Line, Report

_AGO = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d|w)")
_UNITS_S = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}
_SHOWN = 50


def add_commands(app: typer.Typer) -> None:
    """Add this group's commands to `app`."""
    record = group(app, "history", inspect.cleandoc(history.__doc__ or ""))
    record.callback(invoke_without_command=True)(history)
    record.command()(verify)


def history(
    context: typer.Context,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more, until Ctrl-C.")] = False,
    agent: Annotated[
        str | None,
        typer.Option("--agent", help="Only lines about this agent.", autocompletion=_completion.agents),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="TIME", help="Only lines from then on: 2026-11-23, 07:30, 2h, 3d."),
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", help="Only lines of this kind, such as backup.")
    ] = None,
    last: Annotated[
        int | None, typer.Option("--last", min=0, help="Only so many lines at the end; 0 is all of them.")
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Show the record of everything that was done: backups, verifications, recoveries, approvals, alerts.

    Example: `backup-worker history --agent z --since 2d --kind backup`

    `--json` prints a list; together with `--follow` it prints one JSON object a line.
    """
    if context.invoked_subcommand is not None:
        if config != DEFAULT_CONFIG:
            os.environ["BACKUP_CONFIG"] = str(config)
        return
    from backup_worker.config import load
    from backup_worker.history import history_of

    schedule = load(config).schedule
    record, zone = history_of(schedule), schedule.timezone
    start = None if since is None else parse_time(since, zone, clock.now())
    if follow:
        earlier = sum(1 for _ in record.read(kind, agent, start)) - last if last else 0
        for number, line in enumerate(record.follow(kind, agent, start)):
            if number >= earlier:
                _print_line(line, zone, as_json=as_json)
        return
    lines = record.read(kind, agent, start)
    wanted = last if last is not None else (0 if as_json else _SHOWN)
    shown = list(lines) if wanted == 0 else None
    total = len(shown) if shown is not None else 0
    if shown is None:
        tail: deque[Line] = deque(maxlen=wanted)
        for line in lines:
            tail.append(line)
            total += 1
        shown = list(tail)
    emit(shown, as_json=as_json, render=lambda rows: _print_lines(rows, total, zone, schedule.history))


def verify(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Prove the record line by line, through all its files, and say what cannot be proven. Exit 1 if it is broken.

    Example: `backup-worker history verify --json`
    """
    from backup_worker.config import load
    from backup_worker.history import history_of

    schedule = load(config).schedule
    path = schedule.history
    try:
        report = history_of(schedule).verify()
    except FileNotFoundError:
        raise NotFound(
            f"there is no history at “{path}”", hint="nothing has been recorded yet, or the file was removed"
        ) from None
    result = {"path": str(path), **report.as_json()}
    emit(result, as_json=as_json, render=lambda _: _print_report(path, report))
    if not report.ok:
        raise typer.Exit(1)


def duration_s(text: str) -> float | None:
    """Return the seconds that `90s`, `30min`, `2h` or `3d` means; None for anything else."""
    found = _AGO.fullmatch(text.strip())
    return float(found[1]) * _UNITS_S[found[2]] if found else None


def parse_time(text: str, zone: str, now: float) -> float:
    """Return Unix seconds for a date, a time of today, a date and time (in `zone`), a Unix time, or `2h` (ago).

    Raises `UsageError` for anything else.
    """
    text = text.strip()
    if (ago_s := duration_s(text)) is not None:
        return now - ago_s
    if re.fullmatch(r"\d{9,11}(\.\d+)?", text):
        return float(text)
    if re.fullmatch(r"\d{1,2}:\d{2}(:\d{2})?", text):
        today = datetime.fromtimestamp(now, ZoneInfo(zone)).date().isoformat()
        text = f"{today} {text if text[2] == ':' else '0' + text}"
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=ZoneInfo(zone))).timestamp()
    except (ValueError, OverflowError):
        hint = "write a date (2026-11-23), a time (07:30), both (2026-11-23T07:30), or how long ago (2h, 3d)"
        raise UsageError(f"“{text}” is not a time", hint=hint) from None


def _print_lines(rows: list[Line], total: int, zone: str, path: Path) -> None:
    if not rows:
        typer.echo(
            f"no such lines in {path}" if path.exists() else f"nothing has been recorded yet in {path}"
        )
        return
    for line in rows:
        _print_line(line, zone, as_json=False)
    if total > len(rows):
        typer.echo(f"({total - len(rows)} earlier lines are not shown; --last 0 shows all)", err=True)


def _print_line(line: Line, zone: str, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
    else:
        typer.echo(_sentence(line, zone))
    sys.stdout.flush()


def _sentence(line: Line, zone: str) -> str:
    from backup_worker.cli._common import moment

    kind = str(line.get("kind"))
    at = line.get("at")
    when = moment(at, zone) if isinstance(at, int | float) else "—"
    rest = {
        key: value for key, value in line.items() if key not in ("seq", "at", "kind", "agent", "prev", "hash")
    }
    facts = " ".join(
        f"{key}={_short(value)}" for key, value in rest.items() if value not in (None, "", [], {})
    )
    bad = re.search("fail|suspect|escalat|dead|damage|broken", f"{kind} {line.get('status', '')}")
    colour = "red" if bad else "cyan"
    return f"{when}  {typer.style(f'{kind:<16}', fg=colour)} {line.get('agent') or '-':<10} {facts}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    # What a line says must not move the cursor or hide the next line.
    text = "".join(char if char.isprintable() else " " for char in text)
    text = text if len(text) <= 120 else f"{text[:117]}…"
    return f'"{text}"' if " " in text and not text.startswith(("[", "{")) else text


def _print_report(path: Path, report: Report) -> None:
    if report.ok:
        typer.secho(f"{path}: {counted(report.lines, 'line')}, each proves the one before it", fg="green")
    else:
        where = path.with_name(report.file) if report.file else path
        typer.secho(f"{where}: broken at line {report.first_broken}: {report.problem}", fg="red")
        typer.echo(f"the {report.lines} lines before it are proven")
    typer.echo(f"head: {report.head}")
    if report.noted is not None:
        typer.echo(f"the repository vouches for line {report.noted.seq}: {report.noted.hash}")
    _print_list("not proven:", report.unproven)


def _print_list(title: str, items: Iterable[str]) -> None:
    typer.echo(title)
    for item in items:
        typer.echo(f"  - {item}")
