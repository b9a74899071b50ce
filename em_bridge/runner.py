"""A heartbeat for a program that knows nothing of this project: `em-bridge run NAME -- COMMAND`.

Promise: while the command's process lives (not stopped, not a zombie) and its health command exits 0, `NAME` beats;
with it, the beat ends. Signals reach the command, it dies with this process, and its exit code is ours (128 + number if
a signal ended it). Redis being away never disturbs the command. Raises `UsageError` if the command cannot be started.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from collections import deque
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Final, Self

from em_bridge.connection import connect
from em_bridge.errors import UsageError
from em_bridge.parent import die_with_parent
from em_bridge.pulse import Pulse

HEALTH_TIMEOUT_S: Final = 10.0
_FORWARDED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def run(
    name: str,
    command: Sequence[str],
    url: str | None = None,
    *,
    heartbeat_s: float = 1.0,
    health: str | None = None,
    health_timeout_s: float = HEALTH_TIMEOUT_S,
) -> int:
    """Run `command` to its end, beating for it as `name`; return its exit code.

    `health` is a shell command, run before each beat; a beat is left out while it fails or takes longer than
    `health_timeout_s`. To be called from the main thread.
    """
    client = connect(url, retrying=False)
    try:
        with _Signals() as signals:
            child = _start(name, command)
            try:
                alive = _Life(child, health, health_timeout_s)
                with Pulse(client, name, interval_s=heartbeat_s, pid=child.pid, alive=alive):
                    _attend(child, signals)
            finally:
                _end(child)
    finally:
        client.close()
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


class _Signals:
    """Collects the signals of this process while open, from before the command is started, so that none is lost."""

    def __init__(self) -> None:
        self._caught: deque[int] = deque()
        self._out, self._in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (*_FORWARDED, signal.SIGCHLD):
            self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._out)
        os.close(self._in)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._caught.append(number)
        with contextlib.suppress(BlockingIOError):
            os.write(self._in, b"x")

    def wait(self, timeout_s: float) -> list[int]:
        """Return the signals caught, at the latest after `timeout_s`."""
        if select.select([self._out], [], [], timeout_s)[0]:
            with contextlib.suppress(BlockingIOError):
                os.read(self._out, 4096)
        return [self._caught.popleft() for _ in range(len(self._caught))]


def _start(name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
    if not command:
        raise UsageError("there is no command to run", hint="em-bridge run NAME -- COMMAND [ARGUMENT…]")
    try:
        # No thread is running yet, so that code between fork and exec is safe. The command stays in our process group:
        # whoever ends the group ends both.
        return subprocess.Popen(
            list(command),
            env={"AGENT_ID": name, **os.environ},
            preexec_fn=die_with_parent(signal.SIGKILL),
        )
    except OSError as error:
        raise UsageError(
            f"the command “{command[0]}” cannot be started: {(error.strerror or str(error)).lower()}",
            hint="give its full path, or put it on $PATH",
        ) from None


def _attend(child: subprocess.Popen[bytes], signals: _Signals) -> None:
    """Pass signals on until the child has ended."""
    while child.poll() is None:
        for number in signals.wait(1.0):
            if number == signal.SIGCHLD or (number == signal.SIGINT and _from_terminal()):
                continue
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)


def _from_terminal() -> bool:
    """Say whether an interrupt is a Ctrl-C: then the terminal has sent it to the command as well."""
    try:
        return os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.kill()
        child.wait()


class _Life:
    """Says whether the child deserves a heartbeat."""

    def __init__(self, child: subprocess.Popen[bytes], health: str | None, timeout_s: float) -> None:
        self._child = child
        self._health = health
        self._timeout_s = timeout_s

    def __call__(self) -> bool:
        return _works(self._child.pid) and (self._health is None or self._is_healthy())

    def _is_healthy(self) -> bool:
        assert self._health is not None
        process = subprocess.Popen(
            ["/bin/sh", "-c", self._health],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(self._timeout_s) == 0
        except subprocess.TimeoutExpired:
            # Its children as well: a hung check a second would fill the machine.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False


def _works(pid: int) -> bool:
    """Say whether the process runs: a stopped one and a zombie have a pid, but no life. True where /proc is unknown."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in ("T", "t", "Z", "X")
    except FileNotFoundError:
        return not os.path.isdir("/proc/self")
    except OSError:
        return True
