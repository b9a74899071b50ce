"""history and history verify, run as a person runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from backup_worker import config
from backup_worker.cli.record import parse_time
from backup_worker.discovery import starter
from backup_worker.history import History
from em_bridge.errors import UsageError

PROGRAM = Path(sys.executable).with_name("backup-worker")
NOON = 1795435200.0  # 2026-11-23 12:00 UTC, 13:00 in Oslo
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "BACKUP_CONFIG"}


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, *arguments], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    starter.write(tmp_path / "config", starter.contents(tmp_path / "config", [], "Europe/Oslo"))
    return tmp_path


@pytest.fixture
def history(home: Path) -> History:
    record = History(config.load(home / "config").schedule.history)
    record.append("backup", now=NOON, agent="z", id="weekly/2026-W48/z", note="two\nlines\x1b[31m")
    record.append("backup-failed", now=NOON + 60, agent="jay", reason="disk full")
    record.append("prune", now=NOON + 120)
    return record


def test_lines_are_shown_in_the_schedule_s_zone_one_a_line(home: Path, history: History) -> None:
    shown = run("history", cwd=home).stdout.splitlines()
    assert len(shown) == 3
    assert shown[0].split() == [
        "2026-11-23", "13:00:00", "backup", "z", "id=weekly/2026-W48/z", 'note="two', "lines", '[31m"',
    ]  # fmt: skip


def test_lines_are_chosen_by_agent_kind_time_and_number(home: Path, history: History) -> None:
    def kinds(*options: str) -> list[str]:
        return [line["kind"] for line in json.loads(run("history", "--json", *options, cwd=home).stdout)]

    assert kinds() == ["backup", "backup-failed", "prune"]
    assert kinds("--agent", "z") == ["backup"]
    assert kinds("--kind", "prune") == ["prune"]
    assert kinds("--since", "2026-11-23T13:01") == ["backup-failed", "prune"]
    assert kinds("--last", "1") == ["prune"]


def test_an_empty_record_is_an_empty_list(home: Path) -> None:
    assert json.loads(run("history", "--json", cwd=home).stdout) == []
    assert "nothing has been recorded yet" in run("history", cwd=home).stdout


def test_verify_proves_the_record_and_says_what_it_cannot_prove(home: Path, history: History) -> None:
    done = run("history", "verify", cwd=home)
    assert done.returncode == 0
    assert "3 lines, each proves the one before it" in done.stdout
    assert "cut off the end" in done.stdout


def test_verify_names_the_first_broken_line_and_exits_1(home: Path, history: History) -> None:
    history.path.write_bytes(history.path.read_bytes().replace(b"disk full", b"disk fine"))
    done = run("history", "verify", "--json", cwd=home)
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert (report["ok"], report["lines"], report["first_broken"]) == (False, 1, 2)


def test_verify_does_not_take_a_missing_record_for_a_proven_one(home: Path) -> None:
    done = run("history", "verify", cwd=home)
    assert done.returncode == 4
    assert done.stderr.startswith("error: there is no history")


@pytest.mark.parametrize(
    "arguments", [("history", "--config", "no", "verify"), ("history", "verify", "--config", "no")]
)
def test_the_configuration_is_taken_wherever_it_is_named(home: Path, arguments: tuple[str, ...]) -> None:
    done = run(*arguments, cwd=home)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no/backup_schedule.json: there is no such file")


def test_a_wrong_time_is_a_usage_error(home: Path) -> None:
    done = run("history", "--since", "yesterday", cwd=home)
    assert done.returncode == 2
    assert done.stderr.startswith("error: “yesterday” is not a time\nhint: ")


def test_the_help_has_an_example(home: Path) -> None:
    assert "backup-worker history --agent z" in run("history", "--help", cwd=home).stdout
    assert "backup-worker history verify" in run("history", "verify", "--help", cwd=home).stdout


def test_a_follower_can_begin_with_the_last_lines(home: Path, history: History) -> None:
    command = [PROGRAM, "history", "--follow", "--last", "1", "--json"]
    with subprocess.Popen(command, cwd=home, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout
        newest = list(history.read())[-1]
        assert json.loads(follower.stdout.readline())["seq"] == newest["seq"]
        follower.send_signal(signal.SIGINT)
        assert follower.wait(10) == 130


def test_a_follower_prints_what_comes_until_it_is_interrupted(home: Path, history: History) -> None:
    command = [PROGRAM, "history", "--follow", "--json", "--kind", "restore"]
    with subprocess.Popen(command, cwd=home, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout
        history.append("restore", now=NOON + 300, agent="z")
        assert json.loads(follower.stdout.readline())["agent"] == "z"
        history.append("backup", now=NOON + 301, agent="z")
        history.append("restore", now=NOON + 302, agent="jay")
        assert json.loads(follower.stdout.readline())["agent"] == "jay"
        follower.send_signal(signal.SIGINT)
        assert follower.wait(10) == 130


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("2026-11-20", "2026-11-20 00:00"),
        ("2026-11-20T07:30", "2026-11-20 07:30"),
        ("2026-11-20 07:30:15", "2026-11-20 07:30:15"),
        ("7:30", "2026-11-23 07:30"),
        ("07:30:10", "2026-11-23 07:30:10"),
        ("2026-11-20T07:30Z", "2026-11-20 08:30"),
        ("2h", "2026-11-23 11:00"),
        ("1.5d", "2026-11-22 01:00"),
        ("1795435200", "2026-11-23 13:00"),
    ],
)
def test_a_time_is_read_as_people_write_it(text: str, local: str) -> None:
    expected = datetime.fromisoformat(local).replace(tzinfo=ZoneInfo("Europe/Oslo")).timestamp()
    assert parse_time(text, "Europe/Oslo", NOON) == expected


@pytest.mark.parametrize("text", ["", "yesterday", "25:00", "2026-13-01", "5x", "-2h", "99999999999999"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a time"):
        parse_time(text, "UTC", NOON)
