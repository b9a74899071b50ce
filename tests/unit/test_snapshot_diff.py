"""What changed between two snapshots."""

from __future__ import annotations

from pathlib import Path

import pytest

from backup_worker.snapshots import compare_json, diff
from em_bridge.errors import NotFound
from tests.agent_on_disk import NOON, Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path).fill()


def test_weights_are_compared_key_by_key(place: Place) -> None:
    place.write("weights.json", '{"a": 0.1, "gone": 1, "deep": {"x": [1, 2]}, "flag": true, "same": 1}')
    old = place.take(slot="1")
    place.write("weights.json", '{"a": 0.3, "deep": {"x": [1, 5, 6]}, "flag": 1, "same": 1, "new": "n"}')
    new = place.take(slot="2", now=NOON + 1)
    (change,) = diff(place.repo, old.id, new.id).changed
    assert [key.as_json() for key in change.keys] == [
        {"key": "a", "kind": "changed", "old": 0.1, "new": 0.3, "delta": 0.2},
        {"key": "gone", "kind": "removed", "old": 1},
        {"key": "deep.x[1]", "kind": "changed", "old": 2, "new": 5, "delta": 3},
        {"key": "deep.x[2]", "kind": "added", "new": 6},
        {"key": "flag", "kind": "changed", "old": True, "new": 1},
        {"key": "new", "kind": "added", "new": "n"},
    ]


def test_added_removed_and_changed_paths_are_named(place: Place) -> None:
    old = place.take(slot="1")
    place.write("memory/new.md", "x")
    (place.root / "memory/notes.md").unlink()
    (place.root / "SOUL.md").chmod(0o600)
    place.write("skills/greet.py", "x = 1\n")
    new = place.take(slot="2", now=NOON + 1)
    found = diff(place.repo, old.id, new.id)
    assert (found.added, found.removed) == (("memory/new.md",), ("memory/notes.md",))
    assert [(change.path, change.what) for change in found.changed] == [
        ("SOUL.md", "mode 0644 became 0600"), ("skills/greet.py", "content"),
    ]  # fmt: skip


def test_what_only_one_of_them_covers_is_no_change(place: Place) -> None:
    weekly = place.take(tier="weekly")
    daily = place.take(include=["weights"])
    found = diff(place.repo, weekly.id, daily.id)
    assert not (found.added or found.removed or found.changed)
    assert "SOUL.md" in found.outside


def test_a_number_that_is_too_large_to_reckon_with_has_changed_and_no_difference() -> None:
    huge = b'{"w": 1' + b"0" * 400 + b"}"
    for old, new in ((b'{"w": 0.5}', huge), (huge, b'{"w": 1}'), (b'{"w": 1}', b'{"w": 1e999}')):
        (change,) = compare_json(old, new) or ()
        assert (change.kind, change.delta) == ("changed", None)
    large = b"8" + b"0" * 307
    (change,) = compare_json(b'{"w": -%b}' % large, b'{"w": %b}' % large) or ()
    assert f"{change.delta:+g}" == "+1.6e+308"


def test_an_unknown_snapshot_is_not_found(place: Place) -> None:
    made = place.take()
    with pytest.raises(NotFound):
        diff(place.repo, made.id, "daily/nope/z")
