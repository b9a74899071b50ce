"""Who is to be told what now: a pure plan from the open alerts, the silences, the receivers and the time.

Promise: a critical alert waits for the window `group_s`, then it is a page. Everything else (what is milder, notices of
an end, and a storm: many alerts of one group) waits until nothing more of its group has come for `QUIET_WINDOWS`, at
most for `MOST_WINDOWS`, which also lie between two pages of the same (what is critical waits only behind its own kind).
So fifty deaths, told within a minute, are one page, and a storm that goes on is a page a minute. Repetitions come after
pauses that double, up to a day, and together where they are due within a quarter of a pause. A receiver that fails is
tried again after pauses that double, and at once when something critical is new; the others are not held up by it.

    open ── told to all ──> told ── pause over ──> told again ── …
      └ acknowledged: quiet        └ resolved ──> its end is told to all who heard of it ──> over
      └ silenced: quiet until the silence ends
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from backup_worker.alerts import kinds
from backup_worker.alerts.book import RANK, OpenAlert
from backup_worker.alerts.silences import Silence
from backup_worker.config import Receiver

GROUP_S: Final = 2.0
REPEAT_S: Final = 3600.0
LONGEST_PAUSE_S: Final = 86400.0
INFO_S: Final = 7 * 86400.0
"""How long a notice is remembered after it was told, so that raising it again is no news. It is not repeated."""

QUIET_WINDOWS: Final = 5
"""For how many windows no more of a group must come before it is told."""

MOST_WINDOWS: Final = 30
"""For how many windows at most something is held back, so that more of its group comes into the same message."""

STORM: Final = 4
"""How many alerts of a group, waiting to be told, are a storm: then also what is critical waits for the rest."""

ONCE_LASTS_S: Final = 86400.0
"""After how long a message of the clock, such as a digest, that could not be delivered is no longer tried."""

FIRST_RETRY_S: Final = 30.0
LONGEST_RETRY_S: Final = 900.0

NOBODY: Final = "no receiver is configured"
END: Final = "the end"
"""What the notices of an end count as, beside the kinds."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The window, the first pause before an open alert is repeated, and how moments and the runbook are written."""

    group_s: float = GROUP_S
    repeat_s: float = REPEAT_S
    zone: str = "UTC"
    runbook: str = kinds.RUNBOOK


DEFAULT_POLICY: Final = Policy()


@dataclass(frozen=True, slots=True)
class ReceiverState:
    """What is known of one receiver; times are Unix seconds.

    `failures` in a row; `retry_at` is when it is tried again after one; until `busy_until` somebody is sending to it;
    `pages` says when it last heard something new of each group, and something critical of each kind.
    """

    shown: str = ""
    failures: int = 0
    tried_at: float | None = None
    told_at: float | None = None
    retry_at: float = 0.0
    busy_until: float = 0.0
    last_failure: str | None = None
    pages: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message to one receiver about some alerts, the worst first; `is_end` if it is about their end."""

    receiver: Receiver
    alerts: tuple[OpenAlert, ...]
    is_end: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now: messages to send, what becomes of alerts without one, and when to look again.

    `changes` are pairs of an alert and what it becomes, None if it is over. `unheard` are those of them that are due
    and that no receiver takes, with the reason.
    """

    deliveries: tuple[Delivery, ...]
    changes: tuple[tuple[OpenAlert, OpenAlert | None], ...]
    unheard: tuple[tuple[OpenAlert, str], ...]
    next_at: float | None


def id_of(receiver: Receiver) -> str:
    """Return the name under which a receiver's state is kept; its URL cannot be told from it."""
    return hashlib.sha256(receiver.url.encode()).hexdigest()[:16]


def plan_delivery(
    alerts: Sequence[OpenAlert],
    silences: Sequence[Silence],
    receivers: Sequence[Receiver],
    states: Mapping[str, ReceiverState],
    now: float,
    policy: Policy = DEFAULT_POLICY,
) -> Plan:
    """Return what is to be done at `now`. `states` maps receivers' ids to what is known of them."""
    planning = _Planning(silences, receivers, states, now, policy)
    for alert in alerts:
        planning.take(alert)
    return planning.result()


def after_success(state: ReceiverState, delivery: Delivery, shown: str, now: float) -> ReceiverState:
    """Return the state of a receiver that has got `delivery`."""
    heard = [one for one in delivery.alerts if one.is_news]
    groups = {_group_of(one) for one in heard} | {_pages_of(one) for one in heard}
    pages = dict(state.pages) | dict.fromkeys(groups, now)
    return ReceiverState(shown=shown, tried_at=now, told_at=now, pages=pages)


def after_failure(state: ReceiverState, shown: str, detail: str, now: float) -> ReceiverState:
    """Return the state of a receiver that could not be reached."""
    pause_s = min(FIRST_RETRY_S * 2.0 ** min(state.failures, 16), LONGEST_RETRY_S)
    return replace(
        state, shown=shown, failures=state.failures + 1, tried_at=now, retry_at=now + pause_s, busy_until=0.0,
        last_failure=detail,
    )  # fmt: skip


class _Planning:
    def __init__(
        self,
        silences: Sequence[Silence],
        receivers: Sequence[Receiver],
        states: Mapping[str, ReceiverState],
        now: float,
        policy: Policy,
    ) -> None:
        self.silences, self.receivers, self.states = silences, receivers, states
        self.now, self.policy = now, policy
        self.changes: list[tuple[OpenAlert, OpenAlert | None]] = []
        self.unheard: list[tuple[OpenAlert, str]] = []
        self.waiting: dict[tuple[str, str], list[OpenAlert]] = {}
        self.looks: list[float] = [one.until for one in silences if one.until > now]

    def take(self, alert: OpenAlert) -> None:
        """See to one alert: has its turn come to an end, and who still waits to be told?"""
        wanted = self._wanted(alert)
        if wanted is None:
            return
        due = self._due_at(alert)
        once = kinds.of(alert.key).once
        if once and (not wanted or self.now - alert.opened_at > ONCE_LASTS_S):
            # Nobody wants it, or it is out of date: that it did not arrive is on the record.
            self.changes.append((alert, None))
        elif alert.severity == "info" and alert.rounds:
            # A notice that was told is only remembered.
            self._at(due, alert, None)
        elif not wanted:
            if alert.is_resolved:
                self.changes.append((alert, None))
            elif self._at(due, alert, self._next_round(alert)) and alert.severity != "info":
                why = NOBODY if not self.receivers else f"no receiver takes what is {alert.severity}"
                self.unheard.append((alert, why))
        elif all(id_of(one) in alert.told for one in wanted):
            self.changes.append((alert, None if alert.is_resolved or once else self._next_round(alert)))
        else:
            for receiver in wanted:
                if id_of(receiver) not in alert.told:
                    self.waiting.setdefault((id_of(receiver), _message_of(alert)), []).append(alert)

    def result(self) -> Plan:
        """Return the plan, when every alert was taken."""
        deliveries = []
        for receiver in self.receivers:
            for (identifier, message), alerts in self.waiting.items():
                if identifier == id_of(receiver) and (due := list(self._due(identifier, alerts))):
                    due.sort(key=lambda one: (-RANK[one.severity], one.opened_at, one.key))
                    deliveries.append(Delivery(receiver, tuple(due), is_end=message == END))
        changed = tuple(self.changes)
        self.looks += [after.due_at for _, after in changed if after is not None]
        return Plan(tuple(deliveries), changed, tuple(self.unheard), min(self.looks, default=None))

    def _wanted(self, alert: OpenAlert) -> list[Receiver] | None:
        """Return who is to hear of the present turn; None while it is quiet."""
        kind = kinds.of(alert.key)
        silenced = any(one.covers(alert, self.now) for one in self.silences)
        takes = [one for one in self.receivers if kind.for_all or one.takes(alert.severity)]
        if alert.is_resolved:
            return [
                one
                for one in self.receivers
                if id_of(one) in alert.notified or (one in takes and not silenced)
            ]
        if silenced or alert.acknowledged_at is not None:
            return None
        return takes

    def _due_at(self, alert: OpenAlert) -> float:
        return alert.due_at + (self.policy.group_s if alert.is_news else 0.0)

    def _at(self, due: float, alert: OpenAlert, after: OpenAlert | None) -> bool:
        """Let `alert` become `after` if it is `due`, else look again then."""
        if due > self.now:
            self.looks.append(due)
            return False
        self.changes.append((alert, after))
        return True

    def _next_round(self, alert: OpenAlert) -> OpenAlert:
        repeat_s = self.policy.repeat_s
        pause_s = min(repeat_s * 2.0 ** min(alert.rounds, 16), max(repeat_s, LONGEST_PAUSE_S))
        if alert.severity == "info":
            pause_s = INFO_S
        return alert.next_turn(self.now + pause_s, rounds=alert.rounds + 1)

    def _due(self, identifier: str, alerts: Sequence[OpenAlert]) -> Iterator[OpenAlert]:
        """Yield what goes into one message now; nothing if it is not time for it yet."""
        state = self.states.get(identifier, ReceiverState())
        times = self._times(alerts, state)
        urgent = any(self._is_urgent(one, state) for one in alerts)
        gate = max(state.busy_until, 0.0 if urgent else state.retry_at)
        when = max(min(times.values()), gate)
        if when > self.now:
            self.looks.append(when)
            return
        slack_s = self.policy.repeat_s / 4
        for one in alerts:
            # Whatever is new goes along, also what could still wait.
            if one.is_news or times[one.key] <= self.now + slack_s:
                yield one
            else:
                self.looks.append(times[one.key])

    def _times(self, alerts: Sequence[OpenAlert], state: ReceiverState) -> dict[str, float]:
        """Return when each of `alerts`, all that wait for the same message, is to be told to a receiver."""
        groups: dict[str, list[float]] = {}
        for one in alerts:
            if one.is_news:
                groups.setdefault(_group_of(one), []).append(self._due_at(one))
        return {one.key: self._time_of(one, groups.get(_group_of(one), []), state) for one in alerts}

    def _time_of(self, alert: OpenAlert, group: Sequence[float], state: ReceiverState) -> float:
        """Return when `alert` is to be told; `group` is when each of those was due that are new with it."""
        window_s, due = self.policy.group_s, self._due_at(alert)
        if not alert.is_news:
            return due
        longest_s = MOST_WINDOWS * window_s
        if alert.is_resolved or alert.severity != "critical" or len(group) >= STORM:
            due = min(max(group) - window_s + QUIET_WINDOWS * window_s, min(group) - window_s + longest_s)
        heard = state.pages.get(_pages_of(alert))
        return due if heard is None else max(due, heard + longest_s)

    def _is_urgent(self, alert: OpenAlert, state: ReceiverState) -> bool:
        """Tell whether `alert` is worth trying a receiver that has failed: it is critical, and came since."""
        if alert.severity != "critical" or alert.rounds or alert.is_resolved:
            return False
        return self._due_at(alert) <= self.now and (
            state.tried_at is None or self._due_at(alert) > state.tried_at
        )


def _group_of(alert: OpenAlert) -> str:
    """Return what an alert is held back together with: the ends of all, or what belongs to its kind."""
    return END if alert.is_resolved else kinds.of(alert.key).group


def _pages_of(alert: OpenAlert) -> str:
    """Return which earlier pages hold an alert back: what is critical waits only behind what was, of its own kind."""
    if alert.is_resolved or alert.severity != "critical":
        return _group_of(alert)
    return f"{kinds.name_of(alert.key)}, critical"


def _message_of(alert: OpenAlert) -> str:
    """Return which of a receiver's messages an alert goes into: its end, the open ones, or one of its own."""
    if alert.is_resolved:
        return END
    return alert.key if kinds.of(alert.key).once else ""
