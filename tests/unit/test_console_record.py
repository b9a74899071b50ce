"""The end of the record, read backwards: every line once, in order, whatever falls between two blocks, of any kind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from backup_worker.console import pages, record
from backup_worker.console.record import Wanted, newest
from backup_worker.history import History


@pytest.fixture
def path(tmp_path: Path) -> Path:
    history = History(tmp_path / "history.jsonl")
    history.extend(
        [("backup" if number % 2 else "alert", float(number), {"agent": f"a{number % 3}", "text": "ü" * (number % 50)})
         for number in range(300)]
    )  # fmt: skip
    return history.path


def files(path: Path) -> list[Path]:
    return History(path).files()


def walk(path: Path, wanted: Wanted, count: int) -> list[int]:
    """Return the numbers of all lines, page after page."""
    seen: list[int] = []
    before = ""
    for _ in range(10_000):
        found = newest(files(path), wanted, count=count, before=before)
        seen += [line["seq"] for line in found.lines]
        if not found.older:
            return seen
        before = found.older
    raise AssertionError("it does not come to an end")


@pytest.mark.parametrize("block", [1, 7, 100, 4096, 1 << 20])
@pytest.mark.parametrize("count", [1, 17, 1000])
def test_every_line_comes_once_the_newest_first(
    path: Path, monkeypatch: pytest.MonkeyPatch, block: int, count: int
) -> None:
    monkeypatch.setattr(record, "BLOCK_BYTES", block)
    if block == 1:
        lines = path.read_bytes().splitlines(keepends=True)[:5]
        path.write_bytes(b"".join(lines))
    total = len(path.read_bytes().splitlines())
    assert walk(path, Wanted(), count) == list(range(total, 0, -1))


@pytest.mark.parametrize(
    "wanted",
    [
        Wanted(kind="alert"),
        Wanted(agent="a1"),
        Wanted("backup", "a2"),
        Wanted(text="ÜÜÜÜ"),
        Wanted(text="a2"),
    ],
)
def test_what_is_searched_for_is_found_and_nothing_else(path: Path, wanted: Wanted) -> None:
    def like(line: dict[str, object]) -> bool:
        return (
            wanted.kind in ("", line["kind"])
            and wanted.agent in ("", line["agent"])
            and wanted.text.lower() in json.dumps(line, ensure_ascii=False).lower()
        )

    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert walk(path, wanted, 13) == [line["seq"] for line in reversed(lines) if like(line)]


def test_a_search_that_finds_nothing_ends_soon_and_can_be_gone_on_with(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "MAX_BYTES", 5000)
    monkeypatch.setattr(record, "BLOCK_BYTES", 500)
    found = newest([path], Wanted(text="not there"), count=10)
    assert found.lines == ()
    assert found.older
    assert walk(path, Wanted(text="not there"), 10) == []
    assert walk(path, Wanted(kind="alert"), 10)[-1] == 1


def test_what_is_no_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_bytes(b'\xff\xfe\n[]\n{"seq": 1, "kind": "x"}\n\n{"kind": "no number"}\n{"seq": 2, "ki')
    assert [line["seq"] for line in newest([path], Wanted(), count=9).lines] == [1]
    assert newest([tmp_path / "nothing"], Wanted(), count=9) == record.Found((), "")


@pytest.mark.parametrize("count", [1, 9, 50, 1000])
def test_a_record_of_several_files_is_one(tmp_path: Path, count: int) -> None:
    history = History(tmp_path / "history.jsonl", max_bytes=4000)
    for number in range(60):
        history.append("alert" if number % 3 else "backup", now=float(number), agent="z", text="x" * 100)
    assert len(history.files()) > 3
    assert walk(history.path, Wanted(), count) == list(range(60, 0, -1))
    assert walk(history.path, Wanted(kind="backup"), count) == [
        n + 1 for n in range(59, -1, -1) if n % 3 == 0
    ]


@pytest.mark.parametrize(
    "before", ["x", "history.jsonl:x", "../../etc/passwd:9", ":5", "history.jsonl:999999999"]
)
def test_a_place_that_is_none_means_the_end(path: Path, before: str) -> None:
    assert newest([path], Wanted(), count=1, before=before).lines[0]["seq"] == 300


def test_every_kind_of_line_that_is_written_can_be_chosen_on_the_page() -> None:
    writes = re.compile(r'\b(?:record|record_once|history\.append)\(\s*(?:[\w.]+,\s*)?"([a-z-]+)"')
    files = Path(pages.__file__).parents[1].rglob("*.py")
    written = {kind for file in files for kind in writes.findall(file.read_text())}
    assert {"backup", "prune", "silence-ended", "forget"} <= written
    assert written - set(pages.KINDS) == set()
