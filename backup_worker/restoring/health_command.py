"""Ask an agent's own health command whether it is well: time-limited, and alone.

The answer is the exit code alone: 0 is well; a command that cannot be run is an answer too. Whatever it has started
ends with it, and with us. Asked about the living agent, it gets the agent's address of Redis, and neither `AGENT_ROOT`
nor `AGENT_RUN`, by which it would be taken for the agent itself. Asked about files elsewhere, it sees their folder as
its home and as `AGENT_ROOT`, `AGENT_DRILL=1`, and an address at which there is no Redis: it must judge the files, not
speak for the living agent, also not where that one is found by default.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from em_bridge import clock
from em_bridge.parent import die_with_parent

WITHIN_S = 60.0
OUTPUT_BYTES = 4096
SAID_CHARACTERS = 500
CANNOT_RUN = 127
"""The exit code of a shell that does not find its program."""

NO_REDIS = "unix:///dev/null"
"""An address at which nobody can listen."""


@dataclass(frozen=True, slots=True)
class Health:
    """How a health command ended: its exit code (None: not within `within_s`), and the end of what it wrote."""

    exit_code: int | None
    output: str
    within_s: float = WITHIN_S

    @property
    def ok(self) -> bool:
        """Whether the agent is well."""
        return self.exit_code == 0

    def __str__(self) -> str:
        verdict = f"no answer within {self.within_s:g} s"
        if self.exit_code is not None:
            verdict = f"exit code {self.exit_code}"
        said = " / ".join(filter(None, (line.strip() for line in self.output.splitlines())))[
            -SAID_CHARACTERS:
        ]
        return f"health: {verdict}" + (f": {said}" if said else "")

    def as_json(self) -> dict[str, Any]:
        """Return how it ended, and `ok`."""
        return {"ok": self.ok, "exit_code": self.exit_code, "output": self.output}


def run_health(
    command: Sequence[str],
    root: Path,
    agent: str,
    *,
    within_s: float = WITHIN_S,
    redis_url: str | None = None,
) -> Health:
    """Run `command` in `root` for at most `within_s`, about the living agent if it gets a `redis_url`."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    program = shutil.which(command[0], path=path) or command[0]
    try:
        process = subprocess.Popen(
            [program, *command[1:]],
            cwd=root,
            env=environment(path, root, agent, redis_url),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent(signal.SIGKILL),
        )
    except OSError as error:
        return Health(CANNOT_RUN, f"{command[0]}: {(error.strerror or str(error)).lower()}", within_s)
    with process:
        assert process.stdout is not None
        output, in_time = listen(process, process.stdout.fileno(), clock.monotonic() + within_s)
        # Before it is waited for: until then no other process group can have this number.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    return Health(code if in_time else None, output.decode(errors="replace"), within_s)


def environment(path: str, root: Path, agent: str, redis_url: str | None) -> dict[str, str]:
    """Return what the command sees; without `redis_url` it is asked about the files in `root` alone."""
    ours = ("RQ_", "AGENT_", "REDIS_URL")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    clean |= {"PATH": path, "AGENT_ID": agent}
    if redis_url is not None:
        return clean | {"REDIS_URL": redis_url}
    return clean | {"AGENT_ROOT": str(root), "AGENT_DRILL": "1", "REDIS_URL": NO_REDIS}


def listen(process: subprocess.Popen[bytes], pipe: int, deadline: float) -> tuple[bytes, bool]:
    """Keep the end of the output until the process has ended or the time is over; tell which it was."""
    kept = b""
    while (left_s := deadline - clock.monotonic()) > 0:
        # A grandchild may hold the pipe open for ever: the end of the process counts, not that of the pipe.
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
        readable, _, _ = select.select([pipe], [], [], 0.0 if ended else min(left_s, 0.05))
        data = os.read(pipe, 65536) if readable else b""
        kept = (kept + data)[-OUTPUT_BYTES:]
        if ended and not data:
            return kept, True
        if readable and not data and not ended:
            # It has closed its output and goes on: nothing to read any more, only to wait for.
            clock.sleep(min(left_s, 0.05))
    return kept, False
