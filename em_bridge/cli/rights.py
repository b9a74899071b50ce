"""`acl`: the least rights of each role, as the server reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from em_bridge.errors import ConfigError, NotFound
from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, emit
from em_bridge.whole_file import replaced


def add_commands(app: typer.Typer) -> None:
    """Add this module's command to `app`."""
    app.command()(acl)


def acl(
    agents: Annotated[
        list[str] | None, typer.Argument(metavar="[AGENT]...", help="Default: those of agents.json.")
    ] = None,
    passwords: Annotated[
        Path | None,
        typer.Option(
            "--passwords",
            metavar="FILE",
            help="JSON file of user: password, readable by you alone; users it lacks get a random one there.",
        ),
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Print an ACL file: a user for each role and agent with the rights it needs; the default user is off.

    Start the server with `aclfile users.acl`, and give each part its own URL: redis://USER:PASSWORD@HOST:PORT/0.
    Passwords are in the ACL file as SHA-256 only. Without --passwords nobody can log in until you set one.

    Example: `em-bridge acl z jay --passwords passwords.json > users.acl`
    """
    from em_bridge import acl as rights

    names = agents or _of_configuration(config)
    known = _passwords(passwords, rights.users(names)) if passwords else {}
    text = rights.acl_file(names, known)
    emit(
        {"users": rights.users(names), "acl": text.splitlines()},
        as_json=as_json,
        render=lambda result: typer.echo(text, nl=False),
    )


def _of_configuration(config: Path) -> list[str]:
    path = config / "agents.json"
    try:
        found = json.loads(path.read_text("utf-8"))["agents"]
        return list(dict(found))
    except FileNotFoundError:
        raise NotFound(f"there is no “{path}”", hint="name the agents: em-bridge acl z jay") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"“{path}” holds no agents", hint="name them: em-bridge acl z jay") from None


def _passwords(path: Path, users: list[str]) -> dict[str, str]:
    """Return the passwords in `path`, after adding one for each of `users` that has none."""
    import secrets

    known: dict[str, str] = {}
    try:
        known = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        pass
    except ValueError:
        raise ConfigError(f"“{path}” is not JSON", hint='it maps users to passwords: {"em": "…"}') from None
    if not isinstance(known, dict) or not all(isinstance(word, str) and word for word in known.values()):
        raise ConfigError(f"“{path}” does not map users to passwords", hint='write {"em": "…"}')
    missing = [user for user in users if user not in known]
    if missing:
        known |= {user: secrets.token_urlsafe(32) for user in missing}
        with replaced(path) as file:
            file.write(json.dumps(known, indent=2).encode("ascii") + b"\n")
    return known
