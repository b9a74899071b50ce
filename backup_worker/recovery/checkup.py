"""Ask an agent's own `health` command whether it is well.

The promise: the command ends within its limit, with everything that it started in its session, and its answer is the
exit code alone: 0 is well. A command that cannot be run is an answer too: not well.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

KEPT_CHARACTERS = 500
OURS = ("AGENT_ROOT", "AGENT_RUN")
"""Not passed on: by these a process is known as the agent itself, which its health command is not."""


@dataclass(frozen=True, slots=True)
class Checkup:
    """Whether the agent is well, and what there is to say: the exit code and the end of the output."""

    is_well: bool
    detail: str


def examine(name: str, root: Path, command: Sequence[str], *, redis_url: str, limit_s: float) -> Checkup:
    """Run `command` in `root`, with `AGENT_ID` and `REDIS_URL` set, for at most `limit_s`."""
    environment = {key: value for key, value in os.environ.items() if key not in OURS}
    path = os.pathsep.join([environment.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    environment |= {"AGENT_ID": name, "REDIS_URL": redis_url, "PATH": path}
    # A file, not a pipe: a child that keeps its end open would hold us up.
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                list(command), cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Checkup(False, f"health cannot be run: {(error.strerror or str(error)).lower()}")
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said = _end_of(output.fileno())
    verdict = f"exit code {code}" if code is not None else f"no answer within {limit_s:g} s"
    return Checkup(code == 0, f"health: {verdict}" + (f": {said}" if said else ""))


def _end_of(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    raw = os.pread(descriptor, 4 * KEPT_CHARACTERS, max(0, size - 4 * KEPT_CHARACTERS))
    lines = (line.strip() for line in raw.decode(errors="replace").splitlines())
    return " / ".join(filter(None, lines))[-KEPT_CHARACTERS:]
