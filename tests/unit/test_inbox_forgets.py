"""The inbox is bounded: what is over is forgotten, and nothing can come of it any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fakeredis
import pytest

from backup_worker.approval import approvals, changes, forgetting
from backup_worker.approval.changes import APPLIED, APPROVED, EXPIRED, PROPOSED, REJECTED, Change
from backup_worker.maintenance import maintain
from em_bridge import events
from em_bridge.errors import NotFound
from tests.change_house import NEW, WEIGHTS, House

DAY = 86400.0


def change(name: str, at: float, state: str = APPLIED, content: bytes = b"") -> Change:
    return Change(name, state, "z", ("a",), "em", proposed_at=at, proposed={"a": content})


@pytest.mark.parametrize("state", [PROPOSED, APPROVED, APPLIED, REJECTED, EXPIRED])
def test_whatever_was_heard_of_for_the_last_time_long_ago_is_forgotten(state: str) -> None:
    known = [change("old", 0.0, state), change("young", 2 * DAY, state)]
    assert forgetting.to_forget(known, forgetting.KEEP_S + DAY) == ["old"]


def test_of_what_is_over_the_newest_are_kept_and_what_waits_counts_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forgetting, "MOST", 3)
    over = [change(f"c{number}", number, (APPLIED, REJECTED, EXPIRED)[number % 3]) for number in range(6)]
    waiting = [change("open", 0.0, PROPOSED), change("ready", 0.0, APPROVED)]
    assert forgetting.to_forget([*over, *waiting], 3 * DAY) == ["c2", "c1", "c0"]
    # A job may still be at it.
    assert forgetting.to_forget([*over, *waiting], DAY / 2) == []


def test_large_contents_are_forgotten_before_they_fill_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgetting, "MOST_BYTES", 25)
    known = [change(f"c{number}", number, content=b"x" * 10) for number in range(5)]
    assert forgetting.to_forget(known, 3 * DAY) == ["c2", "c1", "c0"]


def test_the_hourly_trim_forgets_and_an_old_name_has_no_approval_any_more(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.scan()
    house.propose(None)
    house.approve()
    house.write(NEW)
    assert house.apply().approved
    house.propose(change="open")
    later = house.now + forgetting.KEEP_S - 60
    assert maintain.run(house.runtime, "trim", now=later)["changes"] == 0
    house.now += 7200
    house.propose(change="young")
    assert maintain.run(house.runtime, "trim", now=later + 3600)["changes"] == 2
    assert [one.change for one in changes.all_changes(house.client)] == ["young"]
    assert house.client.hlen(approvals.BOUND) == 0
    with pytest.raises(NotFound):
        changes.get(house.client, "c1")
    # Its approval is not to be had again by its name, whatever is applied.
    assert house.apply().approved is False


def test_a_change_of_which_something_is_heard_meanwhile_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    client: Any = fakeredis.FakeRedis()
    event = events.ConfigProposed("c1", "z", (WEIGHTS,), "em")
    client.xadd(event.stream, events.encode(event), id="1000-0")
    plan = forgetting.to_forget

    def heard(*given: Any, **more: Any) -> list[str]:
        word = events.ConfigApproved("c1", "kari")
        client.xadd(word.stream, events.encode(word), id="2000-0")
        changes.fold(client)
        return plan(*given, **more)

    monkeypatch.setattr(forgetting, "to_forget", heard)
    now = forgetting.KEEP_S + 100
    assert forgetting.forget(client, changes.BY_NAME, now) == 0
    assert changes.get(client, "c1").decision == APPROVED
