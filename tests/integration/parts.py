"""The running parts as real processes: started, looked into, killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.small_fleet import until


class Part:
    """One `backup-worker` command as a process, its output in a file."""

    def __init__(self, folder: Path, *words: str, env: dict[str, str] | None = None) -> None:
        self.output = folder / f"{words[0]}-{os.urandom(3).hex()}.log"
        clean = {key: value for key, value in os.environ.items() if key not in ("REDIS_URL", "BACKUP_CONFIG")}
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "backup_worker", *words],
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=clean | (env or {}), start_new_session=True,
            )  # fmt: skip
        self.ever: dict[int, psutil.Process] = {}
        self.family()

    @property
    def log(self) -> str:
        return self.output.read_text(errors="replace")

    def says(self, word: str, within_s: float = 20.0) -> None:
        until(lambda: word in self.log or self.process.poll() is not None, within_s)
        assert word in self.log, self.log

    def family(self) -> list[psutil.Process]:
        """Return the processes below this one, and remember them."""
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(self.process.pid).children(recursive=True)
            self.ever |= {one.pid: one for one in below}
            return below
        return []

    def living(self) -> list[psutil.Process]:
        """Return what lives of all that this one was ever seen to have started."""
        found = []
        for one in self.ever.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                if one.is_running() and one.status() != psutil.STATUS_ZOMBIE:
                    found.append(one)
        return found

    def kill(self) -> None:
        self.family()
        self.process.kill()
        self.process.wait()

    def stop(self, number: signal.Signals = signal.SIGTERM, within_s: float = 15.0) -> int:
        self.family()
        self.process.send_signal(number)
        return self.process.wait(within_s)

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        for one in self.living():
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


@contextlib.contextmanager
def running() -> Iterator[list[Part]]:
    """Yield a list; whatever part is put there is ended in the end."""
    parts: list[Part] = []
    try:
        yield parts
    finally:
        for part in parts:
            part.close()
