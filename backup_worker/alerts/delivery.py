"""Tell a human, once for a change of state, and again until somebody acknowledges it or it is resolved.

Raising an alert only writes it down in Redis, so it never blocks a backup; a maintenance job delivers what is due. An
alert counts as told to a receiver only if apprise says SUCCESS for it: every receiver is asked by itself, so that one
that is down is tried again, with growing pauses, without repeating the message to the others. A failed delivery, and
the lack of any receiver, are in the log and in the record. Passwords in the receivers' URLs are never shown.

A crash between sending and writing that down repeats the message: at least once, never lost.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgpack

from backup_worker.history import History
from backup_worker.receivers import Sent, Severity, receiver_of, scheme_of, send_with_apprise
from em_bridge.errors import AgentBackupError, NotFound

if TYPE_CHECKING:
    from redis import Redis

__all__ = [
    "Alert", "OpenAlert", "Send", "Sent", "Severity",
    "acknowledge", "deliver_due", "open_alerts", "pending_deliveries", "raise_alert", "receiver_of", "resolve", "tell",
]  # fmt: skip

log = logging.getLogger(__name__)

OPEN = "backup:alerts"
"""Redis hash of the open alerts: key -> msgpack map."""

REPEAT_S = 3600.0
INFO_S = 7 * 86400.0
"""How long a notice is remembered after it was told, so that raising it again is no news. It is not repeated."""

FIRST_PAUSE_S = 30.0
CLAIM_S = 300.0
"""How long a delivery may take before another process takes it over."""

NOBODY = "no receiver is configured"

Answer = TypeVar("Answer")
_RANK = {"info": 0, "warning": 1, "critical": 2}


@dataclass(frozen=True, slots=True)
class Alert:
    """What a human should know. `key` names the state it is about: the same key is the same alert."""

    key: str
    severity: Severity
    title: str
    body: str
    agent: str | None = None


@dataclass(frozen=True, slots=True)
class OpenAlert:
    """An alert with its life so far; times are Unix seconds.

    `count` is how often it was raised, `rounds` how often everybody was told, `told` which receivers
    (by a digest of their URL) know of the present round, `next_at` when the next round or try is due, `failures` how
    many tries in a row failed.
    """

    key: str
    severity: Severity
    title: str
    body: str
    agent: str | None
    opened_at: float
    last_at: float
    count: int = 1
    next_at: float = 0.0
    rounds: int = 0
    told: list[str] = field(default_factory=list)
    told_at: float | None = None
    failures: int = 0
    last_failure: str | None = None
    acknowledged_at: float | None = None
    acknowledged_by: str | None = None
    resolved_at: float | None = None


Send = Callable[[str, str, str, Severity], Sent]
"""Sends (url, title, body, severity); raises nothing."""


def raise_alert(client: Redis | None, alert: Alert, *, now: float) -> bool:
    """Open `alert`, or note that it was raised again; return whether that is news.

    News is a new alert, one that had been resolved, and one that became more severe (which also takes back an
    acknowledgement). Without Redis every alert is news: there is nothing to remember it by, and the caller tells
    people with `tell`.
    """
    if client is None:
        return True

    def change(known: OpenAlert | None) -> tuple[OpenAlert | None, bool]:
        if known is None or known.resolved_at is not None:
            return OpenAlert(**asdict(alert), opened_at=now, last_at=now, next_at=now), True
        worse = _RANK[alert.severity] > _RANK[known.severity]
        again = replace(known, **asdict(alert), last_at=now, count=known.count + 1)
        if worse:
            again = replace(
                again, next_at=now, told=[], failures=0, acknowledged_at=None, acknowledged_by=None
            )
        return again, worse

    return _change(client, alert.key, change)


def resolve(client: Redis | None, key: str, *, now: float) -> bool:
    """Close the alert `key`; return whether it was open. People are told once, unless it was a mere notice."""
    if client is None:
        return False

    def change(known: OpenAlert | None) -> tuple[OpenAlert | None, bool]:
        if known is None or known.resolved_at is not None:
            return known, False
        if known.severity == "info" and known.rounds:
            return None, True
        return replace(known, resolved_at=now, next_at=now, told=[], failures=0), True

    return _change(client, key, change)


def acknowledge(client: Redis, key: str, by: str, now: float) -> OpenAlert:
    """Note that `by` has seen the alert, which is not repeated any more. `NotFound` if it is not open."""

    def change(known: OpenAlert | None) -> tuple[OpenAlert | None, OpenAlert]:
        if known is None or known.resolved_at is not None:
            raise NotFound(
                f"there is no open alert “{key}”", hint="`backup-worker alerts` shows the open ones"
            )
        seen = replace(known, acknowledged_at=now, acknowledged_by=by)
        return seen, seen

    return _change(client, key, change)


def open_alerts(client: Redis) -> list[OpenAlert]:
    """Return what is open (not what is resolved and only waits to be told), worst and oldest first."""
    found = (one for one in _all(client) if one.resolved_at is None)
    return sorted(found, key=lambda one: (-_RANK[one.severity], one.opened_at, one.key))


def pending_deliveries(client: Redis, now: float) -> list[OpenAlert]:
    """Return what `deliver_due` would deliver now, oldest first."""
    return sorted(
        (one for one in _all(client) if _is_due(one, now)), key=lambda one: (one.opened_at, one.key)
    )


def deliver_due(
    client: Redis,
    urls: Sequence[str],
    history: History,
    now: float,
    *,
    repeat_s: float = REPEAT_S,
    send: Send | None = None,
) -> int:
    """Send every message that is due at `now` to every receiver that has not got it; return how many arrived.

    Any number of processes may call this at once: each message is claimed by one of them. Every attempt is a line in
    the history; that the history cannot be written stops no delivery.
    """
    send = send or send_with_apprise
    arrived = 0
    for one in pending_deliveries(client, now):
        claimed = _change(client, one.key, lambda known: _claim(known, now))
        if claimed is None:
            continue
        if _is_over(claimed):
            _change(client, one.key, lambda known: (None if known and _is_over(known) else known, None))
            continue
        results = [(url, _try(send, url, claimed)) for url in urls if _digest(url) not in claimed.told]
        arrived += sum(result.told for _, result in results)
        outcome = _outcome(claimed, urls, results, now, repeat_s)
        _record(history, claimed, results, outcome, now)
        _change(client, one.key, partial(_settle, sent=claimed, outcome=outcome))
    return arrived


def tell(
    urls: Sequence[str], alert: Alert, history: History, now: float, *, send: Send | None = None
) -> bool:
    """Tell people at once, without Redis: for a command that runs by itself. Return whether anybody was told."""
    message = OpenAlert(**asdict(alert), opened_at=now, last_at=now, next_at=now)
    results = [(url, _try(send or send_with_apprise, url, message)) for url in urls]
    _record(history, message, results, message, now)
    return any(result.told for _, result in results)


def _is_due(one: OpenAlert, now: float) -> bool:
    if one.next_at > now:
        return False
    # An acknowledged alert is quiet until its end.
    return one.resolved_at is not None or one.acknowledged_at is None


def _is_over(one: OpenAlert) -> bool:
    """Tell whether a notice was told and may be forgotten."""
    return one.severity == "info" and one.rounds > 0


def _claim(known: OpenAlert | None, now: float) -> tuple[OpenAlert | None, OpenAlert | None]:
    if known is None or not _is_due(known, now):
        return known, None
    claimed = replace(known, next_at=now + CLAIM_S)
    return claimed, claimed


def _try(send: Send, url: str, one: OpenAlert) -> Sent:
    title, severity = f"[{one.severity}] {one.title}", one.severity
    if one.resolved_at is not None:
        title, severity = f"[resolved] {one.title}", "info"
    try:
        return send(url, title, one.body, severity)
    except Exception as error:  # noqa: BLE001 - a receiver's plugin may fail in any way, and must stop no other
        return Sent(False, scheme_of(url), type(error).__name__)


def _outcome(
    one: OpenAlert, urls: Sequence[str], results: Sequence[tuple[str, Sent]], now: float, repeat_s: float
) -> OpenAlert | None:
    """Return the alert after a round of deliveries; None if it has come to its end."""
    told = [*one.told, *(_digest(url) for url, result in results if result.told)]
    failed = [result for _, result in results if not result.told]
    told_at = now if any(result.told for _, result in results) else one.told_at
    if failed:
        pause = min(FIRST_PAUSE_S * 2.0 ** min(one.failures, 16), repeat_s)
        reason = "; ".join(f"{result.receiver}: {result.detail}" for result in failed)
        return replace(
            one,
            told=told,
            told_at=told_at,
            failures=one.failures + 1,
            last_failure=reason,
            next_at=now + pause,
        )
    if one.resolved_at is not None:
        return None
    return replace(
        one,
        rounds=one.rounds + 1,
        told=[],
        told_at=told_at,
        failures=0,
        last_failure=None if urls else NOBODY,
        next_at=now + (INFO_S if one.severity == "info" else repeat_s),
    )


def _settle(
    known: OpenAlert | None, sent: OpenAlert, outcome: OpenAlert | None
) -> tuple[OpenAlert | None, None]:
    """Write a round's outcome into what may have changed meanwhile: raised again, acknowledged, resolved."""
    if known is None or known.next_at != sent.next_at:
        # Somebody made a new round of it (resolved, raised again, worse): that round is still to come.
        return known, None
    if outcome is None:
        return None, None
    return (
        replace(
            known,
            rounds=outcome.rounds,
            told=outcome.told,
            told_at=outcome.told_at,
            failures=outcome.failures,
            last_failure=outcome.last_failure,
            next_at=outcome.next_at,
        ),
        None,
    )


def _record(
    history: History,
    one: OpenAlert,
    results: Sequence[tuple[str, Sent]],
    outcome: OpenAlert | None,
    now: float,
) -> None:
    state = "resolved" if one.resolved_at is not None else "open"
    told = [result.receiver for _, result in results if result.told]
    failed = [f"{result.receiver}: {result.detail}" for _, result in results if not result.told]
    if not results and not one.told:
        failed = [NOBODY]
    if failed:
        log.error("alert “%s” (%s) did not arrive: %s", one.title, one.key, "; ".join(failed))
    try:
        history.append(
            "alert-delivery",
            now=now,
            key=one.key,
            state=state,
            agent=one.agent,
            title=one.title,
            told=told,
            failed=failed,
        )
    except AgentBackupError as error:
        log.error("the delivery of alert %s is not on the record: %s", one.key, error)


def _digest(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:16]


def _all(client: Redis) -> Iterator[OpenAlert]:
    for value in cast(dict[bytes, bytes], client.hgetall(OPEN)).values():
        yield _load(value)


def _load(value: bytes) -> OpenAlert:
    fields = msgpack.unpackb(value)
    # A newer version may have written more than this one knows.
    return OpenAlert(**{key: fields[key] for key in OpenAlert.__dataclass_fields__ if key in fields})


def _change(
    client: Redis, key: str, change: Callable[[OpenAlert | None], tuple[OpenAlert | None, Answer]]
) -> Answer:
    """Replace an alert by what `change` makes of it (None removes it), undisturbed by others; return its answer."""

    def attempt(pipe: Any) -> Answer:
        value = pipe.hget(OPEN, key)
        known = _load(value) if value is not None else None
        new, answer = change(known)
        pipe.multi()
        if new is None:
            pipe.hdel(OPEN, key)
        elif new != known:
            pipe.hset(OPEN, key, msgpack.packb(asdict(new)))
        return answer

    return cast(Answer, cast(Any, client).transaction(attempt, OPEN, value_from_callable=True))
