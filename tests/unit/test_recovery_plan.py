"""Waves: in which order dead agents come back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backup_worker.recovery.plan import waves

FLEET = {"z": [], "jay": ["z"], "rick": ["z"], "leroy": ["jay", "rick"]}

NAMES = [f"a{number}" for number in range(8)]


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, list[str]]:
    """Return a random graph without cycles: an agent needs only agents with smaller numbers."""
    return {
        name: draw(st.lists(st.sampled_from(NAMES[:number]), unique=True)) if number else []
        for number, name in enumerate(NAMES)
    }


def everything_behind(agent: str, graph: dict[str, list[str]]) -> set[str]:
    behind: set[str] = set()
    for needed in graph[agent]:
        behind |= {needed} | everything_behind(needed, graph)
    return behind


@given(graphs(), st.sets(st.sampled_from(NAMES)))
def test_every_dead_agent_starts_once_and_after_all_it_needs_also_through_living_ones(
    graph: dict[str, list[str]], dead: set[str]
) -> None:
    planned = waves(dead, graph)
    started = [agent for wave in planned for agent in wave]
    assert sorted(started) == sorted(dead)
    number = {agent: count for count, wave in enumerate(planned) for agent in wave}
    for agent in dead:
        for needed in everything_behind(agent, graph) & dead:
            assert number[needed] < number[agent]


@given(graphs(), st.sets(st.sampled_from(NAMES)))
def test_no_agent_waits_for_a_wave_that_it_does_not_need(graph: dict[str, list[str]], dead: set[str]) -> None:
    planned = waves(dead, graph)
    for count, wave in enumerate(planned[1:], start=1):
        for agent in wave:
            assert everything_behind(agent, graph) & set(planned[count - 1])


def test_the_whole_fleet_comes_back_in_three_waves() -> None:
    assert waves(FLEET, FLEET) == [("z",), ("jay", "rick"), ("leroy",)]


def test_an_agent_whose_needs_live_starts_at_once() -> None:
    assert waves({"leroy"}, FLEET) == [("leroy",)]
    assert waves({"z", "leroy"}, FLEET) == [("z",), ("leroy",)]


def test_nobody_dead_means_no_wave() -> None:
    assert waves(set(), FLEET) == []
