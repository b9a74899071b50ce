"""Agents that need each other: who waits for whom, and for how long."""

from __future__ import annotations

from backup_worker.recovery.incident import ESCALATED, RECOVERED
from tests.living_fleet import Fleet, steps


def test_an_agent_starts_only_after_what_it_needs_has_proven_that_it_lives(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.add("jay", depends_on=["z"])
    fleet.backup("z")
    fleet.backup("jay")
    jay, z = fleet.drive(fleet.open("jay").id, fleet.open("z").id)
    assert (jay.state, z.state) == (RECOVERED, RECOVERED)
    assert "wait" in steps(jay)
    started = next(one.at for one in jay.steps if one.step == "start")
    assert started >= next(one.at for one in z.steps if one.step == "prove")


def test_what_needs_an_agent_that_was_given_up_is_held_and_starts_when_that_one_is_back(fleet: Fleet) -> None:
    fleet.add("z", mode="die", recovery={"attempts": 1})
    fleet.add("jay", depends_on=["z"])
    fleet.backup("z")
    fleet.backup("jay")
    jay = fleet.open("jay")
    assert fleet.recover("z").state == ESCALATED
    held = fleet.service.advance(jay.id)
    assert (held.is_open, steps(held)[-1]) == (True, "hold")
    assert "z, which could not be recovered" in held.steps[-1].detail
    assert fleet.running("jay") == []
    # Looking again says nothing new.
    assert steps(fleet.service.advance(jay.id)) == steps(held)
    fleet.set_mode("z", "beat")
    fleet.backup("z")
    again = fleet.open("z")
    jay, z = fleet.drive(jay.id, again.id)
    assert (jay.state, z.state) == (RECOVERED, RECOVERED)


def test_one_that_may_live_without_what_it_needs_is_started_all_the_same(fleet: Fleet) -> None:
    fleet.add("z", mode="die", recovery={"attempts": 1})
    fleet.add("jay", depends_on=["z"], recovery={"without_dependencies": "start"})
    fleet.backup("z")
    fleet.backup("jay")
    jay, z = fleet.drive(fleet.open("jay").id, fleet.open("z").id)
    assert (jay.state, z.state) == (RECOVERED, ESCALATED)
    assert "depend!" in steps(jay)


def test_a_need_that_never_beats_is_given_up_when_its_death_would_have_been_noticed(fleet: Fleet) -> None:
    fleet.add("z", heartbeat={"dead_after": 0.5})
    fleet.add("jay", depends_on=["z"], heartbeat={"verify_within": 0.5})
    fleet.backup("jay")
    incident = fleet.recover("jay")
    assert incident.state == ESCALATED
    waited = next(one for one in incident.steps if one.step == "depend")
    assert not waited.ok
    assert "no beat of z" in waited.detail
    assert waited.at - next(one.at for one in incident.steps if one.step == "wait") >= 0.95
