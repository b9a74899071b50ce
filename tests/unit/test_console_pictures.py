"""What the console draws: bars of heartbeats, who needs whom, weights over time. Pure, so tested without a server."""

from __future__ import annotations

import itertools
import re

import pytest

from backup_worker.console import graph, weights
from backup_worker.console.beats import BARS, BEAT, FRESH, NONE, PER_LIMIT, bars
from backup_worker.console.weights import Point
from backup_worker.snapshots import Head, Scope

LIMIT_S = 60.0
NOW = 1_000_000.0
BAR_S = LIMIT_S / PER_LIMIT


def head(number: int, **facts: object) -> Head:
    values: dict[str, object] = {
        "id": f"daily/{number}/z", "agent": "z", "tier": "daily", "slot": str(number),
        "created_at": number * 100.0,
        "reason": "scheduled", "status": "good", "files": 1, "bytes": 1, "scope": Scope(("**",)),
    }  # fmt: skip
    return Head(**{**values, **facts})  # type: ignore[arg-type]


def test_a_steady_agent_has_a_bar_in_every_place() -> None:
    beats = [(NOW - 5 * number, "i1") for number in range(200, 0, -1)]
    row = bars(beats, NOW, LIMIT_S)
    assert set(row.kinds) == {BEAT}
    assert len(row.kinds) == BARS
    assert row.last_at == NOW - 5


def test_silence_is_a_gap_and_a_new_incarnation_stands_out() -> None:
    before = [(NOW - 20.5 * BAR_S + 5 * number, "i1") for number in range(10)]
    after = [(NOW - 5.5 * BAR_S + 5 * number, "i2") for number in range(11)]
    row = bars([*before, *after], NOW, LIMIT_S)
    assert row.kinds[-5 - 1] == FRESH
    assert row.kinds.count(FRESH) == 1
    assert row.kinds[-12:-6] == (NONE,) * 6
    assert "1 new incarnation" in row.said


def test_an_agent_that_never_beat_has_no_bar_and_its_row_says_so() -> None:
    row = bars([], NOW, LIMIT_S)
    assert set(row.kinds) == {NONE}
    assert row.last_at is None
    assert "beats in 0 of the last 36" in row.said


def test_a_beat_that_comes_while_the_page_is_made_counts_as_now() -> None:
    assert bars([(NOW + 0.3, "i1")], NOW, LIMIT_S).kinds[-1] == BEAT


@pytest.mark.parametrize("kind", [BEAT, FRESH, NONE])
def test_each_bar_is_in_the_path_of_its_kind_alone(kind: str) -> None:
    row = bars([(NOW - 15, "i1"), (NOW - 5, "i2")], NOW, LIMIT_S)
    assert row.path(kind).count("M") == row.kinds.count(kind)


def test_who_needs_something_stands_right_of_it() -> None:
    needs = {"em": [], "z": ["em"], "jay": ["z", "em"], "solo": []}
    drawn = graph.draw(needs, [])
    assert drawn is not None
    x = {box.name: box.x for box in drawn.boxes}
    assert x["em"] == x["solo"] < x["z"] < x["jay"]
    assert {(edge.needed, edge.by) for edge in drawn.edges} == {("em", "z"), ("z", "jay"), ("em", "jay")}
    places = [(box.x, box.y) for box in drawn.boxes]
    assert len(set(places)) == len(places)
    assert all(box.x >= 0 and box.x + graph.BOX_W <= drawn.width for box in drawn.boxes)
    assert all(box.y >= 0 and box.y + graph.BOX_H <= drawn.height for box in drawn.boxes)


def test_nothing_is_drawn_where_nobody_needs_anybody() -> None:
    assert graph.draw({"a": [], "b": []}, ["a"]) is None


def test_of_a_large_fleet_only_trouble_and_its_neighbours_are_drawn() -> None:
    needs = {"em": [], **{f"a{number}": ["em"] for number in range(500)}, "late": ["a7"]}
    drawn = graph.draw(needs, ["a7"])
    assert drawn is not None
    assert {box.name for box in drawn.boxes} == {"a7", "em", "late"}
    assert drawn.left_out == len(needs) - 3
    crowd = graph.draw(needs, list(needs))
    assert crowd is not None
    assert len(crowd.boxes) <= graph.MOST
    assert graph.draw(needs, []) is None


def points(*rows: dict[str, float]) -> list[Point]:
    found: list[Point] = []
    for number, values in enumerate(rows):
        before = found[-1] if found else None
        changes = weights._changes(before.values, values) if before else {}
        found.append(Point(head(number), before.head if before else None, values, changes))
    return found


def test_numbers_are_found_wherever_they_stand_and_nothing_else_is() -> None:
    document = {"a": 1, "b": {"c": [0.5, "x", True, None, 2]}, "nan": float("nan"), "huge": 10**400}
    assert weights.numbers(document) == [("a", 1.0), ("b.c[0]", 0.5), ("b.c[4]", 2.0)]


def test_the_weights_that_change_most_are_drawn_unless_others_are_asked_for() -> None:
    rows = [{**{f"w{n:02d}": 1.0 for n in range(20)}, "moves": float(step)} for step in range(4)]
    drawn, known = weights.choose(points(*rows), [])
    assert drawn[0] == "moves"
    assert len(drawn) == weights.MOST_LINES
    assert len(known) == 21
    assert weights.choose(points(*rows), ["w19", "nothing"])[0] == ["w19"]


def test_a_weight_holds_until_the_snapshot_that_shows_another() -> None:
    plot = weights.draw(points({"a": 1.0}, {"a": 1.0}, {"a": 2.0}), ["a"])
    assert plot is not None
    line = plot.lines[0]
    assert re.fullmatch(r"M[\d.]+ [\d.]+H[\d.]+V[\d.]+", line.path)
    assert [(value, identifier) for _, _, value, identifier in line.dots] == [(2.0, "daily/2/z")]
    assert plot.rows[0][0] > plot.rows[-1][0], "larger numbers stand higher"


@pytest.mark.parametrize(
    "rows", [[{"a": 0.0}], [{"a": 1e300}, {"a": -1e300}], [{"a": 1e-12}, {"a": 2e-12}], [{"a": 5.0}, {}]]
)
def test_extreme_weights_are_drawn_inside_the_picture(rows: list[dict[str, float]]) -> None:
    plot = weights.draw(points(*rows), ["a"])
    assert plot is not None
    for line in plot.lines:
        assert all(0 <= y <= weights.HEIGHT for _, y, _, _ in line.dots)
        assert 0 <= line.label_y <= weights.HEIGHT
    assert len(plot.rows) < 15


def test_names_of_lines_never_stand_on_one_another() -> None:
    rows = [{f"w{n}": 1.0 + n / 1000 for n in range(8)}]
    plot = weights.draw(points(*rows), [f"w{n}" for n in range(8)])
    assert plot is not None
    places = sorted(line.label_y for line in plot.lines)
    assert all(b - a >= weights.LABEL_H - 0.01 for a, b in itertools.pairwise(places))


def test_without_numbers_there_is_no_plot() -> None:
    assert weights.draw([], []) is None
    assert weights.draw(points({"a": 1.0}), ["b"]) is None
