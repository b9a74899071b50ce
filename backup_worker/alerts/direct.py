"""Tell people without Redis: for a command that runs by itself, and for the scheduler while Redis is away.

What was told is remembered in a small file in the state folder, so that a command that a timer runs every minute does
not page every minute: the same alert is told again only after pauses that double, and its end is told once. If that
file cannot be read or written, people are told too often rather than not at all. Silences are kept in Redis, and do
not count here.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from backup_worker.alerts import delivery, kinds
from backup_worker.alerts.book import RANK, Alert, OpenAlert
from backup_worker.alerts.delivery import Send
from backup_worker.alerts.planner import DEFAULT_POLICY, LONGEST_PAUSE_S, NOBODY, Delivery, Policy
from backup_worker.alerts.receivers import send_with_apprise
from backup_worker.config import Receiver
from backup_worker.history import History

log = logging.getLogger(__name__)

FILE: Final = "alerts-told.json"


@dataclass(frozen=True, slots=True)
class Direct:
    """Tells the `receivers` at once; remembers in `memory`, a folder, what it has told."""

    receivers: Sequence[Receiver]
    history: History
    memory: Path
    policy: Policy = DEFAULT_POLICY
    send: Send = send_with_apprise

    def tell(self, alerts: Sequence[Alert], now: float) -> list[Alert]:
        """Tell, in one message, of those of `alerts` that are not known yet; return them, told or not."""
        with self._remembered() as known:
            news = [one for one in alerts if self._is_due(one, known.get(one.key), now)]
            if not news:
                return []
            before = [known.get(one.key, {}) for one in news]
            messages = [_open(one, then, now) for one, then in zip(news, before, strict=True)]
            if self._deliver(messages, now, is_end=False):
                for one, then in zip(news, before, strict=True):
                    known[one.key] = asdict(one) | {
                        "opened_at": then.get("opened_at", now), "told_at": now, "times": then.get("times", 0) + 1
                    }  # fmt: skip
            return news

    def end(self, keys: Sequence[str], now: float) -> list[str]:
        """Tell, in one message, that those of the alerts `keys` that were told are over; return them."""
        with self._remembered() as known:
            over = [key for key in dict.fromkeys(keys) if key in known]
            if over:
                ended = [_open(_alert(known[key]), known[key], now, resolved_at=now) for key in over]
                if self._deliver(ended, now, is_end=True):
                    for key in over:
                        del known[key]
            return over

    def _is_due(self, alert: Alert, told: dict[str, Any] | None, now: float) -> bool:
        if told is None or (told["severity"], told["title"]) != (alert.severity, alert.title):
            return True
        pause_s = self.policy.repeat_s * 2.0 ** min(told["times"] - 1, 16)
        return not 0 <= now - told["told_at"] < min(pause_s, max(self.policy.repeat_s, LONGEST_PAUSE_S))

    def _deliver(self, alerts: Sequence[OpenAlert], now: float, *, is_end: bool) -> bool:
        """Send one message to each receiver about what it takes; return whether anybody was told anything."""
        alerts = sorted(alerts, key=lambda one: -RANK[one.severity])
        deliveries = []
        for receiver in self.receivers:
            mine = tuple(one for one in alerts if receiver.takes(one.severity) or kinds.of(one.key).for_all)
            if mine:
                deliveries.append(Delivery(receiver, mine, is_end))
        if not deliveries:
            delivery.record(self.history, alerts, alerts[0].title, [], [NOBODY], now)
        anybody = False
        for done, title, sent, _ in delivery.send_all(deliveries, self.policy, self.send):
            failed = [] if sent.told else [f"{sent.receiver}: {sent.detail}"]
            delivery.record(self.history, done.alerts, title, [sent.receiver] * sent.told, failed, now)
            anybody = anybody or sent.told
        return anybody

    @contextlib.contextmanager
    def _remembered(self) -> Iterator[dict[str, dict[str, Any]]]:
        """Yield what was told, alone among all processes of this host; what is changed in it is written down."""
        try:
            self.memory.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = os.open(self.memory / FILE, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            log.warning("what was told cannot be remembered: %s", error)
            yield {}
            return
        with open(file, "r+b") as remembered:
            fcntl.flock(remembered, fcntl.LOCK_EX)
            before = remembered.read()
            known = _parsed(before)
            yield known
            after = json.dumps(known, ensure_ascii=False).encode()
            if after != before:
                # In place, for the lock is on this file: one cut short by a crash only makes for one page too many.
                with contextlib.suppress(OSError):
                    remembered.seek(0)
                    remembered.truncate()
                    remembered.write(after)


def _parsed(content: bytes) -> dict[str, dict[str, Any]]:
    try:
        known = json.loads(content or b"{}")
        return {key: one for key, one in known.items() if _alert(one) and one["told_at"] + one["times"] >= 0}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}


def _alert(told: dict[str, Any]) -> Alert:
    return Alert(*(told[name] for name in ("key", "severity", "title", "body", "agent")))


def _open(alert: Alert, told: dict[str, Any], now: float, *, resolved_at: float | None = None) -> OpenAlert:
    opened_at = told.get("opened_at", now)
    return OpenAlert(
        **asdict(alert),
        opened_at=opened_at,
        last_at=now,
        rounds=told.get("times", 0),
        resolved_at=resolved_at,
    )
