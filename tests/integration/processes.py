"""Programs of our own as real processes, and waiting for what they do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

EM_BRIDGE = str(Path(sys.executable).with_name("em-bridge"))


class Process:
    """A process in its own session, its output in files; killed at the end of the `with` block, if not before."""

    def __init__(self, folder: Path, name: str, *command: str, env: dict[str, str] | None = None) -> None:
        self.out = folder / f"{name}.out"
        self.err = folder / f"{name}.err"
        with self.out.open("ab") as out, self.err.open("ab") as err:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=err, start_new_session=True, env={**os.environ, **(env or {})}
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(10)

    def lines(self) -> list[str]:
        return self.out.read_text().splitlines()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.kill()
        if error is not None:
            print(f"--- {self.err.name}\n{self.err.read_text()[-3000:]}")


def em_bridge(folder: Path, name: str, url: str, *arguments: str) -> Process:
    return Process(folder, name, EM_BRIDGE, *arguments, env={"REDIS_URL": url})


def python(folder: Path, name: str, code: str, *arguments: str) -> Process:
    return Process(folder, name, sys.executable, "-c", code, *arguments)


def eventually(check: Callable[[], object], timeout_s: float = 15.0) -> None:
    """Wait until `check()` is true; let it fail with what it raises, or with what it returned last."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = check()
        if found:
            return
        assert time.monotonic() < deadline, f"still {found!r} after {timeout_s} s"
        time.sleep(0.02)
