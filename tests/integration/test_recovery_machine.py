"""Recoveries of real agents, on a real server and a real repository: what must hold when things go wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from backup_worker.recovery.incident import ESCALATED, RECOVERED
from tests.integration.conftest import ValkeyServer
from tests.living_fleet import Fleet, steps, wait_for


@pytest.fixture
def fleet(valkey: ValkeyServer, tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, valkey.url)
    yield fleet
    fleet.close()


def test_a_wiped_agent_comes_back_equal_to_its_backup_and_what_stood_there_is_kept(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.start("z")
    snapshot = fleet.backup("z")
    whole = fleet.files("z")
    fleet.wipe("z")
    wiped = fleet.files("z")
    fleet.kill("z")
    incident = fleet.recover("z")
    assert incident.state == RECOVERED, incident.steps
    assert incident.chosen == (snapshot,)
    assert fleet.files("z") == whole
    kept = Path(incident.evidence[0])
    assert {str(p.relative_to(kept)): p.read_bytes() for p in kept.rglob("*") if p.is_file()} == wiped
    assert len(fleet.running("z")) == 1
    assert fleet.alerts() == []


def test_a_program_that_does_not_exist_escalates_instead_of_being_tried_for_ever(fleet: Fleet) -> None:
    fleet.add("z", start={"command": ["no-such-program"]})
    fleet.backup("z")
    incident = fleet.recover("z")
    assert incident.state == ESCALATED
    failed = next(step for step in incident.steps if step.step == "start")
    assert not failed.ok
    assert "no such file" in failed.detail
    assert not any(key.startswith("recovery/") for key in fleet.alerts())


def test_an_agent_whose_only_process_has_ended_is_not_recovered_by_its_beats(fleet: Fleet) -> None:
    fleet.add("z", mode="fade", heartbeat={"stable_beats": 4})
    fleet.backup("z")
    opened = fleet.open("z")
    fleet.service.advance(opened.id)
    wait_for(lambda: not fleet.running("z"), "z to end")
    incident = fleet.drive(opened.id)[0]
    assert incident.state == ESCALATED, steps(incident)
