"""Work that outlives the request which asked for it: one thread, one piece of work a key at a time.

A page waits a moment for it and then says that it goes on. `close` ends what has not begun; what runs is finished.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Background(Generic[Result]):
    """Pieces of work by key."""

    def __init__(self, name: str) -> None:
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(1, name)
        self._running: dict[str, Future[Result]] = {}

    def start(self, key: str, work: Callable[[], Result]) -> Future[Result]:
        """Return the work of `key` that waits or runs, `work` if there is none."""
        with self._lock:
            self._running = {name: one for name, one in self._running.items() if not one.done()}
            if key not in self._running:
                self._running[key] = self._pool.submit(work)
            return self._running[key]

    def is_running(self, key: str) -> bool:
        """Tell whether the work of `key` waits or runs."""
        with self._lock:
            found = self._running.get(key)
            return found is not None and not found.done()

    def close(self) -> None:
        """Begin nothing any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
