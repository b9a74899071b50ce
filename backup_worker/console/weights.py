"""An agent's scoring weights over time: every number in its weight files, snapshot by snapshot, with who let it in.

Read from the snapshots themselves, which never change, so each is read once and remembered. A snapshot whose weights
cannot be read (damaged, not JSON) has a gap in the plot, and is named.
"""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from backup_worker.snapshots import Scope
from backup_worker.snapshots.diff import is_number
from em_bridge.errors import AgentBackupError

if TYPE_CHECKING:
    from backup_worker.snapshots import Head, Repository

MOST_SNAPSHOTS = 120
"""The newest so many are looked at."""

MOST_LINES = 8
MAX_BYTES = 1 << 20
KEPT = 8192
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1130, 340, 52, 150, 14, 30
LABEL_H = 16

Values = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Point:
    """The weights in one snapshot; `changes` are key -> (old, new), None where there was or is none."""

    head: Head
    before: Head | None
    values: Values
    changes: Mapping[str, tuple[float | None, float | None]]


@dataclass(frozen=True, slots=True)
class Line:
    """One weight in the plot: the data of its path, its dots, and where its name stands."""

    key: str
    number: int
    path: str
    dots: tuple[tuple[float, float, float, str], ...]
    label_y: float
    last: float


@dataclass(frozen=True, slots=True)
class Plot:
    """The picture: lines, ticks of both axes as (place, text), and the moments at which something was approved."""

    lines: tuple[Line, ...]
    rows: tuple[tuple[float, str], ...]
    columns: tuple[tuple[float, float], ...]
    marks: tuple[tuple[float, Point], ...]


class Weights:
    """Remembers what was read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Values | None] = OrderedDict()

    def history(self, repository: Repository, heads: Sequence[Head], paths: Sequence[str]) -> list[Point]:
        """Return the points of `heads` (one agent's, oldest first) that hold a file like one of `paths`."""
        found: list[Point] = []
        before: tuple[Head, Values] | None = None
        for head in heads[-MOST_SNAPSHOTS:]:
            values = self._of(repository, head, paths)
            if not values:
                continue
            changes = _changes(before[1], values) if before else {}
            found.append(Point(head, before[0] if before else None, values, changes))
            before = (head, values)
        return found

    def _of(self, repository: Repository, head: Head, paths: Sequence[str]) -> Values | None:
        key = f"{repository.root}:{head.id}:{head.created_at}"
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        values = _read(repository, head, paths)
        with self._lock:
            self._known[key] = values
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        return values


def _read(repository: Repository, head: Head, paths: Sequence[str]) -> Values | None:
    wanted = Scope(tuple(paths))
    found: dict[str, float] = {}
    try:
        entries = [
            entry
            for entry in repository.get(head.id).entries
            if entry.kind == "file" and entry.path.endswith(".json") and wanted.covers(entry.path)
            and entry.size <= MAX_BYTES
        ]  # fmt: skip
        with repository.files(head.id) as files:
            for entry in entries:
                prefix = "" if len(entries) == 1 else f"{entry.path}: "
                found |= {
                    prefix + key: value for key, value in numbers(json.loads(files.read_bytes(entry.path)))
                }
    except (AgentBackupError, OSError, ValueError, RecursionError):
        return None
    return found


def numbers(document: Any, key: str = "") -> list[tuple[str, float]]:
    """Return every finite number of a JSON document with its place, written as `a.b[2]`."""
    if isinstance(document, dict):
        return [
            one
            for name, inner in document.items()
            for one in numbers(inner, f"{key}.{name}" if key else name)
        ]
    if isinstance(document, list):
        return [one for index, inner in enumerate(document) for one in numbers(inner, f"{key}[{index}]")]
    return [(key, float(document))] if is_number(document) else []


def _changes(old: Values, new: Values) -> dict[str, tuple[float | None, float | None]]:
    keys = [*old, *(key for key in new if key not in old)]
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def choose(points: Sequence[Point], wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (the keys to draw, all keys): those asked for, else the ones that changed most often, then the largest."""
    keys: dict[str, int] = {}
    for point in points:
        for key in point.values:
            keys.setdefault(key, 0)
        for key in point.changes:
            keys[key] = keys.get(key, 0) + 1
    asked = [key for key in wanted if key in keys]
    newest = points[-1].values if points else {}
    ranked = sorted(keys, key=lambda key: (-keys[key], -abs(newest.get(key, 0.0)), key))
    return (asked or ranked)[:MOST_LINES], sorted(keys)


def draw(points: Sequence[Point], keys: Sequence[str]) -> Plot | None:
    """Return the plot of `keys`; None without anything to draw. Pure."""
    drawn = [value for point in points for key, value in point.values.items() if key in keys]
    if not drawn:
        return None
    low, high, step = _scale(min(drawn), max(drawn))
    first, last = points[0].head.created_at, points[-1].head.created_at

    def x(at: float) -> float:
        share = (at - first) / (last - first) if last > first else 0.5
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    lines = []
    for number, key in enumerate(keys):
        pairs = [(point, point.values[key]) for point in points if key in point.values]
        if not pairs:
            continue
        # A weight holds until the snapshot that shows another one: a staircase, not a slope.
        path, previous = f"M{x(pairs[0][0].head.created_at)} {y(pairs[0][1])}", pairs[0][1]
        for point, value in pairs[1:]:
            if value != previous or point is pairs[-1][0]:
                path += f"H{x(point.head.created_at)}V{y(value)}"
                previous = value
        dots = tuple(
            (x(point.head.created_at), y(value), value, point.head.id)
            for point, value in pairs
            if key in point.changes
        )
        lines.append(Line(key, number, path, dots, y(pairs[-1][1]), pairs[-1][1]))
    count = round((high - low) / step)
    rows = tuple((y(low + step * i), f"{low + step * i:g}") for i in range(count + 1))
    columns = tuple((x(first + (last - first) * i / 4), first + (last - first) * i / 4) for i in range(5))
    marks = tuple((x(p.head.created_at), p) for p in points if p.head.approved is not None)
    return Plot(_apart(lines), rows, columns if last > first else columns[:1], marks)


def _scale(low: float, high: float) -> tuple[float, float, float]:
    """Return a lower and an upper end in round numbers, and the step between the rows."""
    if low == high:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return math.floor(low / step) * step, math.ceil(high / step) * step, step


def _apart(lines: Sequence[Line]) -> tuple[Line, ...]:
    """Move names that would stand on one another."""
    placed: list[Line] = []
    lowest: float = TOP - LABEL_H / 2
    for line in sorted(lines, key=lambda one: one.label_y):
        lowest = max(line.label_y, lowest + LABEL_H)
        placed.append(replace(line, label_y=lowest))
    over = placed[-1].label_y - (HEIGHT - BOTTOM)
    if over > 0:
        ceiling: float = HEIGHT - BOTTOM + LABEL_H
        moved = []
        for line in reversed(placed):
            ceiling = min(line.label_y, ceiling - LABEL_H)
            moved.append(replace(line, label_y=ceiling))
        placed = moved
    return tuple(sorted(placed, key=lambda one: one.number))
