"""What comes round in its time, and never all at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backup_worker.maintenance import rolling

DAY = 86400.0
PERIOD = 30 * DAY


def live_through(
    last: dict[str, float], *, every_s: float, period_s: float, until: float
) -> tuple[float, int]:
    """Make every run from the beginning to `until`; return the greatest age ever seen, and the largest run."""
    oldest, largest = 0.0, 0
    now = 0.0
    while now < until:
        chosen = rolling.choose(
            (rolling.after_success(key, at, period_s) for key, at in last.items()), now=now, every_s=every_s
        )
        oldest = max(oldest, now - min(last.values()))
        last |= dict.fromkeys(chosen, now)
        largest = max(largest, len(chosen))
        now += every_s
    return oldest, largest


def test_twenty_thousand_made_on_one_day_are_neither_done_at_once_nor_too_late() -> None:
    snapshots = {f"s{number}": 0.0 for number in range(20_000)}
    oldest, largest = live_through(snapshots, every_s=DAY, period_s=PERIOD, until=1.9 * PERIOD)
    assert oldest < PERIOD
    assert largest < 20_000 / 10


def test_a_few_rest_between_two_times_instead_of_being_done_in_every_run() -> None:
    assert rolling.choose([rolling.after_success("z", 0.0, PERIOD)], now=PERIOD / 3, every_s=600) == []
    assert rolling.choose([rolling.after_success("z", 0.0, PERIOD)], now=PERIOD / 2, every_s=600) == ["z"]


def test_the_longest_due_comes_first() -> None:
    items = [rolling.Item("young", 20.0, 600.0), rolling.Item("old", 10.0, 600.0)]
    assert rolling.choose(items, now=30.0, every_s=600.0)[0] == "old"
    assert rolling.choose(items, now=30.0, every_s=1.0) == ["old"]


def test_what_keeps_failing_is_tried_each_day_and_starves_nothing_else() -> None:
    failing = {f"bad{number}": 0.0 for number in range(50)}
    sound = {f"good{number}": 0.0 for number in range(100)}
    now, oldest = 0.0, 0.0
    while now < 2 * PERIOD:
        items = [rolling.after_failure(key, at, PERIOD) for key, at in failing.items()]
        items += [rolling.after_success(key, at, PERIOD) for key, at in sound.items()]
        chosen = rolling.choose(items, now=now, every_s=3600.0)
        oldest = max(oldest, now - min(sound.values()))
        failing |= {key: now for key in chosen if key in failing}
        sound |= {key: now for key in chosen if key in sound}
        now += 3600.0
    assert oldest < PERIOD
    assert now - min(failing.values()) <= 2.1 * DAY


@given(
    st.lists(st.floats(0, PERIOD), min_size=1, max_size=60),
    st.floats(600, PERIOD / 12),
)
def test_everything_comes_round_in_time_wherever_it_begins(ages: list[float], every_s: float) -> None:
    # What is overdue at the beginning needs until the end of the first stretch; from then on all is in time.
    last = {f"s{number}": -age for number, age in enumerate(ages)}
    every_s = max(every_s, PERIOD / 100)
    live_through(last, every_s=every_s, period_s=PERIOD, until=PERIOD / 2)
    last = {key: at - PERIOD / 2 for key, at in last.items()}
    oldest, _ = live_through(last, every_s=every_s, period_s=PERIOD, until=2 * PERIOD)
    assert oldest < PERIOD
