"""Run an agent's health command on files that are not the agent's own: time-limited, and alone.

It sees the folder as its home and as `AGENT_ROOT`, `AGENT_DRILL=1`, and no address of Redis: it must judge the files,
not speak for the living agent. Whatever it has started ends with it, and with us.
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

from backup_worker.supervisor import die_with_parent
from em_bridge import clock

WITHIN_S = 60.0
OUTPUT_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Health:
    """How a health command ended: its exit code (None: not in time), and the end of what it wrote."""

    exit_code: int | None
    output: str

    @property
    def ok(self) -> bool:
        """Whether the agent is well."""
        return self.exit_code == 0

    def as_json(self) -> dict[str, Any]:
        """Return the fields, and `ok`."""
        return {"ok": self.ok, "exit_code": self.exit_code, "output": self.output}


def run_health(command: Sequence[str], root: Path, agent: str, *, within_s: float = WITHIN_S) -> Health:
    """Run `command` in `root`; a program that cannot be started counts as exit code 127."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    program = shutil.which(command[0], path=path) or command[0]
    try:
        process = subprocess.Popen(
            [program, *command[1:]],
            cwd=root,
            env=_environment(path, root, agent),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent(signal.SIGKILL),
        )
    except OSError as error:
        return Health(127, f"{command[0]}: {(error.strerror or str(error)).lower()}")
    with process:
        assert process.stdout is not None
        output, in_time = _listen(process, process.stdout.fileno(), clock.monotonic() + within_s)
        # Before it is waited for: until then no other process group can have this number.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    return Health(code if in_time else None, output.decode(errors="replace"))


def _environment(path: str, root: Path, agent: str) -> dict[str, str]:
    ours = ("RQ_", "AGENT_", "REDIS_URL")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return clean | {"PATH": path, "AGENT_ID": agent, "AGENT_ROOT": str(root), "AGENT_DRILL": "1"}


def _listen(process: subprocess.Popen[bytes], pipe: int, deadline: float) -> tuple[bytes, bool]:
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
