"""The health command: its answer is its exit code, within its limit; asked about the living agent."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from backup_worker.restoring.health_command import CANNOT_RUN, SAID_CHARACTERS, Health, run_health


def asked(root: Path, program: str, *, limit_s: float = 10.0) -> Health:
    command = [sys.executable, "-c", program]
    return run_health(command, root, "z", redis_url="redis://here/0", within_s=limit_s)


@pytest.mark.parametrize("code", [0, 1, 77])
def test_the_exit_code_is_the_answer(tmp_path: Path, code: int) -> None:
    found = asked(tmp_path, f"print('so'); print('it is'); raise SystemExit({code})")
    assert (found.ok, str(found)) == (code == 0, f"health: exit code {code}: so / it is")


def test_it_runs_in_the_root_and_is_not_taken_for_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_ROOT", str(tmp_path))
    monkeypatch.setenv("AGENT_RUN", "token")
    program = (
        "import os; e = os.environ; print(os.getcwd(), e['AGENT_ID'], e['REDIS_URL'], 'AGENT_R' in str(e))"
    )
    assert asked(tmp_path, program).output == f"{tmp_path} z redis://here/0 False\n"


def test_one_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    program = (
        "import os, time; pid = os.fork(); open('child', 'w').write(str(pid or os.getpid())); time.sleep(60)"
    )
    began = time.monotonic()
    found = asked(tmp_path, program, limit_s=0.5)
    assert (found.ok, str(found)) == (False, "health: no answer within 0.5 s")
    assert time.monotonic() - began < 5
    child = int((tmp_path / "child").read_text())
    # Killed with its group; the kernel needs a moment for each of its members.
    deadline = time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child of a health command outlived it"
        time.sleep(0.01)


def test_a_child_that_is_left_behind_holds_nobody_up(tmp_path: Path) -> None:
    began = time.monotonic()
    assert asked(tmp_path, "import os, time; os.fork() or time.sleep(60)").ok
    assert time.monotonic() - began < 5


def test_one_that_cannot_be_run_is_an_answer(tmp_path: Path) -> None:
    found = run_health(["no-such-program"], tmp_path, "z", redis_url="", within_s=1)
    assert found.exit_code == CANNOT_RUN
    assert str(found).endswith("no-such-program: no such file or directory")


def test_of_much_output_the_end_is_kept(tmp_path: Path) -> None:
    found = asked(tmp_path, "print('x' * 100_000); print('the end'); raise SystemExit(1)")
    assert str(found).endswith("the end")
    assert len(str(found)) < SAID_CHARACTERS + 50


def test_a_health_command_is_not_waited_for_because_a_child_of_it_holds_its_output(tmp_path: Path) -> None:
    script = "import subprocess; subprocess.Popen(['sleep', '60']); print('fine')"
    health = run_health([sys.executable, "-c", script], tmp_path, "z", within_s=20.0)
    assert (health.exit_code, health.output) == (0, "fine\n")


def test_only_the_end_of_a_long_output_is_kept(tmp_path: Path) -> None:
    health = run_health([sys.executable, "-c", "print('x' * 10**7 + 'end')"], tmp_path, "z")
    assert (health.ok, len(health.output), health.output[-4:]) == (True, 4096, "end\n")
