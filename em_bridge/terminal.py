"""What every command of both programs shares: options, results on stdout, errors on stderr, exit codes.

A command returns its result through `emit`; an error leaves as one line with a hint, never as a traceback, under the
exit code of its class. This module and `em_bridge.cli` are the only ones of the package that need typer and rich.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from em_bridge.errors import AgentBackupError, RedisUnavailable

_CONFIG = typer.Option(
    "--config", metavar="DIR", envvar="BACKUP_CONFIG", help="Folder of the two configuration files."
)
ConfigOption = Annotated[Path, _CONFIG]
RedisUrlOption = Annotated[
    str | None,
    typer.Option(
        "--redis-url", metavar="URL", envvar="REDIS_URL", help="Redis or Valkey to use.", show_envvar=True
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DEFAULT_CONFIG = Path("config")

_HINTS = {
    errno.ENOSPC: "free some space, or run `backup-worker prune`",
    errno.EACCES: "check owner and mode of the path, and the user you run as",
    errno.EROFS: "the file system is mounted read-only",
}


def new_app(help_text: str) -> typer.Typer:
    """Return a typer application with this project's settings, and `--config` and `--redis-url` before the command."""
    app = typer.Typer(
        help=help_text,
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )

    @app.callback()
    def before_every_command(
        config: Annotated[Path | None, _CONFIG] = None, redis_url: RedisUrlOption = None
    ) -> None:
        # The options of the command itself win: they read these variables only where they are not given.
        if config is not None:
            os.environ["BACKUP_CONFIG"] = str(config)
        if redis_url is not None:
            os.environ["REDIS_URL"] = redis_url

    return app


def group(app: typer.Typer, name: str, help_text: str) -> typer.Typer:
    """Add and return a group of commands, such as `history verify` below `history`."""
    sub = typer.Typer(help=help_text, rich_markup_mode="markdown", pretty_exceptions_enable=False)
    app.add_typer(sub, name=name)
    return sub


def emit(result: Any, *, as_json: bool, render: Callable[[Any], None]) -> None:
    """Print `result`: as one JSON document on stdout, or through `render` for people."""
    if as_json:
        sys.stdout.write(json.dumps(result, ensure_ascii=False, indent=2, default=str) + "\n")
        sys.stdout.flush()
    else:
        render(result)


def fail(message: str, *, hint: str | None = None) -> None:
    """Print one error, and its hint, on stderr."""
    sys.stderr.write(f"error: {message}\n")
    if hint:
        sys.stderr.write(f"hint: {hint}\n")
    sys.stderr.flush()


def log_to_stderr(level: int = logging.INFO) -> None:
    """Send log lines to stderr, one a line, with the time in UTC."""
    import time

    handler = logging.StreamHandler(sys.stderr)
    formatter = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("rq").setLevel(logging.WARNING)


def run(app: typer.Typer) -> NoReturn:
    """Run `app` on the process's arguments and exit with the code that the contract gives the outcome."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What agents write need not be text that UTF-8 can carry; escaped like this it is what JSON wants, too.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except AgentBackupError as error:
        fail(error.message, hint=error.hint)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno == errno.EPIPE:
            # The reader of our output went away (`| head`): nothing is wrong, and nobody is there to be told.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        where = f" “{os.fsdecode(error.filename)}”" if error.filename else ""
        fail(f"{(error.strerror or str(error)).lower()}{where}", hint=_HINTS.get(error.errno or 0))
        sys.exit(1)
    except Exception as error:
        # Importing redis takes longer than listing snapshots: only who has imported it can meet its errors.
        module = sys.modules.get("redis.exceptions")
        if module is None or not isinstance(error, module.RedisError):
            raise
        fail(f"redis: {error}", hint="check --redis-url or $REDIS_URL, and that the server runs")
        sys.exit(RedisUnavailable.exit_code)
    sys.exit(0)
