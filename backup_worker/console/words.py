"""How the console writes times, durations, sizes and numbers. Pure."""

from __future__ import annotations

import json
import shlex
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

from backup_worker.snapshots.errors import printable

NOTHING = "—"
MINUS = "\N{MINUS SIGN}"
_STEPS = ((60, 1, "s"), (3600, 60, "min"), (2 * 86400, 3600, "h"), (60 * 86400, 86400, "d"))


def duration(seconds: float | None) -> str:
    """Return a length of time as people say it: `8 s`, `12 min`, `5 h`, `9 d`, `4 mo`."""
    if seconds is None:
        return NOTHING
    seconds = max(0.0, seconds)
    if 0 < seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    for limit, unit_s, name in _STEPS:
        if seconds < limit:
            return f"{int(seconds // unit_s)} {name}"
    return f"{int(seconds // (30 * 86400))} mo"


def ago(at: float | None, now: float) -> str:
    """Return how far `at` (Unix seconds) lies from `now`: `5 min ago`, `in 3 h`, `just now`."""
    if at is None:
        return "never"
    if abs(now - at) < 1:
        return "just now"
    return f"{duration(now - at)} ago" if at < now else f"in {duration(at - now)}"


def moment(at: float | None, zone: str) -> str:
    """Return `at` (Unix seconds) in `zone`, to the second."""
    return NOTHING if at is None else _local(at, zone).strftime("%Y-%m-%d %H:%M:%S")


def clock_time(at: float | None, zone: str) -> str:
    """Return the time of day with its weekday, for what lies within days: `Mon 07:00`."""
    return NOTHING if at is None else _local(at, zone).strftime("%a %H:%M")


def day(at: float, zone: str) -> str:
    """Return the day in `zone`, for the foot of a plot: `11-23`."""
    return _local(at, zone).strftime("%m-%d")


def iso(at: float | None) -> str:
    """Return `at` for the `datetime` attribute of a page, in UTC."""
    return "" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def size(count: float | None) -> str:
    """Return a number of bytes: `512 B`, `1.4 MiB`."""
    if count is None:
        return NOTHING
    if count < 1024:
        return f"{int(count)} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if count < 1024 or unit == "TiB":
            break
    return f"{count:.1f} {unit}"


def value(found: Any, limit: int = 200) -> str:
    """Return a value of a JSON document on one line, cut to `limit` characters."""
    text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def signed(number: float | None) -> str:
    """Return a difference with its sign: `+0.25`, and a real minus."""
    if number is None:
        return ""
    return f"{'+' if number > 0 else MINUS}{abs(number):g}"


def shown(content: Any, limit: int = 2000) -> str:
    """Return bytes (or anything) as text that can be printed."""
    text = content.decode("utf-8", "backslashreplace") if isinstance(content, bytes) else str(content)
    text = "".join(char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in text)
    return text if len(text) <= limit else text[:limit] + "…"


def word(found: object) -> str:
    """Return `found` as one word of a command: whoever copies it must not run what somebody else wrote."""
    return shlex.quote(printable(str(found)))


def _local(at: float, zone: str) -> datetime:
    return datetime.fromtimestamp(at, UTC).astimezone(ZoneInfo(zone))
