"""The files that an installation is made of: systemd's units call what exists, and leave the agents alone."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest

from backup_worker.reference.commands import programs
from tests import documents

DEPLOY = documents.ROOT / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
PARTS = {"dispatcher", "worker", "scheduler", "watchdog", "console"}


def service(unit: Path) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # as configparser's documentation does
    parser.read_string(unit.read_text())
    return parser["Service"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_stopping_a_unit_does_not_stop_the_agents_that_its_workers_have_started(unit: Path) -> None:
    assert service(unit)["KillMode"] == "process"
    assert service(unit)["OOMPolicy"] == "continue"


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_runs_a_command_that_exists(unit: Path) -> None:
    program, command = service(unit)["ExecStart"].split()
    known = programs()[Path(program).name].commands
    assert set(known) >= (PARTS if command == "%i" else {command})


def test_the_unit_of_the_parts_names_them_all() -> None:
    text = (DEPLOY / "agent-backup@.service").read_text()
    assert all(part in text for part in PARTS)
