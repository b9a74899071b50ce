"""The demo, as a new user would run it: each of its steps is a promise."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

SECONDS = 90


def start_demo(folder: Path, *options: str) -> subprocess.Popen[str]:
    """Start the demo in `folder`, in a session of its own so that a signal hits only it."""
    return subprocess.Popen(
        [sys.executable, "-m", "backup_worker", "demo", "--dir", str(folder), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={name: value for name, value in os.environ.items() if name != "REDIS_URL"},
    )


def left_behind(folder: Path) -> list[str]:
    """Return the command lines of processes that have to do with `folder`."""
    found = []
    for process in psutil.process_iter():
        try:
            words = " ".join([*process.cmdline(), process.cwd(), process.environ().get("AGENT_ROOT", "")])
        except (psutil.Error, OSError):
            continue
        if str(folder) in words:
            found.append(words)
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, object]]]:
    """Run the whole demo once; yields its steps by title."""
    folder = tmp_path_factory.mktemp("demo") / "fleet"
    process = start_demo(folder, "--json")
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    assert left_behind(folder) == []
    yield {step["step"]: step for step in json.loads(out)}


def step_about(demo: dict[str, dict[str, object]], words: str) -> dict[str, object]:
    return next(step for title, step in demo.items() if words in title)


@pytest.mark.parametrize(
    "words",
    [
        "the parts of Agent Backup",
        "proven with sha256sum",
        "approved change",
        "Rick's memory wiped",
        "killed at once",
        "EM killed with -9",
        "every backup poisoned",
        "what was done",
    ],
)
def test_every_step_of_the_demo_works(demo: dict[str, dict[str, object]], words: str) -> None:
    assert step_about(demo, words)["ok"] is True


def test_all_agents_have_a_daily_and_a_weekly_snapshot(demo: dict[str, dict[str, object]]) -> None:
    assert step_about(demo, "sha256sum")["snapshots"] == 10


def test_agents_come_back_in_the_order_of_the_mission(demo: dict[str, dict[str, object]]) -> None:
    assert step_about(demo, "killed at once")["waves"] == [["z"], ["jay", "rick"], ["leroy"]]


def test_every_message_is_delivered_although_the_em_was_dead(demo: dict[str, dict[str, object]]) -> None:
    step = step_about(demo, "EM killed")
    assert step["messages"] == 800
    assert isinstance(step["waited_in_log"], int)
    assert step["waited_in_log"] > 0


def test_an_escalation_leaves_a_report_to_read(demo: dict[str, dict[str, object]]) -> None:
    report = Path(str(step_about(demo, "poisoned")["evidence"])) / "REPORT.md"
    assert "leroy could not be recovered" in report.read_text()


def test_the_totals_say_what_happened(demo: dict[str, dict[str, object]]) -> None:
    totals = step_about(demo, "what was done")
    assert (totals["recoveries"], totals["escalations"]) == (6, 1)
    assert Path(str(totals["history"])).is_file()


@pytest.mark.parametrize("after_s", [1.5, 6.0])
def test_ctrl_c_leaves_no_process_behind(tmp_path: Path, after_s: float) -> None:
    folder = tmp_path / "fleet"
    process = start_demo(folder)
    time.sleep(after_s)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert left_behind(folder) == []


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    process = start_demo(tmp_path)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 2
    assert err.startswith("error: ")
    assert "is not empty" in err
