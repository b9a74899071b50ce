"""The open alerts, in Redis: one for each state that a human should know of, however often it is raised.

Writing one down is all that raising it does, so it never blocks a backup; `delivery` sends what is due. Each alert
counts its turns: every time there is something new to tell about it (it was opened, became worse, was resolved, or is
to be repeated) a new turn begins, in which each receiver hears of it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import msgpack

from backup_worker.config import SEVERITIES, Severity
from em_bridge.errors import NotFound

if TYPE_CHECKING:
    from redis import Redis

OPEN: Final = "backup:alerts"
"""Redis hash of the open alerts: key -> msgpack map."""

DUE: Final = "backup:alerts:due"
"""Sorted set of one member: from when on something is to be delivered, Unix seconds."""

RANK: Final = {severity: rank for rank, severity in enumerate(SEVERITIES)}

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Alert:
    """What a human should know. `key` names the state it is about: the same key is the same alert."""

    key: str
    severity: Severity
    title: str
    body: str
    agent: str | None = None

    def __post_init__(self) -> None:
        # They name files, and a file's name need not be text.
        for name in ("title", "body"):
            said = getattr(self, name).encode("utf-8", "backslashreplace").decode()
            object.__setattr__(self, name, said)


@dataclass(frozen=True, slots=True)
class OpenAlert:
    """An alert with its life so far; times are Unix seconds.

    `count` is how often it was raised; `turn` grows with everything there is to tell, `due_at` is when that was or will
    be, `told` are the receivers (by id) that know of the present turn, `notified` those that ever heard of the alert,
    `rounds` is how often everybody was told, the first time at `first_told_at`.
    """

    key: str
    severity: Severity
    title: str
    body: str
    agent: str | None
    opened_at: float
    last_at: float
    count: int = 1
    turn: int = 0
    due_at: float = 0.0
    rounds: int = 0
    told: list[str] = field(default_factory=list)
    notified: list[str] = field(default_factory=list)
    first_told_at: float | None = None
    told_at: float | None = None
    last_failure: str | None = None
    acknowledged_at: float | None = None
    acknowledged_by: str | None = None
    resolved_at: float | None = None

    @property
    def is_resolved(self) -> bool:
        """Whether only the notice of its end is still to be sent."""
        return self.resolved_at is not None

    @property
    def is_news(self) -> bool:
        """Whether the present turn is no repetition."""
        return self.rounds == 0 or self.is_resolved

    def next_turn(self, due_at: float, **changes: Any) -> OpenAlert:
        """Return the alert with something new to tell at `due_at`."""
        return replace(self, turn=self.turn + 1, due_at=due_at, told=[], **changes)


def raise_alert(client: Redis | None, alert: Alert, *, now: float) -> bool:
    """Open `alert`, or note that it was raised again; return whether that is news.

    News is a new alert, one that had been resolved, and one that became more severe (which also takes back an
    acknowledgement). Without Redis every alert is news: there is nothing to remember it by (see `direct`).
    """
    if client is None:
        return True

    def change(known: OpenAlert | None) -> tuple[OpenAlert | None, bool]:
        facts = asdict(alert)
        if known is None:
            return OpenAlert(**facts, opened_at=now, last_at=now, due_at=now), True
        if known.is_resolved:
            # Whoever heard of it before still waits for its end: that will be told to them, too.
            again = OpenAlert(**facts, opened_at=now, last_at=now, turn=known.turn + 1, due_at=now)
            return replace(again, notified=known.notified), True
        again = replace(known, **facts, last_at=now, count=known.count + 1)
        if RANK[alert.severity] <= RANK[known.severity]:
            return again, False
        return again.next_turn(now, rounds=0, acknowledged_at=None, acknowledged_by=None), True

    return change_alert(client, alert.key, change)


def resolve(client: Redis | None, key: str, *, now: float) -> bool:
    """Close the alert `key`; return whether it was open. People are told once, unless it was a mere notice."""
    # Nearly always there is nothing to close, and one question is cheaper than a transaction.
    if client is None or not client.hexists(OPEN, key):
        return False

    def change(known: OpenAlert | None) -> tuple[OpenAlert | None, bool]:
        if known is None or known.is_resolved:
            return known, False
        if known.severity == "info":
            return None, True
        return known.next_turn(now, resolved_at=now), True

    return change_alert(client, key, change)


def acknowledge(client: Redis, key: str, by: str, now: float) -> OpenAlert:
    """Note that `by` has seen the alert, which is not repeated any more. `NotFound` if it is not open."""

    def change(known: OpenAlert | None) -> tuple[OpenAlert | None, OpenAlert]:
        if known is None or known.is_resolved:
            raise NotFound(
                f"there is no open alert “{key}”", hint="`backup-worker alerts` shows the open ones"
            )
        seen = replace(known, acknowledged_at=now, acknowledged_by=by)
        return seen, seen

    return change_alert(client, key, change)


def open_alerts(client: Redis) -> list[OpenAlert]:
    """Return what is open (not what is resolved and only waits to be told), worst and oldest first."""
    found = (one for one in all_alerts(client) if not one.is_resolved)
    return sorted(found, key=lambda one: (-RANK[one.severity], one.opened_at, one.key))


def wake_at(client: Redis, at: float) -> None:
    """Have the alerts delivered at `at`, or earlier if that was asked for."""
    client.zadd(DUE, {"deliver": at}, lt=True)


def take_due(client: Redis, now: float) -> bool:
    """Tell whether alerts are to be delivered now; of many that ask, one is told so."""
    return bool(client.zremrangebyscore(DUE, "-inf", now))


def all_alerts(client: Any) -> Iterator[OpenAlert]:
    """Yield every alert, also those of which only the end is still to be told."""
    for value in cast(dict[bytes, bytes], client.hgetall(OPEN)).values():
        yield _load(value)


def store(pipe: Any, known: OpenAlert, new: OpenAlert | None) -> None:
    """Write what became of `known` (None: it is over) with `pipe`."""
    if new is None:
        pipe.hdel(OPEN, known.key)
    elif new != known:
        pipe.hset(OPEN, new.key, msgpack.packb(asdict(new)))


def change_alert(
    client: Redis, key: str, change: Callable[[OpenAlert | None], tuple[OpenAlert | None, Answer]]
) -> Answer:
    """Replace an alert by what `change` makes of it (None removes it), undisturbed by others; return its answer."""

    def attempt(pipe: Any) -> Answer:
        value = pipe.hget(OPEN, key)
        known = _load(value) if value is not None else None
        new, answer = change(known)
        pipe.multi()
        if known is not None:
            store(pipe, known, new)
        elif new is not None:
            pipe.hset(OPEN, key, msgpack.packb(asdict(new)))
        return answer

    return cast(Answer, cast(Any, client).transaction(attempt, OPEN, value_from_callable=True))


def _load(value: bytes) -> OpenAlert:
    fields = msgpack.unpackb(value)
    # A newer version may have written more than this one knows, and an older one less.
    return OpenAlert(**{key: fields[key] for key in OpenAlert.__dataclass_fields__ if key in fields})
