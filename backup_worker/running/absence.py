"""Tell people that Redis is away, from the one part that sees it: every other alert needs Redis.

Told without Redis, when it has been away (or full, or refused us) for longer than a restart takes; again after pauses
that double, and once when it is back. That telling fails stops nothing.
"""

from __future__ import annotations

import logging
from typing import Final

from backup_worker.config import ConfigWatch
from backup_worker.runtime import Runtime
from em_bridge import clock
from em_bridge.errors import AgentBackupError

log = logging.getLogger(__name__)

AFTER_S: Final = 60.0
LOOK_S: Final = 30.0
KEY: Final = "redis"


class Absence:
    """What one part has seen of Redis; `away` and `back` may be called as often as one likes."""

    def __init__(self, watch: ConfigWatch) -> None:
        self._watch = watch
        self._since: float | None = None
        self._look_at = 0.0
        # Whoever ran here before may have told, and not lived to tell the end.
        self._may_be_open = True

    def away(self, reason: str, *, at_once: bool = False) -> None:
        """Redis cannot be worked with; `at_once` if that does not mend itself."""
        now = clock.monotonic()
        self._since = now if self._since is None else self._since
        if (not at_once and now - self._since < AFTER_S) or now < self._look_at:
            return
        self._look_at = now + LOOK_S
        self._may_be_open = True
        body = f"{reason}: no backup is scheduled, no recovery begins and no other alert arrives until it is back"
        try:
            Runtime(self._watch.current).alert(
                KEY, "critical", "Redis cannot be reached, or takes nothing", body
            )
        except (AgentBackupError, OSError) as error:
            log.error("telling that Redis is away: %s", error)

    def back(self) -> None:
        """Redis works."""
        self._since = None
        if not self._may_be_open:
            return
        self._may_be_open = False
        try:
            Runtime(self._watch.current).resolve(KEY)
        except (AgentBackupError, OSError) as error:
            log.error("telling that Redis is back: %s", error)
