"""Who is dead: what the two witnesses may and may not prove."""

from __future__ import annotations

import time
from pathlib import Path

import fakeredis
import msgpack
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from backup_worker.config import Config, load
from backup_worker.recovery import witnesses
from backup_worker.recovery.witnesses import ALIVE, GONE, SILENT, UNSURE, judge, silent_together
from em_bridge import streams
from tests.living_fleet import Fleet

NOW = 1_795_000_000.0

PROCESSES = st.one_of(st.none(), st.just([]), st.just(["pid 7 (agent)"]))


@given(PROCESSES, st.booleans(), st.floats(0, 100), st.floats(0.1, 100), st.booleans())
def test_nobody_is_ended_without_two_witnesses(
    running: list[str] | None, steady: bool, silent_s: float, limit_s: float, mass: bool
) -> None:
    verdict = judge(running, steady=steady, silent_s=silent_s, limit_s=limit_s, mass=mass)
    if verdict.is_dead:
        assert not steady
        assert running == [] or (silent_s >= limit_s and not mass)
    assert (verdict.finding == ALIVE) == steady


@pytest.mark.parametrize(
    ("running", "silent_s", "mass", "finding"),
    [
        ([], 0.0, False, GONE),
        ([], 0.0, True, GONE),
        (["pid 7"], 9.9, False, UNSURE),
        (["pid 7"], 10.0, False, SILENT),
        (["pid 7"], 99.0, True, UNSURE),
        (None, 9.9, False, UNSURE),
        (None, 99.0, True, UNSURE),
    ],
)
def test_the_second_witness(running: list[str] | None, silent_s: float, mass: bool, finding: str) -> None:
    verdict = judge(running, steady=False, silent_s=silent_s, limit_s=10, mass=mass)
    assert verdict.finding == finding
    assert verdict.detail


# ── many at once ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def client() -> redis.Redis:
    return fakeredis.FakeRedis()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    fleet = Fleet(tmp_path, "redis://127.0.0.1:1/0")
    for number in range(6):
        fleet.add(f"a{number}")
    return load(tmp_path / "config")


def fall_silent(client: redis.Redis, *agents: str, at: float = NOW, state: str = "DEAD") -> None:
    for agent in agents:
        client.hset(streams.STATES, agent, msgpack.packb({"state": state, "since": at}))


def test_more_than_the_share_at_once_is_a_mass_and_the_first_to_be_looked_at_sees_it(
    client: redis.Redis, config: Config
) -> None:
    fall_silent(client, "a0", "a1", "A2")
    assert silent_together(client, config, "a0", NOW) == [], "three of six are not more than half"
    fall_silent(client, "a3")
    assert silent_together(client, config, "a0", NOW) == ["a0", "a1", "a2", "a3"]


def test_deaths_one_after_another_strangers_and_the_living_are_no_mass(
    client: redis.Redis, config: Config
) -> None:
    fall_silent(client, "a0")
    fall_silent(client, "a1", at=NOW - witnesses.TOGETHER_S - 1)
    fall_silent(client, "a2", at=NOW + witnesses.TOGETHER_S + 1)
    fall_silent(client, "a3", "a4", state="DEGRADED")
    fall_silent(client, "x1", "x2", "x3", "x4")
    client.hset(streams.STATES, "a5", b"\xc1 no record")
    assert silent_together(client, config, "a0", NOW) == []


def test_a_fleet_of_two_has_no_mass(client: redis.Redis, tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, "redis://127.0.0.1:1/0")
    fleet.add("a0")
    fleet.add("a1")
    fall_silent(client, "a0", "a1")
    assert silent_together(client, load(tmp_path / "config"), "a0", NOW) == []


def test_the_host_is_not_well_without_memory_or_a_disk_that_takes_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert witnesses._of_the_host(tmp_path / "var") == []
    assert list((tmp_path / "var").iterdir()) == [], "the probe is gone"
    (tmp_path / "file").write_text("")
    assert "cannot be written" in witnesses._of_the_host(tmp_path / "file" / "var")[0]
    monkeypatch.setattr(witnesses, "LEAST_MEMORY", 2.0)
    assert "memory" in witnesses._of_the_host(tmp_path / "var")[0]


def test_the_host_was_started_before_this_test() -> None:
    assert 0 < witnesses.up_s() <= time.clock_gettime(time.CLOCK_BOOTTIME)
