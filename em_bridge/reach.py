"""Redis comes and goes: one log line for each, however many calls fail in between."""

from __future__ import annotations

import logging

import redis

from em_bridge.connection import translate

log = logging.getLogger(__name__)


class Reach:
    """Says once, in the log, that Redis went away, and once that it is back."""

    def __init__(self, what: str, meanwhile: str = "") -> None:
        self._what = what
        self._meanwhile = meanwhile
        self.away = False

    def lost(self, error: Exception, client: redis.Redis) -> None:
        """Note an error; only the first of a row is logged."""
        if not self.away:
            reason = translate(error, client) or error
            log.warning("%s: %s%s", self._what, reason, f"; {self._meanwhile}" if self._meanwhile else "")
        self.away = True

    def back(self) -> None:
        """Note a success."""
        if self.away:
            log.info("%s: redis is back", self._what)
        self.away = False
