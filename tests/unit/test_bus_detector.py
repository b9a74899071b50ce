"""The failure detector, anywhere in time."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from em_bridge.detector import Detector, Transition

STEP_S = 0.5
START = 1_000_000.0


class World:
    """A detector with a limit of 10 s, ticked every half second; `beating` agents beat every second."""

    def __init__(self, limit_s: float = 10.0) -> None:
        self.now = START
        self.detector = Detector(lambda agent: limit_s)
        self.beating: dict[str, str] = {}
        self.seen: list[Transition] = []
        self.detector.tick(self.now)

    def run(self, seconds: float) -> list[str]:
        """Let time pass; return the changes as `agent STATE`."""
        found: list[Transition] = []
        end = self.now + seconds
        while self.now < end:
            self.now += STEP_S
            if self.now % 1 == 0:
                for agent, incarnation in self.beating.items():
                    self.detector.observe(agent, incarnation, self.now, status="ok")
            found += self.detector.tick(self.now)
        self.seen += found
        return [f"{change.agent} {change.state}" for change in found]


def test_an_agent_is_alive_then_degraded_then_dead_and_alive_again() -> None:
    world = World()
    world.beating["z"] = "i1"
    assert world.run(30) == ["z ALIVE"]
    del world.beating["z"]
    assert world.run(4) == []
    assert world.run(2) == ["z DEGRADED"]
    assert world.run(3) == []
    assert world.run(2) == ["z DEAD"]
    assert world.run(100) == []
    world.beating["z"] = "i2"
    assert world.run(2) == ["z ALIVE"]
    assert [change.reason for change in world.seen] == [
        "first heartbeat",
        "no heartbeat for 5.0 s",
        "no heartbeat for 10 s",
        "heartbeats again",
    ]
    assert [change.incarnation for change in world.seen] == ["i1", "i1", "i1", "i2"]


def test_a_heartbeat_that_complains_makes_degraded_and_a_good_one_mends_it() -> None:
    world = World()
    world.beating["z"] = "i1"
    world.run(2)
    world.detector.observe("z", "i1", world.now, status="disk full")
    del world.beating["z"]
    assert world.run(1) == ["z DEGRADED"]
    assert world.seen[-1].reason == "says “disk full”"
    world.beating["z"] = "i1"
    assert world.run(2) == ["z ALIVE"]


def test_a_late_heartbeat_of_a_replaced_incarnation_never_counts() -> None:
    world = World()
    world.beating["z"] = "old"
    world.run(3)
    world.beating["z"] = "new"
    world.run(3)
    del world.beating["z"]
    for _ in range(20):
        assert not world.detector.observe("z", "old", world.now)
        world.run(1)
    assert world.seen[-1].state == "DEAD" and world.seen[-1].incarnation == "new"


def test_a_pause_of_the_detector_is_not_a_death() -> None:
    world = World()
    world.beating["z"] = "i1"
    world.run(5)
    world.now += 3600
    assert world.run(9) == []
    # One that is really gone is dead a full limit after the pause.
    del world.beating["z"]
    assert world.run(11) == ["z DEGRADED", "z DEAD"]


def test_a_clock_that_is_set_back_hides_no_death() -> None:
    world = World()
    world.beating["z"] = "i1"
    world.run(5)
    world.now -= 3600
    del world.beating["z"]
    assert world.run(11) == ["z DEGRADED", "z DEAD"]


def test_a_dead_agent_does_not_come_alive_by_grace_alone() -> None:
    world = World()
    world.beating["z"] = "i1"
    world.run(5)
    del world.beating["z"]
    world.run(20)
    world.now += 3600
    assert world.run(30) == []


def test_one_that_never_beat_is_judged_only_if_it_is_known_to_have_beaten_once() -> None:
    world = World()
    assert world.run(60) == []
    world.detector.watch("z", world.now)
    assert world.run(12) == ["z DEAD"]


def test_what_is_remembered_is_not_reported_again() -> None:
    world = World()
    world.detector.watch(
        "z", world.now, state="DEAD", reason="no heartbeat for 60 s", incarnation="i1", retired=["i0"]
    )
    assert world.run(30) == []
    world.detector.observe("z", "i0", world.now)
    assert world.run(2) == []
    world.detector.observe("z", "i1", world.now)
    assert world.run(1) == ["z ALIVE"]


def test_an_infinite_limit_never_kills() -> None:
    world = World(math.inf)
    world.beating["z"] = "i1"
    world.run(3)
    del world.beating["z"]
    assert world.run(10_000) == []


@given(
    st.lists(st.tuples(st.sampled_from(["beat", "silence", "jump", "back"]), st.integers(1, 40)), max_size=12)
)
def test_nobody_dies_without_a_full_limit_of_watched_silence(history: list[tuple[str, int]]) -> None:
    world = World()
    watched_silence = 0.0
    for what, amount in history:
        if what in ("jump", "back"):
            world.now += 1000.0 * amount * (1 if what == "jump" else -1)
            watched_silence = 0.0
            continue
        if what == "beat":
            world.beating["z"] = "i1"
        before = len(world.seen)
        world.run(amount)
        died = any(change.state == "DEAD" for change in world.seen[before:])
        if what == "beat":
            assert not died
            world.beating.clear()
            watched_silence = 0.0
        else:
            watched_silence += amount
            assert not died or watched_silence + 1.5 >= 10.0
