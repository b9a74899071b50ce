"""Streams for people and scripts: which entries, from when to when, as rows and as lines.

Promise: what cannot be decoded is shown as such, and nothing that an agent wrote reaches a terminal as control
characters. Raises `UsageError` for a position that is neither an entry id nor a time.
"""

from __future__ import annotations

import base64
import datetime
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, cast

import redis

from em_bridge import streams
from em_bridge.connection import MAX_BLOCK_S
from em_bridge.errors import InvalidEvent, UsageError
from em_bridge.events import Message, decode, to_wire
from em_bridge.streams import Fields

MAX_PAYLOAD_SHOWN: Final = 200
_HINT: Final = (
    "use an entry id (1795400000000-0), ISO 8601 (2026-11-23T07:00:00Z), or Unix seconds (1795400000)"
)
_FIRST_MILLISECONDS: Final = 10**11
"""A bare number from here on is a time in milliseconds, the first half of an entry id."""


def position(text: str, *, last: bool = False) -> str:
    """Return the entry id for an id or a time; with `last`, the end of that millisecond or second."""
    if re.fullmatch(r"\d{1,20}-\d{1,20}", text) or text in ("-", "+"):
        return text
    if re.fullmatch(r"\d{12,20}", text) and int(text) >= _FIRST_MILLISECONDS:
        return text
    try:
        seconds = float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else _iso(text)
    except ValueError:
        raise UsageError(f"“{text}” is neither an entry id nor a time", hint=_HINT) from None
    # An id without its second half means, as the end of a range, the whole millisecond.
    return streams.id_at(seconds).partition("-")[0] if last else streams.id_at(seconds)


def _iso(text: str) -> float:
    moment = datetime.datetime.fromisoformat(text)
    # Without a zone it is this machine's time, as a person at the prompt means it.
    return moment.astimezone().timestamp()


@dataclass(slots=True)
class View:
    """Entries of `stream` from `start` to `end` (ids or times), filtered; the filters apply to messages."""

    start: str | None = None
    end: str | None = None
    recipient: str | None = None
    sender: str | None = None
    stream: str = streams.MESSAGES
    limit: int | None = None

    def rows(self, client: redis.Redis) -> Iterator[dict[str, Any]]:
        """Yield what is there now."""
        first = position(self.start) if self.start else "-"
        last = position(self.end, last=True) if self.end else "+"
        left = self.limit
        for entry, fields in streams.read_range(client, self.stream, first, last):
            row = entry_row(self.stream, entry, fields)
            if self._wanted(row):
                yield row
                left = None if left is None else left - 1
                if left == 0:
                    return

    def followed(self, client: redis.Redis) -> Iterator[dict[str, Any]]:
        """Yield what is there from `start` (default: only what is new), then what comes, for ever."""
        at = streams.last_id(client, self.stream)
        if self.start:
            past = View(self.start, at, self.recipient, self.sender, self.stream)
            yield from past.rows(client)
        reader = cast(Any, client)
        while True:
            answer = reader.xread({self.stream: at}, count=1000, block=int(MAX_BLOCK_S * 500))
            for raw_id, fields in answer[0][1] if answer else ():
                at = raw_id.decode()
                row = entry_row(self.stream, at, fields)
                if self._wanted(row):
                    yield row

    def _wanted(self, row: dict[str, Any]) -> bool:
        return (self.recipient is None or row.get("to") == self.recipient) and (
            self.sender is None or row.get("from") == self.sender
        )


def entry_row(stream: str, entry: str, fields: Fields) -> dict[str, Any]:
    """Return an entry as a map that JSON can carry; `invalid` holds the reason if it cannot be decoded."""
    row: dict[str, Any] = {"id": entry, "time": _written(streams.entry_time(entry))}
    try:
        event = decode(fields, stream=stream)
    except InvalidEvent as problem:
        return row | {"type": None, "invalid": problem.message}
    return row | {"type": event.type} | {key: _plain(value) for key, value in to_wire(event).items()}


def message_row(message: Message) -> dict[str, Any]:
    """Return a received message as a row; its id and time are those of the log."""
    entry = message.log or message.entry or "0-0"
    row = {"id": entry, "time": _written(streams.entry_time(entry)), "type": message.type}
    return row | {key: _plain(value) for key, value in to_wire(message).items()}


def json_line(row: dict[str, Any]) -> str:
    """Return a row as one line of JSON."""
    return json.dumps(row, ensure_ascii=False)


def text_line(row: dict[str, Any]) -> str:
    """Return a row as one line for people."""
    head = f"{row['id']}  {row['time']}"
    if "invalid" in row:
        return f"{head}  invalid: {_safe(row['invalid'])}"
    if row["type"] == Message.type:
        return f"{head}  {row['from']} → {row['to']} #{row['seq']}  {_safe(_shown(row['payload']))}"
    rest = (
        f"{key}={_safe(_shown(value))}" for key, value in row.items() if key not in ("id", "time", "type")
    )
    return f"{head}  {row['type']}  {' '.join(rest)}"


def _plain(value: Any) -> Any:
    """Return bytes as text, or as `{"base64": …}` if they are not UTF-8."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _shown(value: Any) -> str:
    if isinstance(value, dict) and value.keys() == {"base64"}:
        return f"({len(base64.b64decode(value['base64']))} bytes, not text)"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_PAYLOAD_SHOWN else f"{text[:MAX_PAYLOAD_SHOWN]}… ({len(text)} characters)"


def _safe(text: str) -> str:
    return "".join(c if c.isprintable() else "�" for c in text)


def _written(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(min(seconds, 253402300799.0), datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
