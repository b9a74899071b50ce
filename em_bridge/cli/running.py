"""`em`, `agent` and `run`: processes that stay."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from em_bridge import terminal
from em_bridge.cli._common import server_url
from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, RedisUrlOption

HeartbeatOption = Annotated[
    float, typer.Option("--heartbeat", metavar="S", min=0.05, help="Seconds between two heartbeats.")
]


def add_commands(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    for command in (em, agent, run):
        app.command()(command)


def em(
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="The EM's agent id.")] = "em",
    retention_days: Annotated[
        float, typer.Option("--retention-days", metavar="D", min=0.001, help="How long the log is kept.")
    ] = 7.0,
    message_log: Annotated[
        Path | None,
        typer.Option(
            "--message-log",
            metavar="DIR",
            help="Folder to which the log is exported; default message-log in $AGENT_ROOT, if that is set.",
        ),
    ] = None,
    heartbeat: HeartbeatOption = 1.0,
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
) -> None:
    """Run a complete small execution manager: routing, monitoring, one at a time.

    It keeps a copy of the message log below its root, so that its own backups hold it (see `import`), and says in its
    log what is sent to it.

    Example: `em-bridge em --redis-url redis://127.0.0.1:6379/0`
    """
    from em_bridge.em import ExecutionManager

    terminal.log_to_stderr()
    if message_log is None and os.environ.get("AGENT_ROOT"):
        message_log = Path(os.environ["AGENT_ROOT"]) / "message-log"
    manager = ExecutionManager(
        server_url(redis_url, config),
        name,
        retention_s=retention_days * 24 * 3600,
        heartbeat_s=heartbeat,
        message_log=message_log,
        reads_inbox=True,
    )
    _on_end(manager.stop)
    manager.run()


def agent(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The agent's id.")],
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
    with Agent(
        name, server_url(redis_url, config), outbox=outbox or Path(f"{name}.outbox"), heartbeat_s=heartbeat
    ) as me:
        while not stop.is_set():
            message = me.receive(timeout_s=0.5)
            if message is not None:
                sys.stdout.write(line(logview.message_row(message)) + "\n")
                sys.stdout.flush()
                me.ack(message)


def run(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The agent's id.")],
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
    sys.exit(runner.run(name, command, server_url(redis_url, config), heartbeat_s=heartbeat, health=health))


def _on_end(stop: Callable[[], None]) -> None:
    def handle(number: int, frame: FrameType | None) -> None:
        stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
