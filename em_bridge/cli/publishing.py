"""`publish` and `send`: put something on the bus by hand."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from em_bridge import terminal
from em_bridge.cli._common import PATIENCE_S, server_url
from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, RedisUrlOption, emit

ReasonOption = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why.")]


def add_commands(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    publish = terminal.group(
        app,
        "publish",
        "Tell the fleet: an agent's state, an applied change. Example: `em-bridge publish state rick DEAD`",
    )
    publish.command("state")(publish_state)
    publish.command("change")(publish_change)
    app.command()(send)


def publish_state(
    agent: Annotated[str, typer.Argument(metavar="AGENT", help="The agent's id.")],
    state: Annotated[str, typer.Argument(metavar="STATE", help="ALIVE, DEGRADED or DEAD.")],
    reason: ReasonOption = "",
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish the state of an agent. DEAD starts its recovery.

    Example: `em-bridge publish state rick DEAD --reason "does not answer"`
    """
    from em_bridge.publisher import Publisher

    with Publisher(server_url(redis_url, config), patience_s=PATIENCE_S) as em:
        entry = em.agent_state(agent, state.upper(), reason=reason)
    _published({"stream": "em:agent-state", "entry": entry, "agent": agent, "state": state.upper()}, as_json)


def publish_change(
    agent: Annotated[str, typer.Argument(metavar="AGENT", help="The agent's id.")],
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Relative to the agent's root.")],
    by: Annotated[str, typer.Option("--by", metavar="WHO", help="Who made the change.")],
    approved_by: Annotated[
        str | None, typer.Option("--approved-by", metavar="WHO", help="Who approved it.")
    ] = None,
    change: Annotated[
        str | None, typer.Option("--change", metavar="ID", help="The change's id; a new one if left out.")
    ] = None,
    reason: ReasonOption = "",
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish that a change was applied to an agent's files. It is backed up.

    Example: `em-bridge publish change z priority_weights.json --by em --approved-by kari`
    """
    import uuid

    from em_bridge.publisher import Publisher

    change = change or f"change-{uuid.uuid4().hex[:12]}"
    with Publisher(server_url(redis_url, config), patience_s=PATIENCE_S) as em:
        entry = em.config_applied(change, agent, paths, by, approved_by, reason=reason)
    _published({"stream": "em:config-change", "entry": entry, "agent": agent, "change": change}, as_json)


def send(
    sender: Annotated[str, typer.Argument(metavar="FROM", help="Who sends it.")],
    to: Annotated[str, typer.Argument(metavar="TO", help="Who gets it.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The message; `-` reads it from stdin.")],
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send one message, also in the name of an agent that runs.

    Example: `em-bridge send kari z "the new weights are in"`
    """
    from em_bridge import messages

    payload = sys.stdin.buffer.read() if text == "-" else text.encode("utf-8", "surrogateescape")
    seq = messages.send_patiently(server_url(redis_url, config), sender, to, payload, patience_s=PATIENCE_S)
    emit(
        {"from": sender, "to": to, "seq": seq},
        as_json=as_json,
        render=lambda result: typer.echo(f"message {result['seq']} from {sender} to {to}"),
    )


def _published(result: dict[str, Any], as_json: bool) -> None:
    emit(result, as_json=as_json, render=lambda r: typer.echo(f"published {r['entry']} on {r['stream']}"))
