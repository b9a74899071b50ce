"""The bus as a person sees it: streams with their groups, dead letters, the last messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backup_worker import due
from em_bridge import events, streams
from em_bridge.errors import InvalidEvent

if TYPE_CHECKING:
    from redis import Redis

NEWEST = 50
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
class Letter:
    """A dead letter on its stream."""

    entry: str
    at: float
    source: str
    source_entry: str
    reason: str
    raw: str


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


def dead_letters(client: Redis) -> list[Letter]:
    """Return the newest dead letters, the newest first."""
    rows: Any = client.xrevrange(streams.DEAD_LETTER, count=NEWEST)
    return [_letter(entry.decode(), fields) for entry, fields in rows]


def _letter(entry: str, fields: Any) -> Letter:
    at = streams.entry_time(entry)
    try:
        letter = events.decode(fields, stream=streams.DEAD_LETTER)
    except InvalidEvent as error:
        return Letter(entry, at, "?", "?", f"not readable itself: {error.message}", repr(fields)[:4000])
    assert isinstance(letter, events.DeadLetter)
    raw = "\n".join(f"{key}: {shown(content)}" for key, content in letter.raw.items())
    return Letter(entry, at, letter.source, letter.entry, letter.reason, raw)


def recent_messages(client: Redis) -> list[dict[str, Any]]:
    """Return the newest messages of the log, the newest first, without what they say."""
    rows: Any = client.xrevrange(streams.MESSAGES, count=NEWEST)
    found = []
    for raw_id, fields in rows:
        entry = raw_id.decode()
        row: dict[str, Any] = {"entry": entry, "at": streams.entry_time(entry)}
        try:
            message = events.decode(fields, stream=streams.MESSAGES)
        except InvalidEvent as error:
            found.append(row | {"problem": error.message})
            continue
        assert isinstance(message, events.Message)
        found.append(
            row
            | {
                "sender": message.sender,
                "to": message.to,
                "seq": message.seq,
                "size": len(message.payload),
                "problem": None,
            }
        )
    return found


def shown(content: Any, limit: int = 2000) -> str:
    """Return bytes (or anything) as text that can be printed."""
    text = content.decode("utf-8", "backslashreplace") if isinstance(content, bytes) else str(content)
    text = "".join(char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in text)
    return text if len(text) <= limit else text[:limit] + "…"


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
