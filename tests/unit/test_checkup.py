"""The health command: its answer is its exit code, within its limit."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from backup_worker.recovery.checkup import KEPT_CHARACTERS, Checkup, examine


def asked(root: Path, program: str, *, limit_s: float = 10.0) -> Checkup:
    return examine("z", root, [sys.executable, "-c", program], redis_url="redis://here/0", limit_s=limit_s)


@pytest.mark.parametrize("code", [0, 1, 77])
def test_the_exit_code_is_the_answer(tmp_path: Path, code: int) -> None:
    found = asked(tmp_path, f"print('so'); print('it is'); raise SystemExit({code})")
    assert found == Checkup(code == 0, f"health: exit code {code}: so / it is")


def test_it_runs_in_the_root_and_is_not_taken_for_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_ROOT", str(tmp_path))
    monkeypatch.setenv("AGENT_RUN", "token")
    program = (
        "import os; e = os.environ; print(os.getcwd(), e['AGENT_ID'], e['REDIS_URL'], 'AGENT_R' in str(e))"
    )
    assert asked(tmp_path, program).detail.endswith(f"{tmp_path} z redis://here/0 False")


def test_one_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    program = (
        "import os, time; pid = os.fork(); open('child', 'w').write(str(pid or os.getpid())); time.sleep(60)"
    )
    began = time.monotonic()
    found = asked(tmp_path, program, limit_s=0.5)
    assert found == Checkup(False, "health: no answer within 0.5 s")
    assert time.monotonic() - began < 5
    child = int((tmp_path / "child").read_text())
    # Killed with its group; the kernel needs a moment for each of its members.
    deadline = time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child of a health command outlived it"
        time.sleep(0.01)


def test_a_child_that_is_left_behind_holds_nobody_up(tmp_path: Path) -> None:
    began = time.monotonic()
    assert asked(tmp_path, "import os, time; os.fork() or time.sleep(60)").is_well
    assert time.monotonic() - began < 5


def test_one_that_cannot_be_run_is_an_answer(tmp_path: Path) -> None:
    found = examine("z", tmp_path, ["no-such-program"], redis_url="", limit_s=1)
    assert found == Checkup(False, "health cannot be run: no such file or directory")


def test_of_much_output_the_end_is_kept(tmp_path: Path) -> None:
    found = asked(tmp_path, "print('x' * 100_000); print('the end'); raise SystemExit(1)")
    assert found.detail.endswith("the end")
    assert len(found.detail) < KEPT_CHARACTERS + 50
