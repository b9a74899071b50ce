"""Times, durations, numbers and sizes as people read them."""

from __future__ import annotations

import pytest

from backup_worker.units import age, counted, moment, size


@pytest.mark.parametrize(("number", "words"), [(0, "0 files"), (1, "1 file"), (2, "2 files")])
def test_a_noun_agrees_with_its_number(number: int, words: str) -> None:
    assert counted(number, "file") == words


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**31, "2.0 GiB"),
        (2**50, "1024.0 TiB"),
    ],
)
def test_a_size_has_the_unit_that_keeps_it_short(number: int, words: str) -> None:
    assert size(number) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2.0 h"), (2 * 86400, "2.0 d")]
)
def test_a_duration_is_said_as_people_say_it(seconds: float, words: str) -> None:
    assert age(seconds) == words


def test_a_moment_is_told_in_the_schedule_s_zone() -> None:
    assert moment(1795441803.0, "Europe/Oslo") == "2026-11-23 14:50:03"
    assert moment(None, "Europe/Oslo") == "—"
