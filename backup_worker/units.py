"""How times, durations, numbers and sizes are written for people on the command line and in messages. Pure."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo


def moment(at: float | None, zone: str) -> str:
    """Return `at` (Unix seconds) in the schedule's time zone, or a dash."""
    if at is None:
        return "—"
    return datetime.fromtimestamp(at, ZoneInfo(zone)).strftime("%Y-%m-%d %H:%M:%S")


def age(seconds: float) -> str:
    """Return a duration as people say it: `12 s`, `5 min`, `3.2 h`, `4.0 d`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 2 * 86400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} d"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which takes an s for the plural: `1 file`, `0 files`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def size(number: int) -> str:
    """Return a number of bytes as people say it: `512 B`, `1.5 KiB`, `2.0 GiB`."""
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{number} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
