"""The heartbeat of a process, in the background.

Promise: while the pulse is open and `alive()` holds, a heartbeat of this incarnation is published every `interval_s`;
while Redis is away it keeps trying, and says so once. It never raises into the program that it beats for.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self, cast

import redis

from em_bridge import streams
from em_bridge.errors import AgentBackupError
from em_bridge.events import Heartbeat, encode
from em_bridge.reach import Reach

log = logging.getLogger(__name__)

OK: Final = "ok"


class Pulse:
    """Beats for `agent` every `interval_s` seconds through `client` while open; a context manager.

    `status` may be set at any time; anything but `ok` makes the agent DEGRADED. `alive` is asked before each beat, in
    the pulse's own thread: while it answers False there is no beat.
    """

    def __init__(
        self,
        client: redis.Redis,
        agent: str,
        *,
        interval_s: float = 1.0,
        pid: int | None = None,
        alive: Callable[[], bool] | None = None,
    ) -> None:
        self.agent = agent
        self.incarnation = uuid.uuid4().hex
        self.status = OK
        self._client = client
        self._interval_s = interval_s
        self._pid = os.getpid() if pid is None else pid
        self._alive = alive
        self._seq = 0
        self._registered = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"pulse-{agent}", daemon=True)
        self._reach = Reach(f"heartbeat of {agent}")
        # A wrong name must fail here and now, not in the background.
        self._next()

    def _next(self) -> Heartbeat:
        return Heartbeat(self.agent, self.incarnation, self._seq, self.status, self._pid)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                if self._alive is None or self._alive():
                    self._beat()
            except (redis.RedisError, OSError) as error:
                self._reach.lost(error, self._client)
                # A server that came back without its data has forgotten us.
                self._registered = False
            except AgentBackupError as error:
                # A status that cannot be published must not silence the heart.
                log.warning(
                    "heartbeat of %s: the status %r cannot be sent: %s", self.agent, self.status, error
                )
                self.status = "unspeakable"
            self._stop.wait(self._interval_s)

    def _beat(self) -> None:
        if not self._registered:
            # Known before its first message is routed.
            self._client.sadd(streams.SEEN, self.agent)
            self._registered = True
        self._client.xadd(streams.HEARTBEATS, cast(Any, encode(self._next())))
        self._seq += 1
        self._reach.back()

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def stop(self) -> None:
        """Stop beating; returns when the last beat under way is over."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
