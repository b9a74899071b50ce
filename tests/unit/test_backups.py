"""Which backup is made when a slot's name is taken."""

from __future__ import annotations

from pathlib import Path

import fakeredis

from backup_worker import alerts, backups
from backup_worker.snapshots import Limits, Policy
from tests.small_fleet import SmallFleet
from tests.unit.test_scrub import flip

SIX = 1795413600.0  # 2026-11-23 06:00 UTC, an hour before the daily tier fires
HOUR = 3600.0


def test_a_backup_made_by_hand_does_not_stand_in_for_the_scheduled_one(tmp_path: Path) -> None:
    fleet = SmallFleet(tmp_path)
    runtime = fleet.runtime(fakeredis.FakeRedis())
    early = backups.by_hand(runtime, "z", "daily", now=SIX)
    (fleet.root() / "weights.json").write_text('{"speed": 0.7}\n')

    late = backups.scheduled(runtime, "z", "daily", early.slot, now=SIX + HOUR)

    assert (early.id, late.id) == ("daily/2026-11-23/z", "daily/2026-11-23-2/z")
    stored = fleet.repository.path(late.id) / "files" / "weights.json"
    assert stored.read_text() == '{"speed": 0.7}\n'


def test_a_scheduled_slot_is_made_once(tmp_path: Path) -> None:
    fleet = SmallFleet(tmp_path)
    runtime = fleet.runtime(fakeredis.FakeRedis())
    first = backups.scheduled(runtime, "z", "daily", "2026-11-23", now=SIX + HOUR)
    backups.by_hand(runtime, "z", "daily", now=SIX + 2 * HOUR)

    again = backups.scheduled(runtime, "z", "daily", "2026-11-23", now=SIX + 3 * HOUR)

    assert again.id == first.id
    assert fleet.snapshots == ["daily/2026-11-23/z", "daily/2026-11-23-2/z"]


def test_damage_found_in_what_is_shared_alerts_once_until_a_backup_without_it(tmp_path: Path) -> None:
    fleet = SmallFleet(tmp_path)
    client = fakeredis.FakeRedis()
    runtime = fleet.runtime(client)
    first = backups.by_hand(runtime, "z", "daily", now=SIX)
    flip(fleet.repository.path(first.id) / "files" / "SOUL.md")

    second = backups.by_hand(runtime, "z", "daily", now=SIX + HOUR)

    assert (second.status, len(second.warnings)) == ("good", 1)
    assert [one.key for one in alerts.open_alerts(client)] == ["damage/daily/z"]
    assert first.id in alerts.open_alerts(client)[0].body
    backups.scheduled(runtime, "z", "daily", "2026-11-24", now=SIX + 25 * HOUR)
    assert alerts.open_alerts(client) == []


def test_what_the_configuration_means_to_the_engine_is_said_in_one_place(tmp_path: Path) -> None:
    config = SmallFleet(tmp_path, limits={"shrink": 0.25, "reserve_bytes": 7}).config
    assert config.retention() == {
        "daily": Policy(keep=30, days=0, timezone="UTC"),
        "on-change": Policy(keep=10, days=7, timezone="UTC"),
    }
    assert config.snapshot_limits() == Limits(shrink=0.25, reserve_bytes=7)
    assert config.snapshot_limits(allow_shrink=True) == Limits(shrink=None, reserve_bytes=7)
