"""An agent that we start ourselves; see `backup_worker.recovery.processes` for what is promised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from backup_worker.recovery import processes
from backup_worker.recovery.processes import Running


class CommandAdapter:
    """Runs the argument list `command` in the agent's root."""

    def __init__(self, name: str, root: Path, state: Path, command: tuple[str, ...]) -> None:
        self.agent = processes.Agent(name, root, command, state)

    def running(self) -> list[Running]:
        """Return its live processes."""
        return processes.find_agent(self.agent)

    def strangers(self, running: Sequence[Running]) -> list[Running]:
        """Return those that do not descend from the process that was started last."""
        return processes.strangers(self.agent, running)

    def stop(self, *, term_grace_s: float) -> list[Running]:
        """End every process of it; raises FenceFailed."""
        return processes.fence(self.agent, term_grace_s=term_grace_s)

    def start(self, *, redis_url: str) -> int | None:
        """Start it as the leader of a session of its own."""
        return processes.start(self.agent, redis_url=redis_url)

    def log_lines(self, count: int = 50) -> list[str]:
        """Return the last lines of its log file."""
        return processes.last_log_lines(self.agent, count)

    def last_end(self) -> str:
        """Return its exit code or signal, if it has ended soon after its start."""
        return processes.last_end(self.agent)

    def describe(self) -> str:
        """Return the command line."""
        return " ".join(self.agent.command)
