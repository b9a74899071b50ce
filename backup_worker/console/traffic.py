"""The bus as a person sees it: streams with their groups, and who wrote to whom."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backup_worker import due
from em_bridge import events, streams
from em_bridge.errors import InvalidEvent

if TYPE_CHECKING:
    from redis import Redis

NEWEST = 50
LOOKED_AT = 5000
MAX_INBOXES = 500
STREAMS = (
    streams.AGENT_STATE,
    streams.CONFIG_CHANGE,
    due.STREAM,
    streams.MESSAGES,
    streams.HEARTBEATS,
    streams.DEAD_LETTER,
)


@dataclass(frozen=True, slots=True)
class Group:
    """A consumer group: `lag` entries were not delivered to it yet, `pending` ones are not finished."""

    name: str
    consumers: int
    pending: int
    lag: int | None
    last_delivered: str


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream: its length, and when its newest entry came (Unix seconds)."""

    name: str
    length: int
    last_at: float | None
    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class Log:
    """A part of the message log, the newest first; `older` is the entry before which the next part begins."""

    rows: tuple[dict[str, Any], ...]
    older: str | None


def look(client: Redis) -> list[Stream]:
    """Return the project's streams, then the inboxes of the agents."""
    inboxes: set[str] = set()
    for key in client.scan_iter(f"{events.INBOX_PREFIX}*", count=1000):
        inboxes.add(key.decode(errors="replace"))
        if len(inboxes) >= MAX_INBOXES:
            break
    return [_stream(client, name) for name in (*STREAMS, *sorted(inboxes))]


def _stream(client: Redis, name: str) -> Stream:
    if not client.exists(name):
        return Stream(name, 0, None, ())
    last = streams.last_id(client, name)
    found: Any = client.xinfo_groups(name)
    groups = tuple(
        Group(
            _text(group["name"]),
            group["consumers"],
            group["pending"],
            group.get("lag"),
            _text(group["last-delivered-id"]),
        )
        for group in found
    )
    length: Any = client.xlen(name)
    return Stream(name, int(length), streams.entry_time(last) if last != "0-0" else None, groups)


def messages(client: Redis, sender: str = "", to: str = "", before: str = "") -> Log:
    """Return messages before an entry (default: the newest), without what they say.

    Looks at `LOOKED_AT` entries at most, so that a filter that nothing matches costs no more.
    """
    end = f"({before}" if re.fullmatch(r"\d{1,20}-\d{1,20}", before) else "+"
    rows: Any = client.xrevrange(streams.MESSAGES, end, "-", count=LOOKED_AT if sender or to else NEWEST)
    found: list[dict[str, Any]] = []
    last = ""
    for raw_id, fields in rows:
        last = raw_id.decode()
        row = _message(last, fields)
        if sender in ("", row.get("sender")) and to in ("", row.get("to")):
            found.append(row)
        if len(found) == NEWEST:
            break
    return Log(tuple(found), last if len(found) == NEWEST or len(rows) == LOOKED_AT else None)


def _message(entry: str, fields: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"entry": entry, "at": streams.entry_time(entry), "problem": None}
    try:
        message = events.decode(fields, stream=streams.MESSAGES)
    except InvalidEvent as error:
        return row | {"problem": error.message}
    assert isinstance(message, events.Message)
    return row | {
        "sender": message.sender, "to": message.to, "seq": message.seq, "size": len(message.payload),
    }  # fmt: skip


def shown(content: Any, limit: int = 2000) -> str:
    """Return bytes (or anything) as text that can be printed."""
    text = content.decode("utf-8", "backslashreplace") if isinstance(content, bytes) else str(content)
    text = "".join(char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in text)
    return text if len(text) <= limit else text[:limit] + "…"


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
