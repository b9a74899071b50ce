"""What a message says: one alert as it is, many as a list; with each kind, where to look and where it is explained.

Names and reasons come from agents, files and the bus: what could move a cursor or begin a mail header is taken out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from backup_worker.alerts import kinds
from backup_worker.alerts.book import RANK, OpenAlert
from backup_worker.alerts.planner import Delivery, Policy
from backup_worker.units import age, moment

NAMES_IN_TITLE: Final = 3
LISTED: Final = 100
TITLE_LENGTH: Final = 160
LINE_LENGTH: Final = 240
BODY_LENGTH: Final = 4000


def compose(delivery: Delivery, policy: Policy) -> tuple[str, str]:
    """Return the title and the body of a message."""
    alerts = delivery.alerts
    mark: str = max(alerts, key=lambda one: RANK[one.severity]).severity
    if delivery.is_end:
        mark = "resolved"
    elif kinds.of(alerts[0].key).once:
        mark = kinds.of(alerts[0].key).name
    if len(alerts) == 1:
        title, body = _one_line(alerts[0].title, TITLE_LENGTH), _one(alerts[0], policy)
    else:
        title, body = _title(alerts), "\n".join(_list(alerts, policy))
    return f"[{mark}] {title}", body


def _one(alert: OpenAlert, policy: Policy) -> str:
    parts = [_plain(alert.body)[:BODY_LENGTH]]
    if alert.is_resolved:
        parts.append(f"It began {moment(alert.opened_at, policy.zone)} and was over after {_lasted(alert)}.")
    elif alert.rounds:
        parts.append(f"It is open since {moment(alert.opened_at, policy.zone)}; nobody has acknowledged it.")
    if not kinds.of(alert.key).once:
        pointers = list(_pointers([alert], policy))
        if not alert.is_resolved and alert.severity != "info":
            pointers.append(f"seen:    backup-worker ack {_one_line(alert.key)}")
        parts.append("\n".join(pointers))
    return "\n\n".join(part for part in parts if part)


def _title(alerts: Sequence[OpenAlert]) -> str:
    count = Counter(kinds.of(one.key).name for one in alerts)
    if len(count) > 1:
        return _one_line(f"{len(alerts)} alerts: " + ", ".join(f"{n} {name}" for name, n in count.items()))
    names = list(dict.fromkeys(one.agent for one in alerts if one.agent))
    shown = ", ".join(names[:NAMES_IN_TITLE])
    if len(names) > NAMES_IN_TITLE:
        shown += f" and {len(names) - NAMES_IN_TITLE} more"
    return _one_line(
        f"{len(alerts)} times: {kinds.of(alerts[0].key).title}" + (f": {shown}" if shown else "")
    )


def _list(alerts: Sequence[OpenAlert], policy: Policy) -> Iterator[str]:
    shown = alerts[:LISTED]
    for one in shown:
        line = _one_line(
            f"- [{one.severity}] {one.title}" + (f": {one.body}" if one.body else ""), LINE_LENGTH
        )
        if one.is_resolved:
            line += f" (after {_lasted(one)})"
        elif one.rounds:
            line += f" (since {moment(one.opened_at, policy.zone)})"
        yield line
    if len(alerts) > len(shown):
        yield f"- and {len(alerts) - len(shown)} more: backup-worker alerts"
    first_of_kind = {kinds.of(one.key).name: one for one in reversed(alerts)}
    yield ""
    yield from _pointers(list(first_of_kind.values())[::-1], policy)


def _pointers(alerts: Sequence[OpenAlert], policy: Policy) -> Iterator[str]:
    """Yield where to look and what to read, for one alert of each kind."""
    for one in alerts:
        kind = kinds.of(one.key)
        yield f"look:    {_one_line(kind.command(one.key, one.agent))}"
        yield f"runbook: {kind.link(policy.runbook)}"


def _lasted(alert: OpenAlert) -> str:
    return age(max(0.0, (alert.resolved_at or alert.opened_at) - alert.opened_at))


def _one_line(text: str, length: int = TITLE_LENGTH) -> str:
    text = _plain(text).replace("\n", " ")
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _plain(text: str) -> str:
    return "".join(char if char == "\n" or char.isprintable() else " " for char in text)
