"""What every job and every part works with: the configuration, Redis, the repository, the record, the alerts.

The record and the alerts must never be the reason why a recovery stops: a line that cannot be written (the disk is
full) is kept in Redis and written with the next one that can; that failure is logged.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from backup_worker import alerts
from backup_worker.config import Config
from backup_worker.due import MaintenanceDue
from backup_worker.history import History
from backup_worker.snapshots import Repository
from em_bridge import clock, streams
from em_bridge.errors import AgentBackupError

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger(__name__)

RECORDED_TTL_S = 7 * 24 * 3600
"""How long it is remembered that something is on the record: longer than any job is run again."""

UNWRITTEN = "backup:history:unwritten"
"""History lines that wait for the disk, oldest first: JSON."""


@dataclass(slots=True)
class Runtime:
    """The configuration as of now, and the things that follow from it. `client` is None without Redis."""

    config: Config
    client: Redis | None = None
    redis_url: str = ""
    _repository: Repository | None = field(default=None, init=False)

    @property
    def redis(self) -> Redis:
        """The client, where Redis is needed."""
        assert self.client is not None, "this operation needs Redis"
        return self.client

    @property
    def repository(self) -> Repository:
        """The snapshots."""
        if self._repository is None:
            self._repository = Repository(self.config.schedule.repository)
        return self._repository

    @property
    def history(self) -> History:
        """The record."""
        return History(self.config.schedule.history)

    def record(self, kind: str, **facts: Any) -> None:
        """Put a line on the record, or keep it until it can be written."""
        now = clock.now()
        try:
            if self.client is not None:
                self._write_kept(self.client)
            self.history.append(kind, now=now, **facts)
        except (AgentBackupError, OSError) as error:
            log.error("the record cannot be written: %s", error)
            if self.client is None:
                raise
            self.client.rpush(UNWRITTEN, json.dumps({"kind": kind, "now": now, **facts}, default=str))

    def record_once(self, once: str, kind: str, **facts: Any) -> None:
        """Put a line on the record, unless a call with the same `once` did: for a job that may run twice.

        A crash behind the line and before its mark writes it again: twice is better than not at all.
        """
        mark = f"backup:recorded:{once}"
        if self.client is not None and self.client.exists(mark):
            return
        self.record(kind, **facts)
        if self.client is not None:
            self.client.set(mark, b"1", ex=RECORDED_TTL_S)

    def _write_kept(self, client: Redis) -> None:
        while (line := client.lindex(UNWRITTEN, 0)) is not None:
            facts = json.loads(line)
            self.history.append(facts.pop("kind"), now=facts.pop("now"), **facts)
            # Only now: a crash in between writes the line twice, which is better than not at all.
            client.lrem(UNWRITTEN, 1, line if isinstance(line, str) else line.decode())

    def alert(
        self, key: str, severity: alerts.Severity, title: str, body: str, *, agent: str | None = None
    ) -> None:
        """Open the alert `key`, unless it is open; a human is told by the next delivery, without Redis at once."""
        alert = alerts.Alert(key=key, severity=severity, title=title, body=body, agent=agent)
        if not alerts.raise_alert(self.client, alert, now=clock.now()):
            return
        if self.client is None:
            # First of all: that the record cannot be written may be a part of the same trouble.
            alerts.tell([one.url for one in self.config.schedule.alerts], alert, self.history, clock.now())
        self.record("alert", key=key, severity=severity, title=title, body=body, agent=agent)
        self._ask_for_delivery()

    def resolve(self, key: str) -> None:
        """Close the alert `key`, if it is open."""
        if alerts.resolve(self.client, key, now=clock.now()):
            self.record("alert-resolved", key=key)
            self._ask_for_delivery()

    def _ask_for_delivery(self) -> None:
        """Have the alerts sent now, by a job of its own: sending must not hold up what raised them."""
        if self.client is not None:
            streams.append(self.client, MaintenanceDue("deliver"))
