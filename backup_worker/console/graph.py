"""Who needs whom, drawn: columns from what needs nothing to what needs most. Pure; the template makes an SVG of it.

In a large fleet only the agents in trouble are drawn, with what they need and what needs them: a picture of hundreds
of boxes helps nobody.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

MOST = 40
"""How many boxes a picture has at most."""

COLUMN, ROW, BOX_W, BOX_H, MARGIN = 178, 46, 128, 30, 8


@dataclass(frozen=True, slots=True)
class Box:
    """An agent at its place (the left upper corner)."""

    name: str
    x: int
    y: int


@dataclass(frozen=True, slots=True)
class Edge:
    """A line from what is needed to who needs it, as data of an SVG path."""

    needed: str
    by: str
    path: str


@dataclass(frozen=True, slots=True)
class Graph:
    """The picture; `left_out` agents have no place in it."""

    boxes: tuple[Box, ...]
    edges: tuple[Edge, ...]
    width: int
    height: int
    left_out: int


def draw(needs: Mapping[str, Sequence[str]], troubled: Collection[str]) -> Graph | None:
    """Return the picture of agent -> what it needs; None where nobody needs anybody."""
    if not any(needs.values()):
        return None
    shown = set(needs)
    if len(shown) > MOST:
        shown = _around(needs, troubled)
        if not shown:
            return None
    columns = _columns(
        {name: [one for one in needs[name] if one in shown] for name in needs if name in shown}
    )
    places = {name: (index, row) for index, column in enumerate(columns) for row, name in enumerate(column)}
    tallest = max(len(column) for column in columns)
    boxes = []
    for name, (column, row) in places.items():
        # Short columns stand in the middle of the tall ones.
        lower = (tallest - len(columns[column])) * ROW // 2
        boxes.append(Box(name, MARGIN + column * COLUMN, MARGIN + lower + row * ROW))
    at = {box.name: box for box in boxes}
    edges = tuple(
        Edge(needed, name, _curve(at[needed], at[name]))
        for name in places
        for needed in needs[name]
        if needed in at
    )
    width = 2 * MARGIN + (len(columns) - 1) * COLUMN + BOX_W
    return Graph(
        tuple(boxes), edges, width, 2 * MARGIN + tallest * ROW - (ROW - BOX_H), len(needs) - len(shown)
    )


def _around(needs: Mapping[str, Sequence[str]], troubled: Collection[str]) -> set[str]:
    """Return the troubled agents and their neighbours, as many as there is room for."""
    shown: list[str] = []
    for name in sorted(set(troubled) & set(needs)):
        shown += [name, *needs[name], *(other for other, its in needs.items() if name in its)]
    return set(list(dict.fromkeys(shown))[:MOST])


def _columns(needs: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Return the agents by the length of the longest way to something that needs nothing."""
    depth: dict[str, int] = {}

    def measure(name: str) -> int:
        if name not in depth:
            depth[name] = 0  # ends a cycle, which the configuration refuses anyway
            depth[name] = max((measure(other) + 1 for other in needs[name]), default=0)
        return depth[name]

    columns: list[list[str]] = []
    for name in needs:
        place = measure(name)
        columns += [[] for _ in range(place + 1 - len(columns))]
        columns[place].append(name)
    for index, column in enumerate(columns[1:], 1):
        above = {name: row for row, name in enumerate(columns[index - 1])}
        column.sort(key=lambda name: _middle([above[other] for other in needs[name] if other in above]))
    return columns


def _middle(rows: Sequence[int]) -> float:
    return sum(rows) / len(rows) if rows else 0.0


def _curve(one: Box, other: Box) -> str:
    x1, y1 = one.x + BOX_W, one.y + BOX_H // 2
    x2, y2 = other.x, other.y + BOX_H // 2
    bend = (x2 - x1) // 2
    return f"M{x1} {y1}C{x1 + bend} {y1} {x2 - bend} {y2} {x2} {y2}"
