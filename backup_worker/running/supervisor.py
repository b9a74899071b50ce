"""Child processes that live and die with their parent, and are started again when they fall over.

`Supervisor.run` keeps its children running until it is asked to stop (SIGTERM, SIGINT): then they get SIGTERM, and
SIGKILL after the grace. A child that exits is started again, at once the first time and then with growing pauses, so
that a part which cannot start does not burn a core; one for which there is no process or memory is tried again like
that, too. If this process is killed with -9, the kernel ends its children.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from em_bridge import clock
from em_bridge.parent import die_with_parent

log = logging.getLogger(__name__)

LONGEST_PAUSE_S = 30.0
STEADY_AFTER_S = 20.0
"""A child that lived this long counts as healthy: its next failure is answered at once again."""


@dataclass
class Child:
    """One program to keep running: its name, its arguments, and variables to add to the environment."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    failures: int = 0
    started_at: float = 0.0
    due_at: float = 0.0

    def start(self, now: float) -> None:
        """Start the program in its own session, so that Ctrl-C reaches it only through us."""
        self.process = subprocess.Popen(
            list(self.argv),
            env={**os.environ, **self.env},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )
        self.started_at = now


class Supervisor:
    """Keep `children` running."""

    def __init__(self, children: Sequence[Child], *, grace_s: float = 10.0) -> None:
        self.children = list(children)
        self.grace_s = grace_s
        self._stopping = False
        self._wake = threading.Event()

    def request_stop(self, *_: object) -> None:
        """Ask `run` to stop the children and return; usable as a signal handler."""
        self._stopping = True
        self._wake.set()

    def run(self, *, tick_s: float = 1.0, also: Callable[[], None] | None = None) -> None:
        """Block until asked to stop, calling `also` at every tick, and when a child of this process has ended.

        Must be called from the main thread (see `die_with_parent`). What `also` raises ends the children, too.
        """
        signal.signal(signal.SIGTERM, self.request_stop)
        signal.signal(signal.SIGINT, self.request_stop)
        signal.signal(signal.SIGCHLD, lambda *_: self._wake.set())
        try:
            while not self._stopping:
                if also is not None:
                    also()
                now = clock.monotonic()
                for child in self.children:
                    self._keep(child, now)
                # What ended, or asked us to stop, since the last time is looked at again.
                self._wake.wait(tick_s)
                self._wake.clear()
        finally:
            self.stop_children()

    def _keep(self, child: Child, now: float) -> None:
        if child.process is not None:
            code = child.process.poll()
            if code is None:
                return
            child.process = None
            steady = now - child.started_at >= STEADY_AFTER_S
            child.failures = 0 if steady else child.failures + 1
            self._put_off(child, now, f"ended with code {code}")
        if now >= child.due_at:
            try:
                child.start(now)
            except OSError as problem:
                # No memory, process or descriptor left for now: it is no reason to end what still runs.
                child.failures += 1
                self._put_off(child, now, f"cannot be started ({problem})")

    def _put_off(self, child: Child, now: float, why: str) -> None:
        pause_s = min(LONGEST_PAUSE_S, 2.0 ** (child.failures - 1)) if child.failures > 1 else 0.0
        log.warning("%s %s; starting it again in %.0f s", child.name, why, pause_s)
        child.due_at = now + pause_s

    def stop_children(self) -> None:
        """End every child: SIGTERM, and SIGKILL to what is left after the grace."""
        running = [child for child in self.children if child.process is not None]
        for child in running:
            if child.process is not None and child.process.poll() is None:
                child.process.terminate()
        deadline = clock.monotonic() + self.grace_s
        for child in running:
            if child.process is None:
                continue
            try:
                child.process.wait(max(0.0, deadline - clock.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("%s did not stop within %.0f s; killing it", child.name, self.grace_s)
                child.process.kill()
                child.process.wait()
            child.process = None
