"""Who may log in to the console, and what they may do there: user add, role, list, remove."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from em_bridge.errors import UsageError
from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, emit, group

if TYPE_CHECKING:
    from pathlib import Path

    from backup_worker.console.users import Users

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The user's name.")]


def add_commands(app: typer.Typer) -> None:
    """Add this group's commands to `app`."""
    users = group(
        app, "user", "Who may log in to the console. Example: `backup-worker user add kari --role approver`"
    )
    users.command()(add)
    users.command("role")(give_role)
    users.command("list")(list_users)
    users.command()(remove)


RoleOption = Annotated[
    str,
    typer.Option(
        "--role", help="viewer (looks), operator (acts, too) or approver (decides about changes, too)."
    ),
]


def add(
    name: NameArgument,
    role: RoleOption = "viewer",
    config: ConfigOption = DEFAULT_CONFIG,
    password_stdin: Annotated[
        bool, typer.Option("--password-stdin", help="Read the password from stdin, for scripts.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Give a known user a new password and role.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Add a user; from the first one on, the console asks everybody to log in.

    Example: `backup-worker user add kari --role approver`
    """
    users = _users(config)
    users.add(name, _password(from_stdin=password_stdin), role=role, replace=replace)
    _emit(name, role, f"{name} may log in to the console as {role}", as_json=as_json)
    if role == "viewer":
        typer.echo(
            f"a viewer only looks; for more: backup-worker user role {name} operator, or approver", err=True
        )


def give_role(
    name: NameArgument,
    role: Annotated[str, typer.Argument(metavar="ROLE", help="viewer, operator or approver.")],
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Give a user another role; it counts at once, also in open sessions.

    Example: `backup-worker user role kari approver`
    """
    _users(config).give_role(name, role)
    _emit(name, role, f"{name} is {role} now", as_json=as_json)


def list_users(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Show who may log in.

    Example: `backup-worker user list`
    """
    users = [{"name": name, "role": user.role} for name, user in _users(config).all().items()]
    nobody = "no users: the console is open to everybody on this machine, and to nobody else"
    emit(
        users,
        as_json=as_json,
        render=lambda rows: typer.echo("\n".join(f"{row['name']}  {row['role']}" for row in rows) or nobody),
    )


def remove(name: NameArgument, config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Take a user out; sessions of that user end at once.

    Example: `backup-worker user remove kari`
    """
    _users(config).remove(name)
    _emit(name, None, f"{name} may no longer log in to the console", as_json=as_json)


def _emit(name: str, role: str | None, text: str, *, as_json: bool) -> None:
    """Print what a user is now; `role` None: no longer one."""
    emit({"name": name, "role": role}, as_json=as_json, render=lambda _: typer.echo(text))


def _users(config_dir: Path) -> Users:
    from backup_worker.config import load
    from backup_worker.console.users import Users

    return Users(load(config_dir).schedule.state / "console")


def _password(*, from_stdin: bool) -> str:
    if from_stdin:
        return sys.stdin.readline().rstrip("\r\n")
    if not sys.stdin.isatty():
        raise UsageError("there is no terminal to ask for a password", hint="give --password-stdin")
    entered: str = typer.prompt("Password", hide_input=True, confirmation_prompt=True)
    return entered
