"""The record: nothing lost, nothing torn, and every change of it found."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backup_worker.history import HEALED, ORIGIN, History, HistoryUnwritable, digest
from backup_worker.history.canonical import canonical
from em_bridge.errors import UsageError


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "system-history.jsonl", lock_timeout_s=0.2)


def fill(history: History, count: int = 3) -> bytes:
    for number in range(count):
        history.append("backup", now=1000.5 + number, agent=f"a{number % 3}", files=number)
    return history.path.read_bytes()


def test_a_line_has_its_number_time_kind_fields_and_the_hash_of_the_one_before(history: History) -> None:
    first = history.append("backup", now=1763900000.25, agent="z", tier="daily")
    second = history.append("verify", now=1763900001, agent="z", ok=True)
    assert (first["seq"], second["seq"]) == (1, 2)
    assert (first["prev"], second["prev"]) == (ORIGIN, first["hash"])
    assert list(history.read()) == [first, second]
    text = history.path.read_text().splitlines()[0]
    assert text.startswith('{"seq":1,"at":1763900000.25,"kind":"backup","agent":"z","tier":"daily","prev":')


def test_coreutils_can_compute_a_line_s_hash(history: History, tmp_path: Path) -> None:
    """The hash is over the line without it, keys sorted: no code of ours is needed to check it."""
    line = history.append("backup", now=1.5, agent="z", name="Blåbær\n")
    rest = {key: value for key, value in line.items() if key != "hash"}
    (tmp_path / "rest").write_text(
        json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    )
    said = subprocess.run(["sha256sum", tmp_path / "rest"], capture_output=True, text=True, check=True).stdout
    assert said.split()[0] == line["hash"]


def test_the_record_is_for_its_owner_alone(history: History) -> None:
    fill(history)
    assert stat.S_IMODE(history.path.stat().st_mode) == 0o600


def test_a_whole_record_is_proven_and_says_what_it_cannot_prove(history: History) -> None:
    fill(history, 5)
    report = history.verify()
    assert (report.ok, report.lines, report.first_broken) == (True, 5, None)
    assert report.head == list(history.read())[-1]["hash"]
    assert any("cut off the end" in one for one in report.unproven)


def test_every_line_removed_doubled_or_swapped_is_found_but_not_a_tail_cut_off(history: History) -> None:
    lines = fill(history, 6).splitlines(keepends=True)
    for place in range(len(lines)):
        history.path.write_bytes(b"".join(lines[:place] + lines[place + 1 :]))
        assert history.verify().ok == (place == len(lines) - 1), f"removed {place}"
        history.path.write_bytes(b"".join([*lines[: place + 1], *lines[place:]]))
        assert history.verify().first_broken == place + 2, f"doubled {place}"
        for other in range(place):
            moved = list(lines)
            moved[place], moved[other] = moved[other], moved[place]
            history.path.write_bytes(b"".join(moved))
            assert history.verify().first_broken == other + 1, f"swapped {place} and {other}"


def test_a_forged_line_with_a_right_hash_breaks_the_line_after_it(history: History) -> None:
    lines = [json.loads(line) for line in fill(history, 3).splitlines()]
    lines[1]["agent"] = "mallory"
    lines[1]["hash"] = digest(lines[1])
    history.path.write_text("".join(canonical_line(line) for line in lines))
    assert history.verify().first_broken == 3


def canonical_line(line: dict[str, object]) -> str:
    return json.dumps(line, separators=(",", ":")) + "\n"


def test_a_line_torn_by_a_crash_is_taken_out_and_recorded_by_the_next_writer(history: History) -> None:
    whole = fill(history, 3)
    start = whole.rindex(b"\n", 0, -1) + 1
    for length in range(1, len(whole) - start - 1):
        history.path.write_bytes(whole[: start + length])
        report = history.verify()
        assert not report.ok
        assert "not finished" in str(report.problem)
        history.append("restore", now=2000.0, agent="z")
        assert history.verify().ok
        healed, new = list(history.read())[-2:]
        assert (healed["kind"], healed["removed_bytes"]) == (HEALED, length)
        assert whole[start : start + length].decode().startswith(healed["removed"])
        assert new["kind"] == "restore"


def test_a_last_line_that_lacks_only_its_end_is_kept(history: History) -> None:
    whole = fill(history, 3)
    history.path.write_bytes(whole[:-1])
    history.append("restore", now=2000.0)
    assert history.verify().ok
    assert [line["kind"] for line in history.read()] == ["backup", "backup", "backup", HEALED, "restore"]


def test_zeros_that_a_power_cut_leaves_at_the_end_are_taken_out(history: History) -> None:
    whole = fill(history, 2)
    history.path.write_bytes(whole + b"\0" * 5000)
    history.append("restore", now=2000.0)
    assert history.verify().ok


def test_the_record_goes_on_after_damage_says_so_and_the_damage_stays_visible(history: History) -> None:
    whole = fill(history, 3)
    history.path.write_bytes(whole.replace(b'"agent":"a2"', b'"agent":"a9"'))
    history.append("backup", now=2000.0)
    history.append("backup", now=2001.0)
    kinds = [line["kind"] for line in history.read()]
    assert kinds == ["backup"] * 3 + [HEALED, "backup", "backup"]
    assert history.verify().first_broken == 3


def test_garbage_as_the_last_line_does_not_stop_the_record(history: History) -> None:
    history.path.write_bytes(b"not a line\n")
    history.append("backup", now=1.0)
    assert not history.verify().ok
    assert [line["kind"] for line in history.read()] == [HEALED, "backup"]


def test_readers_leave_out_a_half_line_and_whatever_is_no_line(history: History) -> None:
    whole = fill(history, 2)
    history.path.write_bytes(whole + b'garbage\n[1]\n{"seq":3,"at":5,"ki')
    assert [line["seq"] for line in history.read()] == [1, 2]


def test_lines_are_chosen_by_kind_agent_and_time(history: History) -> None:
    fill(history, 6)
    history.append("prune", now=5000.0, agent="a1")
    assert [line["seq"] for line in history.read(kind="prune")] == [7]
    assert [line["seq"] for line in history.read(agent="a1")] == [2, 5, 7]
    assert [line["seq"] for line in history.read(agent="a1", kind="backup")] == [2, 5]
    assert [line["seq"] for line in history.read(since=1004.5)] == [5, 6, 7]


def test_an_absent_record_reads_as_empty(history: History) -> None:
    assert list(history.read()) == []


def write_many(path: Path, name: str, count: int) -> None:
    history = History(path)
    for number in range(count):
        history.append(
            "backup", now=float(number), agent=name, number=number, padding="x" * (number * 37 % 3000)
        )


def test_many_processes_write_one_unbroken_chain(history: History) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_many, args=(history.path, f"w{n}", 40)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 4
    report = history.verify()
    assert (report.ok, report.lines) == (True, 160)
    for n in range(4):
        assert [line["number"] for line in history.read(agent=f"w{n}")] == list(range(40))


def test_writers_killed_anywhere_leave_a_record_that_the_next_one_mends(history: History) -> None:
    script = (
        "import sys; from pathlib import Path; from backup_worker.history import History\n"
        "h = History(Path(sys.argv[1]))\n"
        "while True: print(h.append('backup', now=1.0, padding='x' * 50000)['seq'], flush=True)"
    )
    last = 0
    for round_ in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", script, history.path], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout
        for _ in range(5 + round_ * 7):
            last = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        rest = [int(line) for line in writer.stdout.read().split()]
        last = max([last, *rest])
        writer.wait()
    history.append("restore", now=2.0)
    report = history.verify()
    assert report.ok
    assert report.lines > last


@pytest.mark.parametrize("torn", [b"", b'{"seq":4,"at"', b"x" * 500])
def test_a_full_disk_leaves_the_record_as_it_was(history: History, torn: bytes) -> None:
    # Torn bytes used to be cut off before the line that says so was written: they were gone without a word.
    whole = fill(history, 3) + torn
    history.path.write_bytes(whole)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A limit on the file's size fails as a full disk does: in the middle of the write.
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 50, before[1]))
    try:
        with pytest.raises(HistoryUnwritable) as caught:
            history.append("backup", now=1.0, agent="z")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.retryable
    assert history.path.read_bytes() == whole
    history.append("backup", now=1.0, agent="z")
    assert history.verify().lines == 4 + bool(torn)
    assert [line["removed_bytes"] for line in history.read(HEALED)] == ([len(torn)] if torn else [])


def test_a_disk_without_a_byte_left_is_a_clear_error() -> None:
    with pytest.raises(
        HistoryUnwritable, match="cannot write the history “/dev/full”: no space left"
    ) as caught:
        History(Path("/dev/full")).append("backup", now=1.0)
    assert "free some space" in str(caught.value.hint)


def test_a_link_in_the_place_of_the_record_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / "history").symlink_to(tmp_path / "target")
    with pytest.raises(HistoryUnwritable):
        History(tmp_path / "history").append("backup", now=1.0)
    assert (tmp_path / "target").read_text() == "precious"


def test_a_record_held_by_a_stuck_process_is_an_error_not_a_hang(history: History) -> None:
    fill(history)
    with history.path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(HistoryUnwritable, match="does not let go"):
            history.append("backup", now=1.0)
    history.append("backup", now=1.0)


def test_a_child_forked_during_a_write_does_not_keep_the_lock(history: History) -> None:
    with history._locked():  # the moment in which another thread of a worker forks its job
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
    try:
        history.append("backup", now=1.0)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_record_that_is_moved_away_while_a_writer_waits_is_not_written_to(
    history: History, tmp_path: Path
) -> None:
    fill(history)
    patient = History(history.path, lock_timeout_s=10)
    with history.path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = threading.Thread(target=patient.append, args=("restore",), kwargs={"now": 9.0})
        writer.start()
        history.path.rename(tmp_path / "old.jsonl")
    writer.join()
    assert [line["kind"] for line in history.read()] == ["restore"]
    assert len(list(History(tmp_path / "old.jsonl").read())) == 3


def test_a_follower_sees_new_lines_whole_and_survives_replacement(history: History, tmp_path: Path) -> None:
    fill(history, 2)
    steps: Iterator[str] = iter(["half", "rest", "replaced", "end"])
    raw = b""

    def next_step() -> bool:
        nonlocal raw
        step = next(steps)
        if step == "half":
            history.append("verify", now=1.0)
            whole = history.path.read_bytes()
            raw = whole[-20:]
            history.path.write_bytes(whole[:-20])
        elif step == "rest":
            with history.path.open("ab") as file:
                file.write(raw)
        elif step == "replaced":
            history.path.rename(tmp_path / "old")
            history.append("prune", now=2.0)
        return step == "end"

    kinds = [line["kind"] for line in history.follow(poll_s=0.001, stop=next_step)]
    assert kinds == ["backup", "backup", "verify", "prune"]


@pytest.mark.parametrize("kind", ["", "Backup", "back up", "-a", "a_b"])
def test_a_kind_is_words_joined_by_hyphens(history: History, kind: str) -> None:
    with pytest.raises(UsageError):
        history.append(kind, now=1.0)
    assert not history.path.exists()


def test_the_history_s_own_fields_cannot_be_given(history: History) -> None:
    with pytest.raises(UsageError, match="“seq”"):
        history.append("backup", now=1.0, seq=9)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(st.characters())
    | st.binary(max_size=9)
    | st.builds(Path, st.just("/agents/z")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(st.characters(), max_size=5), inner, max_size=3)
        | st.sets(st.integers() | st.text(max_size=3), max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(ANYTHING, min_size=1, max_size=3))
def test_whatever_is_recorded_stays_provable(
    tmp_path_factory: pytest.TempPathFactory, values: list[object]
) -> None:
    history = History(tmp_path_factory.mktemp("h") / "h.jsonl")
    for value in values:
        history.append("backup", now=1.0, value=value)
    report = history.verify()
    assert (report.ok, report.lines, report.problem) == (True, len(values), None)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1"),
        (-0.0, "0"),
        (1e21, "1e+21"),
        (123456789012345680000.0, "123456789012345680000"),
        (1e-6, "0.000001"),
        (1.5e-7, "1.5e-7"),
        (-1.25e-5, "-0.0000125"),
        (333333333.33333329, "333333333.3333333"),
        (4.50, "4.5"),
        (5e-324, "5e-324"),
        (-9007199254740994.0, "-9007199254740994"),
        (1e16, "10000000000000000"),
        (295147905179352830000.0, "295147905179352830000"),
        (999999999999999700000.0, "999999999999999700000"),
        (1.7976931348623157e308, "1.7976931348623157e+308"),
        ({"\ufb33": 1, "\U0001f600": 2, "\u20ac": 3, "1": 4}, '{"1":4,"\u20ac":3,"\U0001f600":2,"\ufb33":1}'),
        ('\u2028\x0f\n\\"/', '"\u2028\\u000f\\n\\\\\\"/"'),
    ],
)
def test_canonical_json_is_that_of_rfc_8785(value: object, text: str) -> None:
    assert canonical(value) == text


def test_disk_errors_keep_their_number_for_whoever_handles_them(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HistoryUnwritable) as caught:
        History(tmp_path / "file" / "history.jsonl").append("backup", now=1.0)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno in (errno.ENOTDIR, errno.EEXIST)
