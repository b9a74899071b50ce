"""The change that killed an agent: found with few trials, and never where an agent that works on and off misleads."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backup_worker import backups
from backup_worker.config import load
from backup_worker.recovery.bisecting import FOLDER, PROBES, Bisection, Bisector, Tried, search
from backup_worker.runtime import Runtime
from backup_worker.snapshots import Repository
from em_bridge.errors import NotFound, UsageError
from tests.living_fleet import Fleet

NOW = 1_795_000_000.0

# ── the search ──────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(1, 300), st.data())
def test_one_change_is_found_exactly_and_with_few_trials(count: int, data: st.DataObject) -> None:
    working = data.draw(st.integers(1, count))
    asked: list[int] = []

    def works(number: int) -> bool:
        asked.append(number)
        return number < working

    found = search(count, works)
    assert found.good == working - 1
    assert found.bad == (working if working < count else None)
    assert found.monotonic
    assert found.steady
    assert len(asked) <= 2 + math.ceil(math.log2(count + 1)) + PROBES + 2


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.booleans())
def test_what_is_said_of_an_agent_that_works_on_and_off_is_true(states: list[bool], everything: bool) -> None:
    found = search(len(states), states.__getitem__, everything=everything)
    assert all(states[number] == one for number, one in found.results.items())
    assert (found.good is None) == (not any(states)), "a state that works is found if there is one"
    if found.good is not None:
        assert states[found.good]
        if found.bad is not None:
            assert (found.bad, states[found.bad]) == (found.good + 1, False)
        else:
            assert found.good == len(states) - 1
        assert not any(one for number, one in found.results.items() if number > found.good)
    if everything:
        assert found.good == max((number for number, one in enumerate(states) if one), default=None)
        assert found.monotonic == (states == sorted(states, reverse=True))


def test_a_good_stretch_behind_the_boundary_is_seen_and_said() -> None:
    states = [True] * 10 + [False] * 10 + [True] * 10 + [False]
    found = search(len(states), states.__getitem__)
    assert (found.good, found.bad) == (29, 30)
    assert not found.monotonic


def test_a_state_that_answers_differently_each_time_is_not_believed() -> None:
    answers = iter([False, True, False, True, True])
    assert not search(2, lambda _: next(answers)).steady


# ── with real states ────────────────────────────────────────────────────────────────────────────────────────────

HEALTH = "import json, sys; sys.exit(0 if json.load(open('weights.json'))['speed'] < 1 else 'too fast')"


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    fleet = Fleet(tmp_path, "redis://127.0.0.1:1/0")
    fleet.add("z", health=[sys.executable, "-c", HEALTH])
    return fleet


def store(fleet: Fleet, speed: float) -> str:
    (fleet.root("z") / "weights.json").write_text(json.dumps({"speed": speed}))
    return stored(fleet)


def stored(fleet: Fleet) -> str:
    runtime = Runtime(load(fleet.folder / "config"))
    # Each a second behind the one before.
    now = NOW + len(runtime.repository.snapshots("z"))
    return backups.by_hand(runtime, "z", "weekly", now=now).id


def bisected(fleet: Fleet, *, for_s: float | None = None, everything: bool = False) -> Bisection:
    config = load(fleet.folder / "config")
    bisector = Bisector(config, Repository(config.schedule.repository), "z", for_s=for_s, now=NOW + 999)
    return bisector.run(everything=everything)


def state(one: Tried | None) -> str | None:
    return one.sources[0] if one else None


def test_the_change_that_made_it_unwell_is_named_with_its_difference(fleet: Fleet) -> None:
    ids = [store(fleet, speed) for speed in (0.1, 0.2, 0.3, 1.5, 1.6, 1.7, 1.8)]
    before = fleet.files("z")
    found = bisected(fleet)
    assert (state(found.newest_working), state(found.first_bad)) == (ids[2], ids[3])
    (changed,) = found.as_json()["difference"]["changed"]
    assert changed["keys"] == [{"key": "speed", "kind": "changed", "old": 0.3, "new": 1.5, "delta": 1.2}]
    assert "too fast" in (found.first_bad.detail if found.first_bad else "")
    assert fleet.files("z") == before
    assert os.listdir(fleet.state / FOLDER) == [], "nothing is left behind"


def test_states_that_are_equal_are_one_and_a_suspect_one_can_be_the_killer(fleet: Fleet) -> None:
    good = store(fleet, 0.1)
    store(fleet, 0.1)
    (fleet.root("z") / "SOUL.md").write_text("")
    (fleet.root("z") / "weights.json").write_text("{")
    wiped = stored(fleet)
    found = bisected(fleet)
    assert found.search.count == 2
    assert (state(found.newest_working), state(found.first_bad)) == (good, wiped)


def test_a_start_that_stays_up_proves_a_state_without_the_agent_or_redis(fleet: Fleet) -> None:
    program = (
        "import os, time\n"
        "open('seen', 'w').write(os.environ['REDIS_URL'] + ' ' + os.environ['AGENT_ROOT'])\n"
        "assert open('mode').read() != 'die', 'this state kills me'\n"
        "time.sleep(60)\n"
    )
    (fleet.root("z") / "agent.py").write_text(program)
    good = store(fleet, 0.1)
    fleet.set_mode("z", "die")
    bad = store(fleet, 0.1)
    found = bisected(fleet, for_s=1.0)
    assert (state(found.newest_working), state(found.first_bad)) == (good, bad)
    assert "this state kills me" in (found.first_bad.detail if found.first_bad else "")
    assert not (fleet.root("z") / "seen").exists()
    assert fleet.running("z") == []


def test_with_nothing_to_try_or_to_judge_by_it_says_what_to_do(fleet: Fleet) -> None:
    with pytest.raises(NotFound):
        bisected(fleet)
    store(fleet, 0.1)
    fleet.entries["z"] |= {"health": None, "start": {"systemd": {"unit": "z.service"}}}
    fleet.write()
    for for_s in (None, 1.0):
        with pytest.raises(UsageError) as caught:
            bisected(fleet, for_s=for_s)
        assert caught.value.hint
