"""What agents write need not be text that UTF-8 can carry: it is shown all the same, and keeps nobody from the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backup_worker.console import create_app
from tests.change_house import House

ODD = b'{"speed": "\\ud800", "\\udfff": 1}'
TWICE = b'{"\\ud800": 1, "\\ud800": 2}'


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def page(house: House, path: str) -> Any:
    return create_app(house.runtime).test_client().get(path)


def test_a_proposal_of_such_words_keeps_nobody_from_the_inbox(house: House) -> None:
    house.scan()
    house.propose(ODD)
    answer = page(house, "/changes")
    assert answer.status_code == 200
    assert b"\\ud800" in answer.data


def test_a_snapshot_that_is_suspect_for_such_words_is_shown(house: House) -> None:
    house.write(TWICE)
    house.propose(None)
    house.approve()
    made = house.apply()
    assert made.status == "suspect"
    answer = page(house, f"/snapshots/{made.id}")
    assert answer.status_code == 200
    assert b"\\ud800" in answer.data
    assert page(house, "/weights/z").status_code == 200


def test_a_command_prints_such_words_as_json_has_them(house: House) -> None:
    house.write(TWICE)
    command = [sys.executable, "-m", "backup_worker", "backup", "--tier", "on-change", "--json"]
    done = subprocess.run(
        [*command, "--config", str(house.fleet.config_dir)], capture_output=True, check=False,
        env=os.environ | {"PYTHONUTF8": "1"},
    )  # fmt: skip
    (made,) = json.loads(done.stdout)["snapshots"]
    assert "\ud800" in made["problems"][0]["problem"]
