"""Rules for the fields of events: each takes a value and returns it in its one form, or raises `ValueError`.

The error's text completes the sentence “<key> …”: `is not a whole number`. A rule accepts what msgpack yields as well
as what a Python caller would write (a list or a tuple), and nothing by coercion: a bool is not an int, text is not
bytes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

AGENT_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}\Z")
ENTRY_ID: Final = re.compile(r"[0-9]{1,20}-[0-9]{1,20}\Z")
MAX_LABEL: Final = 256
MAX_PATH: Final = 4096
MAX_COUNT: Final = 2**53
"""Numbers beyond this are not exact in Lua and in JavaScript."""
MAX_MOMENT: Final = 253_402_300_799.0
"""The last second of the year 9999; a time in milliseconds is beyond it."""


def wire(rule: Callable[[Any], Any], *, key: str | None = None, default: Any = dataclasses.MISSING) -> Any:
    """Return a dataclass field that travels under `key` (default: its name) and is checked by `rule`."""
    return dataclasses.field(default=default, metadata={"rule": rule, "key": key})


def shown(value: object) -> str:
    """Return a short quoted form of `value`, fit for a message of one line."""
    raw = value if isinstance(value, str) else repr(value)
    plain = "".join(c if c.isprintable() else "�" for c in raw[:65])
    return f"“{plain[:64]}…”" if len(plain) > 64 else f"“{plain}”"


def text(value: Any) -> str:
    """Accept any text that UTF-8 can carry."""
    if not isinstance(value, str):
        raise ValueError("is not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("is not valid UTF-8") from None
    return value


def label(value: Any) -> str:
    """Accept a name for people and keys: 1 to 256 printable characters."""
    text(value)
    if not value:
        raise ValueError("is empty")
    if len(value) > MAX_LABEL:
        raise ValueError(f"has {len(value)} characters, the limit is {MAX_LABEL}")
    if not value.isprintable():
        raise ValueError("holds control characters")
    return str(value)


def agent_id(value: Any) -> str:
    """Accept an agent id."""
    if not isinstance(value, str):
        raise ValueError("is not text")
    if not AGENT_ID.match(value):
        raise ValueError(f"is {shown(value)}, not an agent id (letters, digits, - and _, at most 63)")
    return value


def one_of(*allowed: str) -> Callable[[Any], str]:
    """Return a rule that accepts these words alone."""

    def rule(value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"is {shown(value)}, not one of {', '.join(allowed)}")
        return value

    return rule


def count(value: Any) -> int:
    """Accept a whole number from 0 to 2**53."""
    if type(value) is not int:
        raise ValueError("is not a whole number")
    if not 0 <= value <= MAX_COUNT:
        raise ValueError("is out of range")
    return value


def moment(value: Any) -> float:
    """Accept a time in Unix seconds, and return it as float."""
    if type(value) not in (int, float):
        raise ValueError("is not a number")
    if not math.isfinite(value):
        raise ValueError("is not a finite number")
    if not 0 <= value <= MAX_MOMENT:
        raise ValueError("is not a time in Unix seconds")
    return float(value)


def blob(value: Any) -> bytes:
    """Accept bytes."""
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    if not isinstance(value, bytes):
        raise ValueError("is not bytes")
    return value


def text_or_blob(value: Any) -> str | bytes:
    """Accept text or bytes: a signature travels as either."""
    return text(value) if isinstance(value, str) else blob(value)


def entry_id(value: Any) -> str:
    """Accept the id of a stream entry."""
    if not isinstance(value, str) or not ENTRY_ID.match(value):
        raise ValueError("is not a stream entry id")
    return value


def path(value: Any) -> str:
    """Accept a path that stays below the agent's root: relative, without `..`."""
    text(value)
    if not value:
        raise ValueError("holds an empty path")
    if len(value) > MAX_PATH or "\0" in value:
        raise ValueError("holds a path that no file system takes")
    if value.startswith("/"):
        raise ValueError(f"holds {shown(value)}, an absolute path")
    if ".." in value.split("/"):
        raise ValueError(f"holds {shown(value)}, which leaves the agent's root")
    return str(value)


def paths(value: Any) -> tuple[str, ...]:
    """Accept a list of relative paths."""
    if not isinstance(value, (list, tuple)):
        raise ValueError("is not a list of paths")
    return tuple(path(item) for item in value)


def contents(value: Any) -> Mapping[str, bytes]:
    """Accept a map of relative path to new content."""
    if not isinstance(value, Mapping):
        raise ValueError("is not a map of paths to bytes")
    return {path(key): _content(item) for key, item in value.items()}


def blobs(value: Any) -> Mapping[str, bytes]:
    """Accept a map of text to bytes."""
    if not isinstance(value, Mapping):
        raise ValueError("is not a map of text to bytes")
    return {text(key): _content(item) for key, item in value.items()}


def _content(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("holds a value that is not bytes")
    return value
