"""Small programs that behave in every unpleasant way, and a place where they run as one agent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from backup_worker.recovery import processes
from backup_worker.recovery.processes import Agent
from tests.living_fleet import wait_for

URL = "redis://127.0.0.1:1/0"

READY = 'import os, signal, sys, time\ndef ready(): open(sys.argv[1] + str(os.getpid()), "w").close()\n'

STUBBORN = READY + "signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); time.sleep(60)"
SLEEPER = READY + "ready(); time.sleep(60)"
POLITE = (
    READY + 'signal.signal(signal.SIGTERM, lambda *_: (open("goodbye", "w").close(), sys.exit(0)))\n'
    "ready(); time.sleep(60)"
)
FAMILY = READY + (
    "for depth in range(2):\n"
    "    if os.fork() == 0:\n"
    "        os.setsid()\n"
    "        signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "        ready(); time.sleep(60); os._exit(0)\n"
    "ready(); time.sleep(60)"
)
DAEMON = READY + (
    "if os.fork(): os._exit(0)\nos.setsid()\nif os.fork(): os._exit(0)\nready(); time.sleep(60)"
)
NAMELESS = READY + (
    "if os.fork(): os._exit(0)\n"
    'os.execve(sys.executable, ["x", "-c", "import sys, os, time;"\n'
    "    \"open(sys.argv[1] + str(os.getpid()), 'w').close(); time.sleep(60)\", sys.argv[1]], {})\n"
)


class Place:
    """One agent whose program is given as text, and who is ready when it says so."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.ready = base / "ready"
        self.ready.mkdir()
        self.started: list[subprocess.Popen[bytes]] = []

    def agent(self, program: str = SLEEPER, name: str = "z") -> Agent:
        root = self.base / name
        root.mkdir(exist_ok=True)
        (root / "agent.py").write_text(program)
        return Agent(name, root, (sys.executable, "agent.py", f"{self.ready}/"), self.base / "var")

    def start(self, agent: Agent, ready: int = 1) -> int:
        before = len(self.pids)
        pid = processes.start(agent, redis_url=URL)
        self.await_ready(before + ready)
        return pid

    def by_hand(
        self, *command: str | Path, cwd: Path, env: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        before = len(self.pids)
        self.started.append(subprocess.Popen(list(map(str, command)), cwd=cwd, env=env))
        self.await_ready(before + 1)
        return self.started[-1]

    @property
    def pids(self) -> list[int]:
        return [int(path.name) for path in self.ready.iterdir()]

    def await_ready(self, count: int) -> None:
        wait_for(lambda: len(self.pids) >= count, f"{count} processes")

    def alive(self) -> list[int]:
        return [pid for pid in self.pids if is_alive(pid)]

    def close(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.kill()
            process.wait()


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
