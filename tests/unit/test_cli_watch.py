"""`status --watch` and progress bars, on a terminal as a person has one."""

from __future__ import annotations

import copy
import io
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from backup_worker.cli._watch import view
from backup_worker.discovery import starter
from backup_worker.discovery.fleet import discover
from tests.terminal import OnTerminal

PROGRAM = Path(sys.executable).with_name("backup-worker")
ENV = {key: value for key, value in os.environ.items() if key not in ("REDIS_URL", "BACKUP_CONFIG")}
ENTERED, LEFT = b"\x1b[?1049h", b"\x1b[?1049l"
WELL: Mapping[str, Any] = {
    "at": 1795441803.0,
    "agents": [
        {
            "agent": name,
            "state": "ALIVE",
            "tiers": {
                "daily": {
                    "newest_good": f"daily/2026-11-23/{name}",
                    "age_s": 3600.0,
                    "overdue": None,
                    "stale": False,
                }
            },
            "drill": {"proven_at": 1.0, "age_s": 86400.0, "from": None, "last_ok": True, "overdue": False},
        }
        for name in ("z", "an-agent-with-quite-a-long-name")
    ],
    "next_runs": {"daily": 1795500000.0},
    "overdue": [],
    "stale": [],
    "drills_overdue": [],
    "scrub": {"snapshots": 2, "overdue": 0, "damaged": []},
    "redis": True,
    "queues": {"backup": 0},
    "held": {},
    "lag_s": 0.0,
    "memory": None,
    "dead_letters": 0,
    "recovery_paused": None,
    "incidents": [],
    "alerts": [],
    "ok": True,
}


def drawn(facts: Mapping[str, Any], width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False, markup=False, emoji=False)
    console.print(view(dict(facts), "UTC", width, 1.0))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name in ("z", "jay", "rick"):
        (tmp_path / "fleet" / name).mkdir(parents=True)
        (tmp_path / "fleet" / name / "SOUL.md").write_text(f"I am {name}\n")
    starter.write(
        tmp_path / "config", starter.contents(tmp_path / "config", discover(tmp_path / "fleet").agents, "UTC")
    )
    return tmp_path


@pytest.mark.parametrize("width", [30, 50, 71, 72, 80, 200])
def test_no_width_loses_an_agent_or_its_state(width: int) -> None:
    text = drawn(WELL, width)
    assert max(map(len, text.splitlines())) <= width
    together = "".join(text.split())
    assert "ALLWELL" in together and "an-agent-with-quite-a-long-name" in together
    assert together.count("ALIVE") == 2


def test_what_is_wrong_is_said_in_words_and_first() -> None:
    facts = copy.deepcopy(dict(WELL))
    facts["agents"][0]["state"] = "DEAD"
    facts["agents"][0]["tiers"]["daily"]["overdue"] = "2026-11-23"
    facts["overdue"] = ["daily/2026-11-23/z"]
    facts["scrub"]["damaged"] = ["daily/2026-11-22/z"]
    facts["alerts"] = [{"severity": "critical", "title": "z is gone", "acknowledged_by": "kari"}]
    text = drawn(facts, 100)
    assert text.startswith("LOOK: 4 things need you")
    lines = text.splitlines()
    assert lines[1:5] == [
        "  ! z is DEAD",
        "  ! damaged snapshot daily/2026-11-22/z",
        "  ! overdue backup daily/2026-11-23/z",
        "  ! alert, critical: z is gone (seen by kari)",
    ]
    assert "60 min, OVERDUE" in text


def test_hundreds_of_faults_do_not_push_the_fleet_off_the_screen() -> None:
    facts = dict(WELL) | {"overdue": [f"daily/2026-11-23/a{number}" for number in range(300)]}
    text = drawn(facts, 100)
    assert "and 292 more" in text
    assert len(text.splitlines()) < 24


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_goes_on_without_redis_and_leaves_the_screen_as_it_was(home: Path, number: signal.Signals) -> None:
    seen = OnTerminal([PROGRAM, "status", "--watch", "--every", "0.2"], cwd=home, env=ENV, columns=60)
    seen.read_until(b"Redis cannot be reached")
    (home / "config" / "agents.json").write_text("{")
    seen.read_until(b"CANNOT LOOK")
    seen.process.send_signal(number)
    assert seen.end() == 0
    assert seen.shown.count(ENTERED) == seen.shown.count(LEFT) == 1
    assert b"Traceback" not in seen.shown


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_without_a_terminal_watching_is_an_error_of_usage(home: Path, more: list[str]) -> None:
    done = subprocess.run(
        [PROGRAM, "status", "--watch", *more], cwd=home, env=ENV, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --watch needs a terminal\nhint: ")


def test_progress_is_on_stderr_and_not_for_who_asks_for_json(home: Path) -> None:
    out = home / "out"

    def shown(*words: str) -> bytes:
        with out.open("wb") as stdout:
            one = OnTerminal([PROGRAM, *words], cwd=home, env=ENV, stdout=stdout.fileno())
            assert one.end() == 0, one.shown
        return one.shown

    assert b"backing up" in shown("backup", "--tier", "weekly")
    assert b"verifying" in shown("verify")
    assert b"drilling" in shown("drill")
    assert b"restoring" in shown("restore", "z", "jay", "--to", "there")
    for words in (
        ["backup", "--tier", "weekly"],
        ["verify"],
        ["drill"],
        ["restore", "z", "jay", "--to", "here"],
    ):
        assert shown(*words, "--json") == b""
