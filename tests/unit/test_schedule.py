"""Which slots are due, through catch-up, new agents and both changes of daylight saving."""

from __future__ import annotations

import copy
import json
from datetime import UTC, date, datetime, time, timedelta
from itertools import pairwise
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backup_worker import config
from backup_worker.schedule import Due, due, next_run, previous_run, slot_name

SHIPPED = Path(__file__).parents[2] / "config"
OSLO = "Europe/Oslo"
CONFIG = config.load(SHIPPED)
AGENTS = list(CONFIG.agents)


def tier(cron: str, slot: str = "%Y-%m-%d-%H%M") -> config.Tier:
    return config.Tier(cron=cron, include=["*"], slot=slot, keep=1)


def at(text: str, fold: int = 0, zone: str = OSLO) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold).timestamp()


def test_everything_is_due_for_a_fleet_without_snapshots_but_only_the_newest_slot() -> None:
    found = due(CONFIG, set(), at("2026-11-23 12:00"))
    assert found == [
        *(Due("daily", "2026-11-23", agent, at("2026-11-23 07:00")) for agent in AGENTS),
        *(Due("weekly", "2026-W47", agent, at("2026-11-22 23:00")) for agent in AGENTS),
    ]


def test_what_is_made_is_not_due() -> None:
    now = at("2026-11-23 12:00")
    made = {(one.tier, one.slot, one.agent) for one in due(CONFIG, set(), now)}
    assert due(CONFIG, made, now) == []
    assert due(CONFIG, lambda *key: key in made, now) == []


def test_an_agent_that_joins_gets_its_first_snapshots_at_once() -> None:
    now = at("2026-11-25 12:00")
    made = {(one.tier, one.slot, one.agent) for one in due(CONFIG, set(), now) if one.agent != "jay"}
    assert [(one.tier, one.agent) for one in due(CONFIG, made, now)] == [("daily", "jay"), ("weekly", "jay")]


def test_slots_missed_for_a_month_are_made_up_once() -> None:
    before = at("2026-10-20 12:00")
    made = {(one.tier, one.slot, one.agent) for one in due(CONFIG, set(), before)}
    slots = {(one.tier, one.slot) for one in due(CONFIG, made, at("2026-11-23 06:59:59"))}
    assert slots == {("daily", "2026-11-22"), ("weekly", "2026-W47")}


def test_a_tier_for_events_alone_is_never_due() -> None:
    assert "on-change" not in {one.tier for one in due(CONFIG, set(), at("2026-11-23 12:00"))}


def test_a_tier_for_events_names_its_slots_to_the_second() -> None:
    assert slot_name(CONFIG.tier("on-change"), OSLO, at("2026-11-23 14:30:15")) == "2026-11-23-143015"


def test_a_run_is_due_at_its_very_second_and_not_before() -> None:
    seven = at("2026-11-23 07:00")
    assert previous_run(tier("0 7 * * *"), OSLO, seven) == seven
    assert previous_run(tier("0 7 * * *"), OSLO, seven - 0.001) == at("2026-11-22 07:00")
    assert next_run(tier("0 7 * * *"), OSLO, seven) == at("2026-11-24 07:00")
    assert next_run(tier("0 7 * * *"), OSLO, seven - 0.001) == seven


def test_a_time_that_the_clock_skips_comes_right_after_the_gap_and_once() -> None:
    nightly = tier("30 2 * * *", "%Y-%m-%d")
    after_the_gap = at("2026-03-29 03:00")
    assert next_run(nightly, OSLO, at("2026-03-28 12:00")) == after_the_gap
    assert next_run(nightly, OSLO, after_the_gap) == at("2026-03-30 02:30")
    assert previous_run(nightly, OSLO, at("2026-03-29 12:00")) == after_the_gap
    assert slot_name(nightly, OSLO, after_the_gap) == "2026-03-29"


def test_a_time_that_the_clock_shows_twice_comes_the_first_time_only() -> None:
    nightly = tier("30 2 * * *", "%Y-%m-%d")
    first, second = at("2026-10-25 02:30", fold=0), at("2026-10-25 02:30", fold=1)
    assert second - first == 3600
    assert next_run(nightly, OSLO, at("2026-10-24 12:00")) == first
    assert next_run(nightly, OSLO, first) == at("2026-10-26 02:30")
    for now in (first, second - 1800, second, second + 1800):
        assert previous_run(nightly, OSLO, now) == first


def test_in_the_second_showing_of_an_hour_the_run_of_the_first_is_not_forgotten() -> None:
    """02:15 on the wall, the second time: 02:30 was 45 minutes ago, although the wall says it is to come."""
    assert previous_run(tier("30 2 * * *"), OSLO, at("2026-10-25 02:15", fold=1)) == at(
        "2026-10-25 02:30", fold=0
    )


def test_an_hourly_run_keeps_its_pace_through_both_changes() -> None:
    hourly = tier("15 * * * *")
    for start in ("2026-03-28 22:00", "2026-10-24 22:00"):
        now, fires = at(start), []
        for _ in range(12):
            now = next_run(hourly, OSLO, now)
            fires.append(now)
        assert {later - earlier for earlier, later in pairwise(fires)} == {3600}


def test_both_runs_of_an_hour_that_the_clock_shows_twice_have_a_slot_of_their_own() -> None:
    # They had one name: the second backup was never made, and never missed.
    first, second = at("2026-10-25 02:15", fold=0), at("2026-10-25 02:15", fold=1)
    hourly = tier("15 * * * *", "%Y-%m-%dT%H")
    assert [slot_name(hourly, OSLO, fire) for fire in (first, second)] == ["2026-10-25T02", "2026-10-25T02-2"]
    assert slot_name(hourly, OSLO, second + 3600) == "2026-10-25T03"
    assert slot_name(tier("15 * * * *", "%Y-%m-%dT%H%Z"), OSLO, second) == "2026-10-25T02CET"
    # What runs once only has one name, whenever it is asked for.
    assert slot_name(tier("15 2 * * *", "%Y-%m-%d"), OSLO, second) == "2026-10-25"
    assert slot_name(tier("15 * * * *", "%Y-%m-%dT%H"), "UTC", second) == "2026-10-25T01"


def test_a_week_is_named_by_the_year_that_it_belongs_to() -> None:
    weekly = CONFIG.tier("weekly")
    assert slot_name(weekly, OSLO, at("2027-01-03 23:00")) == "2026-W53"
    assert slot_name(weekly, OSLO, at("2024-12-30 23:00")) == "2025-W01"


def test_slots_are_named_in_the_schedule_s_zone() -> None:
    moment = datetime(2026, 11, 23, 23, 30, tzinfo=UTC).timestamp()
    assert slot_name(tier("0 0 * * *", "%Y-%m-%d"), "UTC", moment) == "2026-11-23"
    assert slot_name(tier("0 0 * * *", "%Y-%m-%d"), OSLO, moment) == "2026-11-24"


MOMENTS = st.one_of(
    st.floats(at("2020-01-01"), at("2035-01-01")),
    # Three hours around each change of the clock, where mistakes live.
    st.builds(
        lambda change, offset: at(change) + offset,
        st.sampled_from(["2026-03-29 01:30", "2026-10-25 02:00", "2027-03-28 01:30", "2027-10-31 02:00"]),
        st.floats(-5400, 9000),
    ),
)
MINUTES = st.one_of(st.integers(0, 59).map(str), st.sampled_from(["*", "*/7", "*/30", "0,30", "10-20/5"]))
HOURS = st.one_of(st.integers(0, 23).map(str), st.sampled_from(["*", "*/2", "1-3", "2,3", "2"]))
CRONS = st.builds(
    lambda *parts: " ".join(parts),
    MINUTES,
    HOURS,
    st.sampled_from(["*", "1", "25-29"]),
    st.just("*"),
    st.sampled_from(["*", "SUN", "1-5"]),
)


@given(CRONS, MOMENTS)
def test_now_lies_between_the_previous_and_the_next_run_and_nothing_else_does(cron: str, now: float) -> None:
    one = tier(cron)
    before, after = previous_run(one, OSLO, now), next_run(one, OSLO, now)
    assert before <= now < after
    assert next_run(one, OSLO, before) == after
    assert previous_run(one, OSLO, before) == before
    assert previous_run(one, OSLO, after) == after


@given(st.dates(date(2020, 1, 1), date(2035, 1, 1)), st.integers(0, 23), st.integers(0, 59))
def test_a_daily_run_comes_exactly_once_on_every_date(day: date, hour: int, minute: int) -> None:
    """Held against another definition: the first moment of the date at which the wall clock has reached the time."""
    zone = ZoneInfo(OSLO)
    wall = datetime.combine(day, time(hour, minute), zone)
    expected = wall.timestamp()
    if wall.astimezone(UTC).astimezone(zone).replace(tzinfo=None) != wall.replace(tzinfo=None):
        expected = datetime.combine(day, time(3), zone).timestamp()
    midnight = datetime.combine(day, time(), zone).timestamp()
    one = tier(f"{minute} {hour} * * *", "%Y-%m-%d")
    assert next_run(one, OSLO, midnight - 1) == expected
    assert slot_name(one, OSLO, expected) == day.isoformat()
    tomorrow = datetime.combine(day + timedelta(days=1), time(), zone).timestamp()
    assert next_run(one, OSLO, expected) >= tomorrow


@given(MOMENTS, st.floats(0, 40 * 86400))
def test_once_made_nothing_is_due_until_the_next_run(now: float, later: float) -> None:
    made = {(one.tier, one.slot, one.agent) for one in due(CONFIG, set(), now)}
    coming = min(next_run(CONFIG.tier(name), OSLO, now) for name in ("daily", "weekly"))
    then = now + later
    found = due(CONFIG, made, then)
    assert (found == []) == (then < coming)
    assert all(now < one.fire_at <= then for one in found)


@pytest.mark.parametrize(
    "zone", ["America/New_York", "Australia/Lord_Howe", "Asia/Kolkata", "UTC", "Pacific/Apia"]
)
def test_other_zones_are_as_consistent(zone: str) -> None:
    document = copy.deepcopy(json.loads((SHIPPED / config.SCHEDULE_FILE).read_text()))
    document["timezone"] = zone
    contents = {
        config.SCHEDULE_FILE: json.dumps(document).encode(),
        config.AGENTS_FILE: (SHIPPED / config.AGENTS_FILE).read_bytes(),
    }
    there = config.from_contents(SHIPPED, contents)
    one = there.tier("daily")
    now = at("2026-01-01", zone="UTC")
    days = set()
    for _ in range(365):
        now = next_run(one, zone, now)
        assert previous_run(one, zone, now) == now
        days.add(slot_name(one, zone, now))
    assert len(days) == 365
