"""A snapshot that holds guarded files which nobody has approved says so, in whatever tier it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from backup_worker import backups
from backup_worker.approval.approved import ApprovedStates
from backup_worker.cli._app import app
from backup_worker.runtime import Runtime
from tests.change_house import BOTH, NEW, OTHER, WEIGHTS, House
from tests.small_fleet import DAILY

CHARTER = {**DAILY, "include": ["charter"]}


@pytest.fixture
def house(tmp_path: Path) -> House:
    house = House(tmp_path, tiers={"daily": DAILY, "charter": CHARTER, "on-change": BOTH})
    house.scan()
    return house


def daily(house: House, tier: str = "daily", runtime: Runtime | None = None) -> bool | None:
    house.now += 60
    made = backups.by_hand(runtime or house.runtime, "z", tier, now=house.now)
    assert house.fleet.repository.get(made.id).approved is made.approved
    return made.approved


def by_slot(house: House) -> bool | None:
    return backups.scheduled(house.runtime, "z", "daily", "2026-11-23", now=house.now).approved


def by_command(house: House) -> bool | None:
    command = ["backup", "z", "--tier", "daily", "--json", "--config", str(house.fleet.config_dir)]
    result = CliRunner().invoke(app, command)
    (row,) = json.loads(result.stdout)["snapshots"]
    return house.fleet.repository.get(row["id"]).approved


@pytest.mark.parametrize("make", [daily, by_slot, by_command])
@pytest.mark.parametrize("poison", [OTHER, None])
def test_a_changed_or_removed_file_marks_the_snapshot_however_it_is_made(
    make: Callable[[House], bool | None], poison: bytes | None, house: House
) -> None:
    if poison is None:
        (house.fleet.root() / WEIGHTS).unlink()
    else:
        house.write(poison)
    assert make(house) is False


def test_the_command_says_so(house: House) -> None:
    command = ["backup", "z", "--tier", "daily", "--config", str(house.fleet.config_dir)]
    assert "unapproved" not in CliRunner().invoke(app, command).stdout
    house.write(OTHER)
    assert CliRunner().invoke(app, command).stdout.rstrip().endswith(", unapproved")


@pytest.mark.parametrize("make", [daily, by_slot, by_command])
def test_a_snapshot_of_the_approved_state_says_nothing(
    make: Callable[[House], bool | None], house: House
) -> None:
    house.write(b"more", "memory.md")
    assert make(house) is None


def test_a_file_that_nobody_has_approved_marks_it_too(house: House) -> None:
    house.fleet.edit("agents.json", lambda d: d["agents"]["z"]["files"].update(rules=["rules/**"]))
    house.runtime = house.fleet.runtime(house.client)
    house.scan()
    house.write(b"be bad", "rules/new.md")
    assert daily(house) is False


def test_it_is_marked_until_the_change_is_approved(house: House) -> None:
    house.write(OTHER)
    house.scan(after_s=120)
    assert daily(house) is False
    (found,) = [line["change"] for line in house.fleet.history("unapproved")]
    house.approve(found)
    assert daily(house) is None


def test_an_approved_change_of_which_nobody_has_said_yet_that_it_is_applied_marks_nothing(
    house: House,
) -> None:
    house.propose()
    house.approve()
    house.write(NEW)
    assert daily(house) is None
    house.write(OTHER)
    assert daily(house) is False


def test_without_redis_the_state_on_disk_alone_counts(house: House) -> None:
    alone = Runtime(house.fleet.config)
    assert daily(house, runtime=alone) is None
    house.propose()
    house.approve()
    house.write(NEW)
    assert daily(house, runtime=alone) is False


def test_a_tier_without_guarded_files_is_not_marked_for_those_that_it_does_not_hold(house: House) -> None:
    house.write(OTHER)
    assert daily(house, "charter") is None


def test_what_cannot_be_decided_is_not_approved_and_what_was_never_looked_at_is_not_judged(
    house: House,
) -> None:
    folder = ApprovedStates(house.runtime.repository).folder("z")
    (folder / "state.json").write_text("{")
    assert daily(house) is False
    (folder / "state.json").unlink()
    assert daily(house) is None


def test_an_application_s_snapshot_speaks_of_its_own_change(house: House) -> None:
    house.write(b"I am somebody else.", "SOUL.md")
    house.propose()
    assert [one.approved for one in house.approve()] == [False]
    house.write(NEW)
    made: Any = house.apply()
    assert (made.approved, made.approved_by) == (True, "kari")
    assert daily(house) is False
