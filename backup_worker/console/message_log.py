"""Who wrote to whom, when and how much: the message log as it is shown to people, without what was said."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from em_bridge import events, streams
from em_bridge.errors import InvalidEvent

if TYPE_CHECKING:
    from redis import Redis

NEWEST = 50
LOOKED_AT = 5000


@dataclass(frozen=True, slots=True)
class Log:
    """A part of the message log, the newest first; `older` is the entry before which the next part begins."""

    rows: tuple[dict[str, Any], ...]
    older: str | None


def read(client: Redis, sender: str = "", to: str = "", before: str = "") -> Log:
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
