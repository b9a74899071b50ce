"""Which backup is made when a slot's name is taken."""

from __future__ import annotations

from pathlib import Path

import fakeredis

from backup_worker import backups
from tests.small_fleet import SmallFleet

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
