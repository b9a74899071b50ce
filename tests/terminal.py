"""A program on a terminal of its own: what it shows, and how it leaves."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


class OnTerminal:
    """A program whose stderr, and stdout unless `stdout` is given, are a terminal of `columns` columns."""

    def __init__(
        self,
        words: Sequence[str | Path],
        *,
        cwd: Path,
        env: Mapping[str, str],
        columns: int = 100,
        stdout: int | None = None,
    ) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        self.process = subprocess.Popen(
            words, cwd=cwd, env={**env, "TERM": "xterm-256color"}, stdin=slave,
            stdout=slave if stdout is None else stdout, stderr=slave,
        )  # fmt: skip
        os.close(slave)
        self.shown = b""

    def read_until(self, wanted: bytes, within_s: float = 30) -> None:
        """Read what is shown until `wanted` is in it."""
        until = time.monotonic() + within_s
        while wanted not in self.shown:
            assert time.monotonic() < until, self.shown.decode(errors="replace")
            assert self._read(0.2) or self.process.poll() is None, self.shown.decode(errors="replace")

    def end(self, within_s: float = 30) -> int:
        """Wait until the program has ended; return its exit code."""
        until = time.monotonic() + within_s
        while self.process.poll() is None:
            assert time.monotonic() < until, self.shown.decode(errors="replace")
            self._read(0.1)
        while self._read(0.05):
            pass
        os.close(self._master)
        return self.process.returncode

    def _read(self, wait_s: float) -> bool:
        with contextlib.suppress(OSError):  # EIO: the program has ended, and so has its terminal.
            if select.select([self._master], [], [], wait_s)[0] and (more := os.read(self._master, 65536)):
                self.shown += more
                return True
        return False
