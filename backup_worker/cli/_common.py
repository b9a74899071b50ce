"""What several command groups need: what stands behind `--config` and `--redis-url`, and how things are printed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backup_worker.units import age as age
from backup_worker.units import moment as moment
from backup_worker.units import size as size
from em_bridge.errors import RedisUnavailable

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from backup_worker.config import Config
    from backup_worker.history import History
    from backup_worker.runtime import Runtime
    from backup_worker.snapshots import Repository

ByOption = Annotated[
    str | None,
    typer.Option("--by", metavar="WHO", help="Who says so; default: the user you are logged in as."),
]


def redis_url_for(config: Config, url: str | None) -> str | None:
    """Return the URL to use: the one given, else that of the embedded server of this configuration, if it has one."""
    from backup_worker.embedded import url_file

    if url:
        return url
    known = url_file(config.schedule.state)
    return known.read_text().strip() if known.exists() else None


def open_runtime(config_dir: Path, url: str | None) -> Runtime:
    """Load the configuration and reach Redis; raises ConfigError, UsageError, RedisUnavailable."""
    from backup_worker.config import load
    from backup_worker.runtime import Runtime
    from em_bridge import connection

    config = load(config_dir)
    address = redis_url_for(config, url)
    client = connection.connect(address)
    with connection.translate_errors(client):
        client.ping()
    return Runtime(config, client, address or connection.DEFAULT_URL)


def try_runtime(config_dir: Path, url: str | None) -> tuple[Runtime, RedisUnavailable | None]:
    """Like `open_runtime`; if Redis cannot be reached, with `client` None and the reason beside it."""
    from backup_worker.config import load
    from backup_worker.runtime import Runtime

    try:
        return open_runtime(config_dir, url), None
    except RedisUnavailable as error:
        return Runtime(load(config_dir)), error


def console_runtime(config_dir: Path, url: str | None) -> Runtime:
    """Like `open_runtime`; while Redis is away, with `client` None and the URL under which it will come back."""
    from backup_worker.config import load
    from backup_worker.runtime import Runtime
    from em_bridge import connection
    from em_bridge.errors import RedisRefused

    try:
        return open_runtime(config_dir, url)
    except RedisRefused:
        # A wrong password does not mend itself.
        raise
    except RedisUnavailable:
        config = load(config_dir)
        return Runtime(config, None, redis_url_for(config, url) or connection.DEFAULT_URL)


def opened(config_dir: Path) -> tuple[Config, Repository, History]:
    """Return the configuration, and the repository and record that it names. Raises ConfigError."""
    from backup_worker.config import load
    from backup_worker.history import history_of
    from backup_worker.snapshots import Repository

    config = load(config_dir)
    return config, Repository(config.schedule.repository), history_of(config.schedule)


def plain(text: str) -> str:
    """Return `text` without what would move the cursor or hide something: others wrote it."""
    return "".join(
        char if char.isprintable() or char in "\t\n" else "\N{REPLACEMENT CHARACTER}" for char in text
    )


def new_table(title: str, *columns: str) -> Table:
    """Return an empty rich table; the first column never wraps, and no cell moves the cursor."""
    from rich import box
    from rich.table import Table

    class PlainTable(Table):
        def add_row(self, *cells: Any, **options: Any) -> None:
            super().add_row(*map(_plain, cells), **options)

    table = PlainTable(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number == 0, overflow="fold")
    return table


def long_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows as plain columns, each as wide as its widest cell: for what nobody reads without `grep` or `less`."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    line = "  ".join(f"{{:<{width}}}" for width in widths)
    sys.stdout.write("".join(f"{line.format(*row).rstrip()}\n" for row in (columns, *rows)))
    sys.stdout.flush()


def coloured(text: str, colour: str) -> Text:
    """Return `text` in `colour`, for a table's cell or for `show`."""
    from rich.text import Text

    return Text(text, style=colour)


def show(*things: object) -> None:
    """Print `things` on stdout: with colours and borders where there is a terminal, plain where there is none.

    Text is printed as it is, but plain: what comes from the bus or from a file name may hold brackets, and is not
    markup.
    """
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=160)
    for thing in things:
        console.print(_plain(thing))


def _plain(thing: Any) -> Any:
    """Return a text, or rich's, in its plain form; anything else as it is."""
    from rich.text import Text

    if isinstance(thing, Text):
        thing.plain = plain(thing.plain)
    return plain(thing) if isinstance(thing, str) else thing


def described_pause(pause: dict[str, Any], zone: str) -> str:
    """Return since when, by whom, why and until when recovery is paused."""
    until = f"until {moment(pause['until'], zone)}, or " if pause["until"] is not None else "until "
    return (
        f"paused since {moment(pause['since'], zone)} by {pause['by']}"
        + (f" ({pause['reason']})" if pause["reason"] else "")
        + f", {until}`backup-worker resume-recovery`"
    )
