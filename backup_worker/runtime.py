"""What every job and every part works with: the configuration, Redis, the repository, the record, the alerts.

The record and the alerts must never be the reason why a recovery stops: a line that cannot be written (the disk is
full) is kept in Redis and written with the next one that can; that failure is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from backup_worker import alerts
from backup_worker.config import Config
from backup_worker.history import History, HistoryUnwritable, history_of
from backup_worker.snapshots import Repository
from em_bridge import clock

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger(__name__)

RECORDED_TTL_S = 7 * 24 * 3600
"""How long it is remembered that something is on the record: longer than any job is run again."""


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
        return history_of(self.config.schedule)

    def record(self, kind: str, **facts: Any) -> None:
        """Put a line on the record, or keep it until it can be written."""
        now = clock.now()
        if self.client is None:
            self.history.append(kind, now=now, **facts)
            return
        # Not above: loading redis-py is a third of the start of a command that needs no Redis.
        from backup_worker.history import kept

        if kept.waiting(self.client):
            # Behind those that wait: the record is in the order in which things happened.
            kept.keep(self.client, kind, now, facts)
            kept.write(self.client, self.history, now)
        else:
            try:
                self.history.append(kind, now=now, **facts)
            except HistoryUnwritable as error:
                log.error("the record cannot be written, its lines wait in Redis: %s", error)
                kept.keep(self.client, kind, now, facts)

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

    @property
    def policy(self) -> alerts.Policy:
        """How people are told."""
        schedule = self.config.schedule
        repeat_s = schedule.limits.alert_repeat_minutes * 60
        return alerts.Policy(
            schedule.paging.group_seconds, repeat_s, schedule.timezone, schedule.paging.runbook
        )

    @property
    def direct(self) -> alerts.Direct:
        """The way to tell people without Redis."""
        schedule = self.config.schedule
        return alerts.Direct(schedule.alerts, self.history, schedule.state, self.policy)

    def alert(
        self, key: str, severity: alerts.Severity, title: str, body: str, *, agent: str | None = None
    ) -> None:
        """Open the alert `key`, unless it is open; a human is told by the next delivery, without Redis at once."""
        self.alert_all([alerts.Alert(key=key, severity=severity, title=title, body=body, agent=agent)])

    def alert_all(self, found: Sequence[alerts.Alert]) -> None:
        """Open several alerts that belong together, as `alert` does; without Redis they are one message."""
        now = clock.now()
        if self.client is None:
            # First of all: that the record cannot be written may be a part of the same trouble.
            news = self.direct.tell(found, now)
        else:
            client = self.client
            news = [one for one in found if alerts.raise_alert(client, one, now=now)]
            self._ask_for_delivery(now, any_news=bool(news))
        for one in news:
            self.record("alert", **asdict(one))

    def resolve(self, *keys: str) -> None:
        """Close those of the alerts `keys` that are open."""
        now = clock.now()
        if self.client is None:
            over = self.direct.end(keys, now)
        else:
            client = self.client
            over = [key for key in keys if alerts.resolve(client, key, now=now)]
            self._ask_for_delivery(now, any_news=bool(over))
        for key in over:
            self.record("alert-resolved", key=key)

    def silence(self, names: Sequence[str], *, for_s: float, by: str, why: str) -> alerts.Silence:
        """Begin a silence of kinds, agents or keys; raises `UsageError` and `NotFound` (see `alerts.silences`)."""
        agents = self.config.agents
        begun = alerts.silences.begin(self.redis, names, agents, for_s=for_s, by=by, why=why, now=clock.now())
        self.record("silence", **begun.as_json())
        return begun

    def unsilence(self, identifier: str, *, by: str) -> alerts.Silence:
        """End a silence early: what it held back is sent. Raises `NotFound`."""
        ended = alerts.silences.end(self.redis, identifier)
        self.record("silence-ended", **ended.as_json() | {"by": by})
        self._ask_for_delivery(clock.now(), any_news=True)
        return ended

    def _ask_for_delivery(self, now: float, *, any_news: bool) -> None:
        """Have the alerts sent when what belongs to them had time to come, by a job: sending must hold up nothing."""
        if any_news and self.client is not None:
            alerts.wake_at(self.client, now + self.policy.group_s)
