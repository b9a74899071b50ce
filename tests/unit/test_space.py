"""Little space in the repository is told before backups fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fakeredis

from backup_worker import alerts, backups
from backup_worker.maintenance import maintain, space
from tests.small_fleet import DAILY, SmallFleet

SEVEN = 1795417200.0


def state(client: Any) -> str | None:
    return next((one.severity for one in alerts.open_alerts(client) if one.key == space.KEY), None)


def reserve(fleet: SmallFleet, number: int) -> None:
    fleet.edit("backup_schedule.json", lambda document: document["limits"].update(reserve_bytes=number))


def test_little_space_warns_then_no_space_is_critical_and_enough_resolves(tmp_path: Path) -> None:
    fleet = SmallFleet(tmp_path)
    client = fakeredis.FakeRedis()
    free = space.free_bytes(tmp_path)
    for number, expected in ((int(free * 0.7), "warning"), (free * 10, "critical"), (int(free * 0.2), None)):
        reserve(fleet, number)
        maintain.run(fleet.runtime(client), "watch", now=SEVEN)
        assert state(client) == expected


def test_an_open_warning_is_not_closed_by_a_few_bytes(tmp_path: Path) -> None:
    fleet = SmallFleet(tmp_path)
    client = fakeredis.FakeRedis()
    free = space.free_bytes(tmp_path)
    for number, expected in (
        (int(free * 0.52), "warning"),
        (int(free * 0.48), "warning"),
        (int(free * 0.4), None),
    ):
        reserve(fleet, number)
        maintain.run(fleet.runtime(client), "watch", now=SEVEN)
        assert state(client) == expected


def test_room_is_wanted_for_the_next_round_of_whole_copies(tmp_path: Path) -> None:
    tiers = {"daily": DAILY, "weekly": DAILY | {"unchanged": "copy"}}
    fleet = SmallFleet(tmp_path, ("z", "jay"), tiers=tiers, limits={"reserve_bytes": 10})
    (fleet.root() / "big").write_bytes(b"x" * 5000)
    runtime = fleet.runtime(fakeredis.FakeRedis())
    made = [backups.by_hand(runtime, agent, "weekly", now=SEVEN) for agent in ("z", "jay")]
    backups.by_hand(runtime, "z", "weekly", now=SEVEN + 1)
    backups.by_hand(runtime, "z", "daily", now=SEVEN)
    heads = runtime.repository.snapshots()
    assert space.wanted_bytes(runtime.config, heads) == 10 + sum(one.bytes for one in made)


def test_a_repository_that_does_not_exist_yet_has_the_space_of_where_it_will_be(tmp_path: Path) -> None:
    assert space.free_bytes(tmp_path / "not" / "there") > 0
