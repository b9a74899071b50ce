"""Several agents at a time in processes of their own: nothing is lost, nothing out of order, nothing silent."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from backup_worker.cli._parallel import in_processes
from em_bridge.errors import AgentBackupError, NotFound


def test_results_come_in_the_order_of_the_items_from_more_than_one_process() -> None:
    results = in_processes(lambda item: {"item": item, "pid": os.getpid()}, range(50))
    assert [result["item"] for result in results] == list(range(50))
    pids = {result["pid"] for result in results}
    assert len(pids) > 1
    assert os.getpid() not in pids


def test_one_item_needs_no_process() -> None:
    assert in_processes(lambda item: {"pid": os.getpid()}, ["z"]) == [{"pid": os.getpid()}]


def test_a_result_larger_than_a_pipe_arrives_whole() -> None:
    large = "ä" * 300_000
    assert in_processes(lambda item: {"text": large}, range(3)) == [{"text": large}] * 3


def test_an_error_comes_back_with_its_hint_and_exit_code_and_ends_the_work(tmp_path: Path) -> None:
    def work(item: int) -> dict[str, Any]:
        if item == 0:
            raise NotFound("there is no agent “zz”", hint="see agents.json")
        (tmp_path / str(item)).touch()
        return {"text": "x" * 100_000}

    with pytest.raises(AgentBackupError, match="no agent “zz”") as caught:
        in_processes(work, range(1000))
    assert (caught.value.hint, caught.value.exit_code) == ("see agents.json", 4)
    assert len(list(tmp_path.iterdir())) < 1000


def test_a_killed_process_is_an_error_and_not_a_missing_result() -> None:
    def work(item: int) -> dict[str, Any]:
        if item == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    with pytest.raises(AgentBackupError, match="a process was killed"):
        in_processes(work, range(4))


def test_an_unforeseen_error_is_shown_and_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    def work(item: int) -> dict[str, Any]:
        raise ZeroDivisionError(f"item {item}")

    with pytest.raises(AgentBackupError, match="unforeseen"):
        in_processes(work, range(2))
    assert "ZeroDivisionError: item" in capfd.readouterr().err
