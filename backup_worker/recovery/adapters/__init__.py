"""How an agent is run: one small interface to whoever starts and stops it.

    command       we start it ourselves, in a session of its own
    supervisord   a program of supervisord, over its XML-RPC
    systemd       a unit of systemd, by `systemctl`
    docker        a container, over the Docker API

The promise of all of them: `stop` returns only when the supervisor says that the agent is down and none of its
processes is left on this host, else it raises; `running` is empty only if both are so. A supervisor that cannot be
asked raises `AdapterError`: what is unknown is never taken for dead, and nothing is changed. Recovery acts on the
agent's own host, so the pids that a supervisor names are looked up here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from backup_worker.recovery.processes import Running
from em_bridge.errors import AgentBackupError

if TYPE_CHECKING:
    from backup_worker.config import AgentConfig


class Adapter(Protocol):
    """Starts, finds and ends one agent."""

    def running(self) -> list[Running]:
        """Return its live processes; one without a pid says that its supervisor is about to start it."""

    def strangers(self, running: Sequence[Running]) -> list[Running]:
        """Return those of `running` that do not belong to what was started last."""

    def stop(self, *, term_grace_s: float) -> list[Running]:
        """End it and return what was ended.

        What has not ended by itself after `term_grace_s` is killed. Raises FenceFailed if something is left.
        """

    def start(self, *, redis_url: str) -> int | None:
        """Start it and return its pid, if there is one yet; raises AgentBackupError with what is wrong.

        `redis_url` reaches only an agent that we start ourselves: the others have an environment of their own.
        """

    def log_lines(self, count: int = 50) -> list[str]:
        """Return the last lines that it wrote, or nothing if they cannot be had."""

    def last_end(self) -> str:
        """Return how its last process has ended (exit code, signal), or nothing if that is not known."""

    def describe(self) -> str:
        """Return who runs it and as what, for the record."""


def adapter_for(name: str, agent: AgentConfig, state: Path) -> Adapter:
    """Return the adapter of the agent's `start`; `state` is the folder of run records and logs.

    Raises AgentBackupError if the agent has no `start`: what may run as it is then unknown.
    """
    # An adapter is loaded only where it is used: most fleets have one kind.
    start = agent.start
    if start is None:
        raise AgentBackupError(
            f"agent “{name}” has no `start`, so its process cannot be proven gone, nor started; nothing was changed",
            hint="write `start` for it in agents.json, or stop it, `backup-worker restore` it and start it by hand",
        )
    if start.supervisord is not None:
        from backup_worker.recovery.adapters.supervisord import SupervisordAdapter

        return SupervisordAdapter(
            name, agent.root, state, start.supervisord.program, start.supervisord.server
        )
    if start.systemd is not None:
        from backup_worker.recovery.adapters.systemd import SystemdAdapter

        return SystemdAdapter(name, agent.root, state, start.systemd.unit, user=start.systemd.user)
    if start.docker is not None:
        from backup_worker.recovery.adapters.docker import DockerAdapter

        return DockerAdapter(name, agent.root, state, start.docker.container, start.docker.server)
    from backup_worker.recovery.adapters.command import CommandAdapter

    return CommandAdapter(name, agent.root, state, tuple(start.command or ()))
