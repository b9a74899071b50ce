"""Every way to damage a record of 200 lines is found, or named as what cannot be proven."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from backup_worker.history import ORIGIN, History, Link
from backup_worker.history.chain import Broken, follow
from backup_worker.history.head import Head, noted

LINES = 200
NAME = "system-history.jsonl"


def fill(history: History, count: int = LINES, *, kind: str = "prune") -> None:
    lines = [
        (
            kind,
            1_795_440_000.5 + n,
            {"agent": f"a{n % 7}", "id": f"daily/2026-11-{n % 28 + 1:02d}/z", "files": n * n},
        )
        for n in range(count)
    ]
    for start in range(0, count, 10):
        history.extend(lines[start : start + 10])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    history = History(tmp_path_factory.mktemp("whole") / NAME)
    fill(history)
    return history.path.read_bytes().splitlines(keepends=True)


@pytest.fixture(scope="module")
def links(whole: list[bytes]) -> list[Link]:
    """The link before each line: where following the chain goes on once the lines before it are proven."""
    found = [Link(), *follow(whole)]
    assert len(found) == LINES + 1
    return [one for one in found if isinstance(one, Link)]


def first_fault(lines: Iterable[bytes], start: Link) -> Broken | None:
    """Return what breaks the chain behind `start` first, None if nothing does."""
    return next((one for one in follow(lines, start) if isinstance(one, Broken)), None)


def broken_at(data: bytes, rest: Iterator[bytes], start: Link) -> Broken | None:
    """Follow the chain from `start` through `data`, split into lines anew, and then through `rest`.

    Following is a fold, line by line: the lines before a damage are the same bytes, and were proven once. So only what
    the damage touches has to be followed for each of the hundred thousand damages here.
    """
    return first_fault(itertools.chain(io.BytesIO(data), rest), start)


def test_every_byte_of_200_lines_changed_is_found(whole: list[bytes], links: list[Link]) -> None:
    tried = 0
    for number, line in enumerate(whole):
        following = whole[number + 1] if number + 1 < LINES else b""
        for place in range(len(line)):
            damaged = bytearray(line)
            damaged[place] ^= 1 << (place + number) % 8
            found = broken_at(bytes(damaged) + following, iter(whole[number + 2 :]), links[number])
            assert found is not None, f"byte {place} of line {number + 1}"
            assert found.line in (number + 1, number + 2)
            tried += 1
    assert tried == sum(map(len, whole))


def test_every_byte_of_200_lines_removed_is_found(whole: list[bytes], links: list[Link]) -> None:
    for number, line in enumerate(whole):
        following = whole[number + 1] if number + 1 < LINES else b""
        for place in range(len(line)):
            damaged = line[:place] + line[place + 1 :] + following
            found = broken_at(damaged, iter(whole[number + 2 :]), links[number])
            assert found is not None, f"byte {place} of line {number + 1}"


def test_a_byte_put_in_anywhere_is_found(whole: list[bytes], links: list[Link]) -> None:
    for number, line in enumerate(whole):
        following = whole[number + 1] if number + 1 < LINES else b""
        for place in range(number % 3, len(line), 3):
            damaged = line[:place] + b" " + line[place:] + following
            assert broken_at(damaged, iter(whole[number + 2 :]), links[number]) is not None


def test_every_line_removed_doubled_or_swapped_with_any_other_is_found(
    whole: list[bytes], links: list[Link]
) -> None:
    for number in range(LINES):
        removed = broken_at(b"", iter(whole[number + 1 :]), links[number])
        # Without its last line a record is a shorter one, and sound: see the noted head.
        assert (removed is None) == (number == LINES - 1)
        assert broken_at(b"", iter(whole[number:]), links[number + 1]) is not None
        for other in range(number + 1, LINES):
            moved = [whole[other], *whole[number + 1 : other], whole[number], *whole[other + 1 :]]
            found = first_fault(iter(moved), links[number])
            assert found is not None
            assert found.line == number + 1


def test_a_cut_at_every_byte_is_found_or_is_one_that_only_the_noted_head_can_tell(
    whole: list[bytes], links: list[Link]
) -> None:
    for number, line in enumerate(whole):
        for place in range(1, len(line)):
            found = broken_at(line[:place], iter(()), links[number])
            assert found is not None
            assert "not finished" in found.problem


def test_the_same_damages_are_found_in_the_file_itself(whole: list[bytes], tmp_path: Path) -> None:
    history, chance = History(tmp_path / NAME), random.Random(7)
    data = b"".join(whole)
    for place in chance.sample(range(len(data)), 60):
        damaged = bytearray(data)
        damaged[place] ^= 1 << chance.randrange(8)
        history.path.write_bytes(bytes(damaged))
        report = history.verify()
        assert not report.ok
        line = data[:place].count(b"\n") + 1
        assert report.first_broken in (line, line + 1)
        assert report.file == NAME


# ── the noted head ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def headed(tmp_path: Path) -> History:
    (tmp_path / "repository").mkdir()
    return History(tmp_path / NAME, head_file=tmp_path / "repository" / "history-head.json")


def test_cutting_lines_off_the_end_is_noticed_down_to_the_noted_head(headed: History) -> None:
    fill(headed, 20, kind="backup")
    fill(headed, 3)
    lines = headed.path.read_bytes().splitlines(keepends=True)
    assert headed.verify().ok
    for left in range(len(lines)):
        headed.path.write_bytes(b"".join(lines[:left]))
        report = headed.verify()
        assert report.ok == (left >= 20)
        if left < 20:
            assert (report.first_broken, report.lines) == (left + 1, left)
            assert "cut off the end: the repository vouches for line 20" in str(report.problem)
        elif left > 20:
            assert "vouches for line 20, not for later ones" in report.unproven[0]


def test_a_record_that_was_removed_or_written_anew_is_noticed(headed: History) -> None:
    fill(headed, 20, kind="backup")
    headed.path.unlink()
    assert "vouches for line 20" in str(headed.verify().problem)
    fill(History(headed.path), 30)
    report = headed.verify()
    assert (report.ok, report.first_broken) == (False, 20)
    assert "written anew" in str(report.problem)


def test_the_head_is_noted_at_backups_alone_and_never_goes_back(headed: History, tmp_path: Path) -> None:
    file = tmp_path / "repository" / "history-head.json"
    headed.append("prune", now=1.0)
    assert noted(file) is None
    line = headed.append("backup", now=2.0)
    assert noted(file) == Head(2, line["hash"], 2.0)
    headed.path.unlink()
    headed.append("backup", now=3.0)
    assert noted(file) == Head(2, line["hash"], 2.0)


def test_a_head_that_cannot_be_noted_does_not_stop_the_record(headed: History, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "repository")
    headed.append("backup", now=1.0)
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "history-head.json").mkdir()
    headed.append("backup", now=2.0)
    assert headed.verify().lines == 2


# ── rotation ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def rotating(tmp_path: Path) -> History:
    history = History(tmp_path / NAME, max_bytes=4096)
    fill(history)
    return history


def aside(history: History) -> list[Path]:
    return sorted(history.path.parent.glob("system-history.*.jsonl"))


def test_the_chain_goes_on_through_files_of_a_limited_size(rotating: History) -> None:
    report = rotating.verify()
    assert (report.ok, report.lines) == (True, LINES)
    assert len(aside(rotating)) > 5
    assert aside(rotating)[0].name == "system-history.000001.jsonl"
    assert [line["seq"] for line in rotating.read()] == list(range(1, LINES + 1))
    assert all(path.stat().st_size < 4096 + 10 * 300 for path in aside(rotating))


@pytest.mark.parametrize("which", range(4))
def test_a_file_that_was_put_aside_and_is_changed_or_gone_is_noticed(rotating: History, which: int) -> None:
    victim = aside(rotating)[which]
    content = victim.read_bytes()
    first = json.loads(content.splitlines()[0])["seq"]
    victim.unlink()
    assert rotating.verify().first_broken == first
    victim.write_bytes(content[: content[:-1].rindex(b"\n") + 1])
    assert not rotating.verify().ok
    victim.write_bytes(content.replace(b'"agent":"a3"', b'"agent":"a4"', 1))
    report = rotating.verify()
    assert (report.ok, report.file) == (False, victim.name)


def test_a_writer_killed_behind_the_rename_loses_nothing(rotating: History) -> None:
    os.rename(rotating.path, rotating.path.with_name(f"system-history.{len(aside(rotating)) + 1:06d}.jsonl"))
    assert rotating.verify().lines == LINES
    rotating.append("backup", now=1.0)
    report = rotating.verify()
    assert (report.ok, report.lines) == (True, LINES + 1)


def test_a_follower_misses_no_line_when_files_are_put_aside(tmp_path: Path) -> None:
    history = History(tmp_path / NAME, max_bytes=4096)
    done = threading.Event()

    def write() -> None:
        for number in range(150):
            history.append("backup", now=float(number), padding="x" * 100)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = [line["seq"] for line in History(history.path).follow(poll_s=0.001, stop=done.is_set)]
    writer.join()
    seen += [line["seq"] for line in history.read() if line["seq"] > (seen[-1] if seen else 0)]
    assert seen == list(range(1, 151))
    assert len(aside(history)) > 3


def test_two_writers_rotate_without_losing_a_line(tmp_path: Path) -> None:
    def write(name: str) -> None:
        mine = History(tmp_path / NAME, max_bytes=4096)
        for number in range(60):
            mine.append("backup", now=1.0, agent=name, number=number)

    writers = [threading.Thread(target=write, args=(name,)) for name in ("a", "b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    history = History(tmp_path / NAME)
    assert (history.verify().ok, history.verify().lines) == (True, 120)
    assert [line["number"] for line in history.read(agent="a")] == list(range(60))


def test_the_first_line_follows_the_origin(whole: list[bytes]) -> None:
    assert json.loads(whole[0])["prev"] == ORIGIN
