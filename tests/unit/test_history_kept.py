"""A full disk never stops anything: lines wait in Redis, in order, and are written when there is room."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, cast

import fakeredis
import pytest

from backup_worker import alerts
from backup_worker.history import History, HistoryUnwritable, kept
from backup_worker.maintenance import maintain, record_watch
from backup_worker.runtime import Runtime
from em_bridge.errors import UsageError
from tests.small_fleet import SmallFleet


@pytest.fixture
def client() -> Any:
    return fakeredis.FakeRedis()


@pytest.fixture
def fleet(tmp_path: Path) -> SmallFleet:
    return SmallFleet(tmp_path)


@pytest.fixture
def runtime(fleet: SmallFleet, client: Any) -> Runtime:
    return fleet.runtime(client)


def full(fleet: SmallFleet) -> Path:
    """Make the record unwritable, as a full disk does; return what stands in its place."""
    stand_in = fleet.folder / "history.jsonl"
    if stand_in.is_file():
        stand_in.rename(fleet.folder / "safe.jsonl")
    stand_in.mkdir()
    return stand_in


def room(fleet: SmallFleet) -> None:
    (fleet.folder / "history.jsonl").rmdir()
    if (fleet.folder / "safe.jsonl").exists():
        (fleet.folder / "safe.jsonl").rename(fleet.folder / "history.jsonl")


def test_lines_wait_and_are_written_in_order_with_their_own_times(
    fleet: SmallFleet, runtime: Runtime
) -> None:
    runtime.record("recovery", step="first")
    full(fleet)
    for step in ("second", "third"):
        runtime.record("recovery", step=step, where=Path("/agents/z"), raw=b"\x00")
    assert kept.waiting(runtime.redis) == 2
    room(fleet)
    runtime.record("recovery", step="fourth")
    lines = fleet.history("recovery")
    assert [line["step"] for line in lines] == ["first", "second", "third", "fourth"]
    assert (lines[1]["where"], lines[1]["raw"]) == ("/agents/z", "00")
    assert [line["at"] for line in lines] == sorted(line["at"] for line in lines)
    assert kept.waiting(runtime.redis) == 0
    assert runtime.history.verify().ok


def test_what_waits_is_written_by_the_next_round_if_nothing_else_happens(
    fleet: SmallFleet, runtime: Runtime
) -> None:
    full(fleet)
    runtime.record("recovery", step="only")
    room(fleet)
    maintain.run(runtime, "watch", now=1.0)
    assert [line["step"] for line in fleet.history("recovery")] == ["only"]


def test_no_more_lines_wait_than_there_is_room_for_and_the_rest_is_counted(
    fleet: SmallFleet, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "MOST", 5)
    full(fleet)
    for number in range(9):
        runtime.record("recovery", number=number)
    room(fleet)
    assert kept.write(runtime.redis, runtime.history, 1.0) == 5
    assert [line["number"] for line in fleet.history("recovery")] == [0, 1, 2, 3, 4]
    assert [line["lines"] for line in fleet.history(kept.LOST)] == [4]
    kept.write(runtime.redis, runtime.history, 2.0)
    assert len(fleet.history(kept.LOST)) == 1


def test_while_one_process_writes_what_waits_another_queues_up_behind(
    fleet: SmallFleet, runtime: Runtime, client: Any
) -> None:
    full(fleet)
    runtime.record("recovery", step="first")
    room(fleet)
    client.set(kept._WRITER, "somebody else")
    runtime.record("recovery", step="second")
    assert fleet.history("recovery") == []
    client.delete(kept._WRITER)
    runtime.record("recovery", step="third")
    assert [line["step"] for line in fleet.history("recovery")] == ["first", "second", "third"]


class Disk:
    """The record on a disk that calls `at_each` before it writes lines."""

    def __init__(self, history: Any, at_each: Any) -> None:
        self.history, self.at_each = history, at_each

    def extend(self, lines: Any) -> Any:
        self.at_each()
        return self.history.extend(lines)


def test_a_writer_whose_disk_took_too_long_forgets_nothing_that_is_not_written(
    fleet: SmallFleet, runtime: Runtime, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "_BATCH", 2)
    for number in range(6):
        kept.keep(client, "recovery", 1.0, {"number": number})
    batches = itertools.chain([None], itertools.repeat(HistoryUnwritable("the disk is full again")))

    def fill() -> None:
        if problem := next(batches):
            raise problem

    def take_too_long() -> None:
        # The claim has run out, and another process writes a batch.
        client.delete(kept._WRITER)
        kept.write(client, cast(History, Disk(runtime.history, fill)), 1.0)

    kept.write(client, cast(History, Disk(runtime.history, take_too_long)), 1.0)
    kept.write(client, runtime.history, 2.0)
    assert {line["number"] for line in fleet.history("recovery")} == set(range(6))


def test_many_lines_are_written_in_batches(fleet: SmallFleet, runtime: Runtime) -> None:
    full(fleet)
    for number in range(450):
        runtime.record("recovery", number=number)
    room(fleet)
    assert kept.write(runtime.redis, runtime.history, 1.0) == 450
    assert [line["number"] for line in fleet.history("recovery")] == list(range(450))


def test_what_could_never_be_written_is_an_error_at_once(fleet: SmallFleet, runtime: Runtime) -> None:
    full(fleet)
    with pytest.raises(UsageError):
        runtime.record("Not A Kind")
    assert kept.waiting(runtime.redis) == 0


def test_rubbish_among_what_waits_does_not_keep_the_rest(
    fleet: SmallFleet, runtime: Runtime, client: Any
) -> None:
    full(fleet)
    runtime.record("recovery", step="first")
    client.rpush(kept.UNWRITTEN, "rubbish")
    runtime.record("recovery", step="second")
    room(fleet)
    kept.write(runtime.redis, runtime.history, 1.0)
    assert [line["step"] for line in fleet.history("recovery")] == ["first", "second"]


def test_lines_that_wait_and_a_broken_record_reach_a_human_until_it_is_well(
    fleet: SmallFleet, runtime: Runtime, client: Any
) -> None:
    def told() -> list[str]:
        return [one.key for one in alerts.open_alerts(client) if one.resolved_at is None]

    runtime.record("recovery", step="first")
    full(fleet)
    runtime.record("recovery", step="second")
    record_watch.write_kept(runtime, 1.0)
    assert told() == ["record/unwritten"]
    room(fleet)
    record_watch.write_kept(runtime, 2.0)
    assert told() == []
    assert maintain.run(runtime, "record", now=3.0)["problem"] is None
    path = fleet.folder / "history.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"step":"first"', b'"step":"fifth"'))
    assert "changed" in maintain.run(runtime, "record", now=4.0)["problem"]
    assert told() == ["record/broken"]
    lines = path.read_bytes().replace(b'"step":"fifth"', b'"step":"first"')
    path.write_bytes(lines)
    maintain.run(runtime, "record", now=5.0)
    assert told() == []
