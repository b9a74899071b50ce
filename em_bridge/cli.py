"""The command line `em-bridge`: publish, send, look into the message log, replay, and run an EM, an agent, any program.

A command's result goes to stdout, log lines to stderr; the exit codes are those of the contract.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from em_bridge import terminal
from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, RedisUrlOption, emit

if TYPE_CHECKING:
    import redis

app = terminal.new_app("The bus between an execution manager, its agents and Agent Backup.")
publish = terminal.group(app, "publish", "Tell the fleet: an agent's state, an applied change.")

FromOption = Annotated[
    str | None,
    typer.Option("--from", metavar="ID|TIME", help="First entry: its id, ISO 8601, or Unix seconds."),
]
ToOption = Annotated[
    str | None,
    typer.Option("--to", metavar="ID|TIME", help="Last entry: its id, ISO 8601, or Unix seconds."),
]
RecipientOption = Annotated[
    str | None, typer.Option("--recipient", metavar="AGENT", help="Only messages to this agent.")
]
SenderOption = Annotated[
    str | None, typer.Option("--sender", metavar="AGENT", help="Only messages from this agent.")
]
HeartbeatOption = Annotated[
    float, typer.Option("--heartbeat", metavar="S", min=0.05, help="Seconds between two heartbeats.")
]
ReasonOption = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why.")]


@publish.command("state")
def publish_state(
    agent: Annotated[str, typer.Argument(metavar="AGENT")],
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

    with Publisher(redis_url, patience_s=_PATIENCE_S) as em:
        entry = em.agent_state(agent, state.upper(), reason=reason)
    _published({"stream": "em:agent-state", "entry": entry, "agent": agent, "state": state.upper()}, as_json)


@publish.command("change")
def publish_change(
    agent: Annotated[str, typer.Argument(metavar="AGENT")],
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
    with Publisher(redis_url, patience_s=_PATIENCE_S) as em:
        entry = em.config_applied(change, agent, paths, by, approved_by, reason=reason)
    _published({"stream": "em:config-change", "entry": entry, "agent": agent, "change": change}, as_json)


@app.command()
def send(
    sender: Annotated[str, typer.Argument(metavar="FROM")],
    to: Annotated[str, typer.Argument(metavar="TO")],
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
    seq = messages.send_patiently(redis_url, sender, to, payload, patience_s=_PATIENCE_S)
    emit(
        {"from": sender, "to": to, "seq": seq},
        as_json=as_json,
        render=lambda result: typer.echo(f"message {result['seq']} from {sender} to {to}"),
    )


@app.command()
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
    with _client(redis_url) as client:
        if as_json and not follow:
            emit(list(view.rows(client)), as_json=True, render=typer.echo)
            return
        line: Callable[[dict[str, Any]], str] = logview.json_line if as_json else logview.text_line
        rows: Iterator[dict[str, Any]] = view.followed(client) if follow else view.rows(client)
        for row in rows:
            sys.stdout.write(line(row) + "\n")
            if follow:
                sys.stdout.flush()


@app.command()
def replay(
    start: Annotated[str, typer.Option("--from", metavar="ID|TIME", help="First entry, as in `log`.")],
    end: ToOption = None,
    recipient: RecipientOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be delivered; change nothing.")
    ] = False,
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Deliver messages again to agents that do not have them; nobody gets one twice.

    Example: `em-bridge replay --from 2026-11-23T07:00:00Z --recipient z --dry-run`
    """
    from em_bridge import logview
    from em_bridge import replay as replaying

    first, last = logview.position(start), logview.position(end, last=True) if end else "+"
    with _client(redis_url) as client:
        plan = replaying.plan_replay(client, first, last, recipient=recipient)
        if not dry_run:
            plan = replaying.execute(client, plan)
    emit({**plan.as_dict(), "dry_run": dry_run}, as_json=as_json, render=_render_replay)


@app.command()
def em(
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="The EM's agent id.")] = "em",
    retention_days: Annotated[
        float, typer.Option("--retention-days", metavar="D", min=0.001, help="How long the log is kept.")
    ] = 7.0,
    heartbeat: HeartbeatOption = 1.0,
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
) -> None:
    """Run a complete small execution manager: routing, monitoring, one at a time.

    Example: `em-bridge em --redis-url redis://127.0.0.1:6379/0`
    """
    from em_bridge.em import ExecutionManager

    terminal.log_to_stderr()
    manager = ExecutionManager(redis_url, name, retention_s=retention_days * 24 * 3600, heartbeat_s=heartbeat)
    _on_end(manager.stop)
    manager.run()


@app.command()
def agent(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    outbox: Annotated[
        Path | None, typer.Option("--outbox", metavar="FILE", help="Its durable queue; default NAME.outbox.")
    ] = None,
    heartbeat: HeartbeatOption = 1.0,
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a sample agent: it beats, prints what it receives, and acknowledges it.

    Example: `em-bridge agent jay --outbox jay.outbox`
    """
    import threading

    from em_bridge import logview
    from em_bridge.agent import Agent

    terminal.log_to_stderr()
    stop = threading.Event()
    _on_end(stop.set)
    line = logview.json_line if as_json else logview.text_line
    with Agent(name, redis_url, outbox=outbox or Path(f"{name}.outbox"), heartbeat_s=heartbeat) as me:
        while not stop.is_set():
            message = me.receive(timeout_s=0.5)
            if message is not None:
                sys.stdout.write(line(logview.message_row(message)) + "\n")
                sys.stdout.flush()
                me.ack(message)


@app.command()
def run(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="The program and its arguments.")
    ],
    health: Annotated[
        str | None,
        typer.Option("--health", metavar="COMMAND", help="Beat only while this shell command exits 0."),
    ] = None,
    heartbeat: HeartbeatOption = 1.0,
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
) -> None:
    """Run any program, and beat for it as NAME while it lives. Exits with the program's code.

    Example: `em-bridge run rick --health "curl -fs localhost:8080/health" -- python3 rick.py`
    """
    from em_bridge import runner

    terminal.log_to_stderr()
    sys.exit(runner.run(name, command, redis_url, heartbeat_s=heartbeat, health=health))


_PATIENCE_S = 5.0
"""A person waits at the prompt: shorter than the EM's patience."""


@contextlib.contextmanager
def _client(redis_url: str | None) -> Iterator[redis.Redis]:
    """Yield a client whose errors become ours."""
    from em_bridge.connection import connect, translate_errors

    with contextlib.closing(connect(redis_url)) as client, translate_errors(client):
        yield client


def _on_end(stop: Callable[[], None]) -> None:
    def handle(number: int, frame: FrameType | None) -> None:
        stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def _published(result: dict[str, Any], as_json: bool) -> None:
    emit(result, as_json=as_json, render=lambda r: typer.echo(f"published {r['entry']} on {r['stream']}"))


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


def main() -> NoReturn:
    """Run `em-bridge` on the process's arguments."""
    terminal.run(app)
