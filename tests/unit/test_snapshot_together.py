"""Works that wait for the disk together, and processes that share works."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backup_worker.snapshots import (
    NoSpace,
    SnapshotError,
    disk,
    evidence,
    plan_restore,
    restoring,
    verify_snapshot,
)
from backup_worker.snapshots.take import taking
from backup_worker.snapshots.together import Sync, Work, alone, shared_out, together
from tests.agent_on_disk import NOON, Place, coreutils_proves


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    real = disk.sync_all

    def counting(fd: int) -> None:
        made.append(fd)
        real(fd)

    monkeypatch.setattr(disk, "sync_all", counting)
    return made


def orders(base: Path, names: list[str]) -> list[tuple[int, Work[Any]]]:
    return [
        (
            number,
            taking(
                place.repo, place.agent, tier="daily", slot="s", include=["*"], unchanged="link", now=NOON,
                reason="test",
            ),
        )
        for number, name in enumerate(names)
        for place in [Place(base, name)]
    ]  # fmt: skip


def test_many_agents_cost_as_many_syncs_as_one(tmp_path: Path, syncs: list[int]) -> None:
    names = [f"a{number}" for number in range(20)]
    for name in ["z", *names]:
        Place(tmp_path, name).fill()
    [(_, one)] = orders(tmp_path, ["z"])
    alone(one)
    for_one = len(syncs)
    outcomes = list(together(orders(tmp_path, names)))
    assert len(syncs) == 2 * for_one
    repo = Place(tmp_path).repo
    assert {outcome.result.agent for outcome in outcomes} == set(names)
    assert all(coreutils_proves(repo.path(f"daily/s/{name}")) for name in names)


def ruined(base: Path, names: list[str]) -> list[tuple[int, Work[Any]]]:
    """Return the restores of agents that have a snapshot, and have been somebody else since."""
    made = []
    for number, name in enumerate(names):
        place = Place(base, name).fill()
        place.take()
        place.write("SOUL.md", f"{name}: poisoned\n")
        plan = plan_restore(place.repo, place.agent, proven=False)
        made.append((number, restoring(plan, place.root, evidence=base / "evidence" / name, now=NOON)))
    return made


def test_restores_over_living_trees_share_their_syncs_evidence_and_all(
    tmp_path: Path, syncs: list[int]
) -> None:
    [(_, one)] = ruined(tmp_path, ["z"])
    syncs.clear()
    alone(one)
    for_one = len(syncs)
    works = ruined(tmp_path, [f"a{number}" for number in range(20)])
    syncs.clear()
    outcomes = list(together(works))
    assert [outcome.error for outcome in outcomes] == [None] * 20
    assert len(syncs) == for_one
    for outcome in outcomes:
        assert f"{outcome.result.agent}: poisoned" in (outcome.result.evidence / "SOUL.md").read_text()
        assert "this is who I am" in (outcome.result.target / "SOUL.md").read_text()


def test_one_restore_that_cannot_keep_evidence_leaves_its_tree_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = ruined(tmp_path, ["a", "b", "c"])
    appear = evidence._appear

    def full(building: Path, destination: Path) -> Path:
        if destination.name == "b":
            raise OSError(28, "No space left on device")
        return appear(building, destination)

    monkeypatch.setattr(evidence, "_appear", full)
    outcomes = {outcome.index: outcome for outcome in together(works)}
    assert isinstance(outcomes[1].error, NoSpace)
    assert (Place(tmp_path, "b").root / "SOUL.md").read_text() == "b: poisoned\n"
    assert sorted(os.listdir(tmp_path / "evidence")) == ["a", "c"]
    assert "this is who I am" in (Place(tmp_path, "c").root / "SOUL.md").read_text()


def test_one_that_fails_leaves_the_others_whole_and_nothing_behind(tmp_path: Path) -> None:
    for name in ("a", "c"):
        Place(tmp_path, name).fill()
    outcomes = {outcome.index: outcome for outcome in together(orders(tmp_path, ["a", "b", "c"]))}
    assert isinstance(outcomes[1].error, SnapshotError)
    repo = Place(tmp_path).repo
    assert [head.agent for head in repo.snapshots()] == ["a", "c"]
    assert all(verify_snapshot(repo, head.id, NOON) == [] for head in repo.snapshots())
    assert os.listdir(repo.hidden / "staging") == []


def test_a_disk_that_refuses_to_sync_fails_all_that_waited_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        Place(tmp_path, name).fill()

    def refuse(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(disk, "sync_all", refuse)
    outcomes = list(together(orders(tmp_path, ["a", "b"])))
    assert all(isinstance(outcome.error, SnapshotError) for outcome in outcomes)
    repo = Place(tmp_path).repo
    assert repo.snapshots() == []
    assert os.listdir(repo.hidden / "staging") == []
    assert repo.failing() == {("a", "daily"), ("b", "daily")}


def test_who_gives_up_leaves_nothing_behind(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Place(tmp_path, name).fill()

    def interrupted(fd: int) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "sync_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(together(orders(tmp_path, ["a", "b"])))
    assert os.listdir(Place(tmp_path).repo.hidden / "staging") == []


def test_a_work_sees_the_error_of_its_sync() -> None:
    def work() -> Work[str]:
        try:
            yield Sync(-1)
        except OSError as error:
            return f"told: {error.errno}"
        return "not told"

    assert alone(work()) == "told: 9"


# -- processes ----------------------------------------------------------------------------------------------------


def echo(numbers: Iterator[int]) -> Iterator[tuple[int, Any]]:
    for number in numbers:
        yield number, {"pid": os.getpid(), "text": "ä" * 100_000}


def test_each_work_is_done_once_by_one_of_several_processes() -> None:
    answers = list(shared_out(40, echo, processes=3))
    assert sorted(number for number, _ in answers) == list(range(40))
    assert all(result["text"] == "ä" * 100_000 for _, result in answers)
    assert os.getpid() not in {result["pid"] for _, result in answers}


def test_processes_that_race_for_the_works_take_none_twice_and_forget_none() -> None:
    def quick(numbers: Iterator[int]) -> Iterator[tuple[int, Any]]:
        for number in numbers:
            yield number, None

    # An offset shared by the processes was read twice in one run of a hundred.
    for count in (2, 20, 3_000, 20_000):
        taken = [number for number, _ in shared_out(count, quick, processes=4)]
        assert sorted(taken) == list(range(count))


def test_a_single_work_needs_no_process() -> None:
    [(_, result)] = shared_out(1, echo)
    assert result["pid"] == os.getpid()


def test_what_a_killed_process_had_taken_is_named_and_the_rest_is_done() -> None:
    def fragile(numbers: Iterator[int]) -> Iterator[tuple[int, Any]]:
        for number in numbers:
            if number == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield number, "done"

    answers = dict(shared_out(10, fragile, processes=2))
    assert answers.pop(3) is None
    assert answers == dict.fromkeys([0, 1, 2, 4, 5, 6, 7, 8, 9], "done")


def test_a_fault_of_ours_in_a_process_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    def broken(numbers: Iterator[int]) -> Iterator[tuple[int, Any]]:
        for number in numbers:
            raise ZeroDivisionError(f"number {number}")
            yield number, None

    assert [result for _, result in shared_out(4, broken, processes=2)] == [None] * 4
    assert "ZeroDivisionError: number 0" in capfd.readouterr().err


def test_giving_up_ends_the_processes() -> None:
    def endless(numbers: Iterator[int]) -> Iterator[tuple[int, Any]]:
        for number in numbers:
            yield number, os.getpid()
            if number > 1:
                signal.pause()

    answers = shared_out(10, endless, processes=2)
    pids = {next(answers)[1], next(answers)[1]}
    answers.close()  # type: ignore[attr-defined]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
