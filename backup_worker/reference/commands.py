"""docs/commands.md, made from the two programs themselves: every command with its arguments, options and an example."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption
from typer.main import get_group

_FIRST = """\
# Commands

`backup-worker` is the backup and recovery system; `em-bridge` is the bus between an execution manager (EM), its
agents and the system. `--help` says of each command what stands here.

Options that most commands share:

- `--config DIR`: the folder of the two configuration files; default `$BACKUP_CONFIG`, else `./config`.
- `--redis-url URL`: the Redis or Valkey to use; default `$REDIS_URL`, else the embedded server of the configuration,
  if `backup-worker up` runs one, else `redis://127.0.0.1:6379/0`. Also `rediss://` (TLS), `unix://` and
  `redis+sentinel://`: see [operations](operations.md#several-hosts).
- `--json`: the result as one JSON document on stdout, and nothing else there; log lines and errors go to stderr.

Both stand after the command, or before it for all: `backup-worker --config DIR list`.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | the operation failed, or found a fault |
| 2 | wrong usage, or a wrong configuration |
| 3 | Redis cannot be reached, or refuses |
| 4 | there is no such agent, snapshot, incident or change, or nothing to do it with |
| 130 | ended by Ctrl-C |

An error is one line on stderr that says what is wrong, and mostly a second one, `hint:`, that says what to do.

`backup-worker --install-completion` has bash, zsh or fish complete commands and options on Tab, and agents, tiers and
snapshots from the configuration and the repository; so does `em-bridge --install-completion` for its commands.

This page is made by `make docs` from the programs.
"""

Command = TyperCommand | TyperGroup
Parameter = TyperArgument | TyperOption

_SHARED = ("--config", "--redis-url", "--json", "--help", "--install-completion", "--show-completion")
_EXAMPLE = re.compile(r"Example: `([^`]+)`")


def page() -> str:
    """Return the text of the page."""
    parts = [_FIRST]
    for name, program in programs().items():
        parts.append(f"## {name}\n")
        for words, command in walked(program, (name,)):
            parts += _command(" ".join(words), command)
    return "\n".join(parts).rstrip("\n") + "\n"


def programs() -> dict[str, Command]:
    """Return both programs by their names."""
    from backup_worker.cli._app import app
    from em_bridge.cli import app as bridge

    return {name: get_group(one) for name, one in (("backup-worker", app), ("em-bridge", bridge))}


def walked(command: Command, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Command]]:
    """Yield every command below `command` that does something, with the words that call it."""
    if not isinstance(command, TyperGroup):
        yield words, command
        return
    if command.invoke_without_command and len(words) > 1:
        yield words, command
    for name, below in command.commands.items():
        if isinstance(below, Command) and not below.hidden:
            yield from walked(below, (*words, name))


def _command(name: str, command: Command) -> Iterator[str]:
    text = inspect.cleandoc(command.help or "")
    examples = _EXAMPLE.findall(text)
    yield f"### {name}\n"
    yield f"    {name}{_usage(command)}\n"
    yield _flowed(_EXAMPLE.sub("", text)) + "\n"
    params = [param for param in command.params if isinstance(param, Parameter)]
    rows = [_row(param) for param in params if not _is_shared(param)]
    if rows:
        yield "| | |\n| --- | --- |"
        yield from rows
        yield ""
    shared = [option for param in params for option in param.opts if option in _SHARED[:3]]
    if shared:
        yield f"And {', '.join(f'`{option}`' for option in shared)}.\n"
    for example in examples:
        yield f"```sh\n{example}\n```\n"


def _usage(command: Command) -> str:
    words = [_name(param) for param in command.params if isinstance(param, TyperArgument)]
    has_options = any(isinstance(param, TyperOption) for param in command.params)
    return "".join(f" {word}" for word in [*(["[OPTIONS]"] if has_options else []), *words])


def _is_shared(param: Parameter) -> bool:
    return isinstance(param, TyperOption) and param.opts[0] in _SHARED


def _row(param: Parameter) -> str:
    help_text = (getattr(param, "help", None) or "").replace("|", "\\|")
    if isinstance(param, TyperArgument):
        return f"| `{_name(param)}` | {help_text} |"
    value = "" if param.is_flag else f" {_name(param)}"
    names = ", ".join(f"`{option}{value}`" for option in (*param.opts, *param.secondary_opts))
    default = param.default
    if isinstance(default, (int, float, str)) and not isinstance(default, bool) and default != "":
        help_text += f" Default: `{default}`."
    return f"| {names} | {help_text}{' Required.' if param.required else ''} |"


def _name(param: Parameter) -> str:
    return param.metavar or (param.name or "").upper()


def _flowed(text: str) -> str:
    """Return the paragraphs of a help text, each on one line."""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())
