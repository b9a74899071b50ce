"""Every snapshot is read again in time; what is found damaged is told until it is whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import fakeredis
import pytest

from backup_worker import alerts
from backup_worker.maintenance import maintain, scrub
from backup_worker.runtime import Runtime
from backup_worker.snapshots import take_snapshot, verify_snapshot
from tests.small_fleet import SmallFleet

SEVEN = 1795417200.0
DAY = 86400.0
EVERY_S = maintain.EVERY_S["scrub"]


@pytest.fixture
def fleet(tmp_path: Path) -> SmallFleet:
    return SmallFleet(tmp_path)


@pytest.fixture
def client() -> Any:
    return fakeredis.FakeRedis()


@pytest.fixture
def runtime(fleet: SmallFleet, client: Any) -> Runtime:
    return fleet.runtime(client)


def make(runtime: Runtime, count: int, now: float = SEVEN, *, alike: bool = False) -> list[str]:
    """Take snapshots, none of which holds what could heal another one, unless they are to be `alike`."""
    made = []
    for number in range(count):
        if not alike:
            (runtime.config.agent("z").root / "SOUL.md").write_text(f"I am z, of day {number}.\n")
        made.append(
            take_snapshot(
                runtime.repository, runtime.config.files_of("z"), tier="daily", slot=f"s{number}",
                include=["*"], unchanged="copy", now=now + number, reason="test",
            ).id
        )  # fmt: skip
    return made


def file_of(fleet: SmallFleet, snapshot: str) -> Path:
    return fleet.folder / "backups" / snapshot / "files" / "SOUL.md"


def flip(file: Path) -> None:
    """Change one bit, as a disk does: size and times stay."""
    info = file.stat()
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.chmod(0o600)
    file.write_bytes(content)
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))


def open_keys(client: Any) -> list[str]:
    return sorted(alert.key for alert in alerts.open_alerts(client))


def test_a_run_reads_a_share_oldest_first(runtime: Runtime) -> None:
    ids = make(runtime, 6)
    later = SEVEN + 16 * DAY
    assert maintain.run(runtime, "scrub", now=later)["verified"] == 1
    dates = {head.id: head.verified_at for head in runtime.repository.snapshots()}
    assert [one for one in ids if dates[one] == later] == ids[:1]
    maintain.run(runtime, "scrub", now=later + EVERY_S)
    dates = {head.id: head.verified_at for head in runtime.repository.snapshots()}
    assert dates[ids[1]] == later + EVERY_S


def test_what_was_proven_lately_is_left_alone(runtime: Runtime) -> None:
    make(runtime, 2)
    assert maintain.run(runtime, "scrub", now=SEVEN + DAY) == {"verified": 0, "bad": []}


def test_rot_is_named_on_the_record_and_alerted_once(
    runtime: Runtime, fleet: SmallFleet, client: Any
) -> None:
    (snapshot,) = make(runtime, 1)
    flip(file_of(fleet, snapshot))
    for days in (16, 17, 18):
        assert maintain.run(runtime, "scrub", now=SEVEN + days * DAY)["bad"] == [snapshot]
    assert open_keys(client) == [f"rot/{snapshot}"]
    assert len(fleet.history("alert")) == 1
    assert "SOUL.md" in alerts.open_alerts(client)[0].body
    line = fleet.history("verify")[0]
    assert (line["ok"], line["id"], line["problems"][0]["path"]) == (False, snapshot, "SOUL.md")


def test_rot_is_resolved_once_the_snapshot_is_whole_again(
    runtime: Runtime, fleet: SmallFleet, client: Any
) -> None:
    (snapshot,) = make(runtime, 1)
    flip(file_of(fleet, snapshot))
    maintain.run(runtime, "scrub", now=SEVEN + 16 * DAY)
    flip(file_of(fleet, snapshot))
    assert maintain.run(runtime, "scrub", now=SEVEN + 16.5 * DAY)["verified"] == 0, "tried again too soon"
    assert maintain.run(runtime, "scrub", now=SEVEN + 17.1 * DAY) == {"verified": 1, "bad": []}
    assert open_keys(client) == []
    assert not runtime.repository.get(snapshot).damaged


def test_damage_that_somebody_else_came_upon_is_told_by_the_next_run(
    runtime: Runtime, fleet: SmallFleet, client: Any
) -> None:
    (snapshot,) = make(runtime, 1)
    flip(file_of(fleet, snapshot))
    verify_snapshot(runtime.repository, snapshot, SEVEN + 1)
    maintain.run(runtime, "scrub", now=SEVEN + 2)
    assert open_keys(client) == [f"rot/{snapshot}"]


def test_an_alert_is_closed_when_its_snapshot_was_deleted_or_proven_by_hand(
    runtime: Runtime, fleet: SmallFleet, client: Any
) -> None:
    first, second = make(runtime, 2)
    for snapshot in (first, second):
        flip(file_of(fleet, snapshot))
        verify_snapshot(runtime.repository, snapshot, SEVEN + 5)
        scrub.verify(runtime, snapshot, SEVEN + 5)
    assert open_keys(client) == [f"rot/{first}", f"rot/{second}"]
    shutil.rmtree(fleet.folder / "backups" / first)
    flip(file_of(fleet, second))
    verify_snapshot(runtime.repository, second, SEVEN + 6)
    maintain.run(runtime, "scrub", now=SEVEN + 7)
    assert open_keys(client) == []


def test_a_snapshot_whose_manifest_cannot_be_read_is_found_too(
    runtime: Runtime, fleet: SmallFleet, client: Any
) -> None:
    (snapshot,) = make(runtime, 1)
    manifest = fleet.folder / "backups" / snapshot / "manifest.json"
    manifest.chmod(0o600)
    manifest.write_text("{")
    assert maintain.run(runtime, "scrub", now=SEVEN + 1)["bad"] == [snapshot]
    assert maintain.run(runtime, "scrub", now=SEVEN + 2)["verified"] == 0, "once a day is enough"
    assert open_keys(client) == [f"rot/{snapshot}"]


def test_a_damaged_snapshot_keeps_no_other_from_its_turn(runtime: Runtime, fleet: SmallFleet) -> None:
    bad, sound = make(runtime, 2)
    flip(file_of(fleet, bad))
    for run in range(3):
        maintain.run(runtime, "scrub", now=SEVEN + 16 * DAY + run * EVERY_S)
    assert runtime.repository.get(sound).verified_at > SEVEN + 15 * DAY  # type: ignore[operator]


def test_verification_that_falls_behind_alerts_until_it_has_caught_up(runtime: Runtime, client: Any) -> None:
    make(runtime, 1)
    maintain.run(runtime, "watch", now=SEVEN + 29 * DAY)
    assert scrub.OVERDUE not in open_keys(client)
    maintain.run(runtime, "watch", now=SEVEN + 31 * DAY)
    assert scrub.OVERDUE in open_keys(client)
    maintain.run(runtime, "scrub", now=SEVEN + 31 * DAY)
    maintain.run(runtime, "watch", now=SEVEN + 31 * DAY)
    assert scrub.OVERDUE not in open_keys(client)


def test_rot_is_healed_from_a_copy_and_a_human_hears_of_it_once(
    runtime: Runtime, fleet: SmallFleet, client: Any
) -> None:
    first, second = make(runtime, 2, alike=True)
    flip(file_of(fleet, first))
    assert maintain.run(runtime, "scrub", now=SEVEN + 16 * DAY) == {"verified": 1, "bad": []}
    assert file_of(fleet, first).read_bytes() == file_of(fleet, second).read_bytes()
    assert {alert.key: alert.severity for alert in alerts.open_alerts(client)} == {f"healed/{first}": "info"}
    assert second in alerts.open_alerts(client)[0].body
    (line,) = fleet.history("heal")
    assert (line["id"], line["path"], line["from"]) == (first, "SOUL.md", second)


def test_what_cannot_be_healed_for_lack_of_a_place_to_write_is_damaged_all_the_same(
    runtime: Runtime, fleet: SmallFleet, client: Any
) -> None:
    first, _ = make(runtime, 2, alike=True)
    flip(file_of(fleet, first))
    shutil.rmtree(runtime.repository.hidden / "staging")
    (runtime.repository.hidden / "staging").write_text("in the way")
    assert maintain.run(runtime, "scrub", now=SEVEN + 16 * DAY)["bad"] == [first]
    assert open_keys(client) == [f"rot/{first}"]
