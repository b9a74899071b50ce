"""The end of the record, read backwards: a page of the newest matching lines costs the same however long it is.

One page looks at `MAX_BYTES` at most; where nothing (more) was found in them, the next page goes on from there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK_BYTES = 1 << 18
MAX_BYTES = 6 << 20
_WRITTEN_OTHERWISE = frozenset('"\\,:')
"""A text with one of these may stand in a line in another form than people write it."""


@dataclass(frozen=True, slots=True)
class Found:
    """Lines of the record, the newest first; `older` is where the next page begins, empty at the beginning."""

    lines: tuple[dict[str, Any], ...]
    older: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """What lines must be like: their kind, their agent, and a text that stands in them somewhere."""

    kind: str = ""
    agent: str = ""
    text: str = ""

    def __bool__(self) -> bool:
        return bool(self.kind or self.agent or self.text)

    def line(self, raw: bytes) -> dict[str, Any] | None:
        """Return the line, if it is one and is wanted."""
        # Most lines are passed over by this, and never parsed.
        if self.kind.encode() not in raw or self.agent.encode() not in raw:
            return None
        plain = self.text.isascii() and not set(self.text) & _WRITTEN_OTHERWISE
        if plain and self.text.lower().encode() not in raw.lower():
            return None
        try:
            line = json.loads(raw)
        except ValueError:
            return None
        if not isinstance(line, dict) or "seq" not in line:
            return None
        alike = self.kind in ("", line.get("kind")) and self.agent in ("", line.get("agent"))
        if alike and self.text.lower() in json.dumps(line, ensure_ascii=False).lower():
            return line
        return None


def newest(files: Sequence[Path], wanted: Wanted, *, count: int, before: str = "") -> Found:
    """Return up to `count` wanted lines of `files` (oldest first) before a place that an earlier answer named.

    A place is `<name of a file>:<bytes>`; one that is none means the end.
    """
    name, _, offset = before.rpartition(":")
    known = {path.name: index for index, path in enumerate(files)}
    index, end = (known[name], int(offset)) if name in known and offset.isdigit() else (len(files) - 1, None)
    lines: list[dict[str, Any]] = []
    left = MAX_BYTES
    while index >= 0 and left > 0 and len(lines) < count:
        found, begin, read = _in_file(files[index], wanted, count - len(lines), end, left)
        lines += found
        left -= read
        if begin:
            return Found(tuple(lines), f"{files[index].name}:{begin}")
        index, end = index - 1, None
    return Found(tuple(lines), f"{files[index].name}:{files[index].stat().st_size}" if index >= 0 else "")


def _in_file(
    path: Path, wanted: Wanted, count: int, end: int | None, most: int
) -> tuple[list[dict[str, Any]], int, int]:
    """Return wanted lines of one file, where they begin (0: nothing is before them), and how many bytes were read."""
    lines: list[dict[str, Any]] = []
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            begin = stop = size if end is None else min(end, size)
            for begin, raw in _backwards(file, stop):
                line = wanted.line(raw)
                if line is not None:
                    lines.append(line)
                if len(lines) == count or stop - begin >= most:
                    break
    except FileNotFoundError:
        return [], 0, 0
    return lines, begin, stop - begin


def _backwards(file: Any, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield the whole lines before `end` with their places, the last first."""
    rest = b""
    while end > 0:
        begin = max(0, end - BLOCK_BYTES)
        file.seek(begin)
        block = file.read(end - begin) + rest
        first, *lines = block.split(b"\n")
        place = begin + len(block)
        for raw in reversed(lines):
            place -= len(raw)
            if raw:
                yield place, raw
            place -= 1
        rest, end = first, begin
    if rest:
        yield 0, rest
