"""Send what the planner says is due, and write down truly what came of it.

An alert counts as told to a receiver only if apprise says SUCCESS for it: every receiver is asked by itself and at the
same time as the others, so that one that is down or hangs is tried again without holding up or repeating anything for
the rest. A failed delivery, and the lack of any receiver, are in the log and in the record. Passwords in the
receivers' URLs are never shown.

A crash between sending and writing that down repeats the message: at least once, never lost.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Final, cast

import msgpack

from backup_worker.alerts import book, planner, silences
from backup_worker.alerts.book import OpenAlert
from backup_worker.alerts.planner import DEFAULT_POLICY, Delivery, Plan, Policy, ReceiverState, id_of
from backup_worker.alerts.receivers import Sent, scheme_of, send_with_apprise
from backup_worker.alerts.wording import compose
from backup_worker.config import Receiver, Severity
from backup_worker.history import History
from em_bridge.errors import AgentBackupError

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger(__name__)

RECEIVERS: Final = "backup:alerts:receivers"
"""Redis hash of what is known of each receiver: id -> msgpack map."""

CLAIM_S: Final = 120.0
"""How long sending to one receiver may take before another process takes it over."""

AT_ONCE: Final = 8
"""How many receivers are asked at the same time."""

Send = Callable[[str, str, str, Severity], Sent]
"""Sends (url, title, body, severity); raises nothing."""


def deliver_due(
    client: Redis,
    receivers: Sequence[Receiver],
    history: History,
    now: float,
    *,
    policy: Policy = DEFAULT_POLICY,
    send: Send | None = None,
) -> int:
    """Send every message that is due at `now` to every receiver that has not got it; return how many arrived.

    Any number of processes may call this at once: each receiver is served by one of them. Every attempt is a line in
    the history; that the history cannot be written stops no delivery.
    """
    arrived = 0
    while True:
        plan = _claim(client, receivers, now, policy)
        for alert, why in plan.unheard:
            record(history, [alert], alert.title, [], [why], now)
        if not plan.deliveries:
            if plan.next_at is not None:
                book.wake_at(client, plan.next_at)
            return arrived
        for delivery, title, sent, is_last in send_all(plan.deliveries, policy, send or send_with_apprise):
            arrived += sent.told
            failed = [] if sent.told else [f"{sent.receiver}: {sent.detail}"]
            told = [sent.receiver] if sent.told else []
            record(history, delivery.alerts, title, told, failed, now)
            _settle(client, delivery, sent, now, is_last=is_last)


def receiver_states(client: Any) -> dict[str, ReceiverState]:
    """Return what is known of each receiver, by its id."""
    rows: dict[bytes, bytes] = client.hgetall(RECEIVERS)
    return {identifier.decode(): _load(value) for identifier, value in rows.items()}


def send_one(send: Send, url: str, title: str, body: str, severity: Severity) -> Sent:
    """Send one message; a receiver's plugin that fails in whatever way has told nobody, and stops no other."""
    try:
        return send(url, title, body, severity)
    except Exception as error:  # noqa: BLE001 - see above
        return Sent(False, scheme_of(url), type(error).__name__)


def record(
    history: History,
    alerts: Sequence[OpenAlert],
    title: str,
    told: Sequence[str],
    failed: Sequence[str],
    now: float,
) -> None:
    """Put an attempt to tell of `alerts` into the log and on the record; that it cannot be written stops nothing."""
    keys = [one.key for one in alerts]
    if failed:
        log.error("“%s” (%s) did not arrive: %s", title, ", ".join(keys[:10]), "; ".join(failed))
    agents = {one.agent for one in alerts}
    try:
        history.append(
            "alert-delivery",
            now=now,
            keys=keys,
            state="resolved" if alerts[0].is_resolved else "open",
            agent=agents.pop() if len(agents) == 1 else None,
            title=title,
            told=told,
            failed=failed,
        )
    except AgentBackupError as error:
        log.error("the delivery of “%s” is not on the record: %s", title, error)


def _claim(client: Redis, receivers: Sequence[Receiver], now: float, policy: Policy) -> Plan:
    """Plan, write down what becomes of alerts without a message, and claim the receivers of the messages."""

    def attempt(pipe: Any) -> Plan:
        states = receiver_states(pipe)
        plan = planner.plan_delivery(
            list(book.all_alerts(pipe)), silences.active(pipe, now), receivers, states, now, policy
        )
        pipe.multi()
        reasons = {alert.key: why for alert, why in plan.unheard}
        for before, after in plan.changes:
            if after is not None:
                after = replace(after, last_failure=reasons.get(after.key))
            book.store(pipe, before, after)
        for delivery in plan.deliveries:
            identifier = id_of(delivery.receiver)
            busy = replace(states.get(identifier, ReceiverState()), busy_until=now + CLAIM_S)
            pipe.hset(RECEIVERS, identifier, _packed(busy))
        known = {id_of(one) for one in receivers}
        if gone := [identifier for identifier in states if identifier not in known]:
            pipe.hdel(RECEIVERS, *gone)
        return plan

    watched = (book.OPEN, RECEIVERS, silences.SILENCES)
    return cast(Plan, cast(Any, client).transaction(attempt, *watched, value_from_callable=True))


def send_all(
    deliveries: Sequence[Delivery], policy: Policy, send: Send
) -> Iterator[tuple[Delivery, str, Sent, bool]]:
    """Yield each delivery with its title, what came of it, and whether it was its receiver's last; as they end."""
    by_receiver: dict[str, list[Delivery]] = {}
    for delivery in deliveries:
        by_receiver.setdefault(id_of(delivery.receiver), []).append(delivery)

    def work(some: Sequence[Delivery]) -> list[tuple[Delivery, str, Sent]]:
        done = []
        for delivery in some:
            title, body = compose(delivery, policy)
            severity: Severity = "info" if delivery.is_end else delivery.alerts[0].severity
            sent = send_one(send, delivery.receiver.url, title, body, severity)
            done.append((delivery, title, sent))
            if not sent.told:
                # It is down: the rest would only wait as long again. It is due with the next try.
                break
        return done

    if not by_receiver:
        return
    with ThreadPoolExecutor(min(AT_ONCE, len(by_receiver)), "deliver") as pool:
        for future in as_completed([pool.submit(work, some) for some in by_receiver.values()]):
            done = future.result()
            for delivery, title, sent in done:
                yield delivery, title, sent, delivery is done[-1][0]


def _settle(client: Redis, delivery: Delivery, sent: Sent, now: float, *, is_last: bool) -> None:
    """Write what came of a message into what may have changed meanwhile: raised again, acknowledged, resolved."""
    identifier = id_of(delivery.receiver)
    sent_turns = {one.key: (one.opened_at, one.turn) for one in delivery.alerts}

    def heard(one: OpenAlert) -> OpenAlert:
        if not sent.told:
            return replace(one, last_failure=f"{sent.receiver}: {sent.detail}")
        notified = list(dict.fromkeys([*one.notified, identifier]))
        one = replace(
            one, notified=notified, told_at=now, first_told_at=one.first_told_at or now, last_failure=None
        )
        if sent_turns[one.key] == (one.opened_at, one.turn):
            # Else there is something new to tell since, which is still to come.
            one = replace(one, told=[*one.told, identifier])
        return one

    def attempt(pipe: Any) -> None:
        known = [one for one in book.all_alerts(pipe) if one.key in sent_turns]
        state = receiver_states(pipe).get(identifier, ReceiverState())
        pipe.multi()
        for one in known:
            book.store(pipe, one, heard(one))
        if sent.told:
            busy_until = 0.0 if is_last else state.busy_until
            state = planner.after_success(state, delivery, sent.receiver, now)
            state = replace(state, busy_until=busy_until)
        else:
            state = planner.after_failure(state, sent.receiver, sent.detail, now)
        pipe.hset(RECEIVERS, identifier, _packed(state))

    cast(Any, client).transaction(attempt, book.OPEN, RECEIVERS)


def _packed(state: ReceiverState) -> bytes:
    return cast(bytes, msgpack.packb(asdict(state)))


def _load(value: bytes) -> ReceiverState:
    fields = msgpack.unpackb(value)
    return ReceiverState(**{key: fields[key] for key in ReceiverState.__dataclass_fields__ if key in fields})
