"""What is kept and what goes: the promises of retention, against any history of snapshots."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backup_worker.snapshots import (
    Head,
    Policy,
    Scope,
    SnapshotError,
    plan_prune,
    plan_retention,
    prune,
    verify_snapshot,
)
from tests.agent_on_disk import NOON, Place

DAY = 86400.0


def head(number: int, *, status: str = "good", agent: str = "z", tier: str = "daily", at: float | None = None,
         damaged: bool = False, pinned: bool = False) -> Head:  # fmt: skip
    return Head(
        id=f"{tier}/s{number}/{agent}", agent=agent, tier=tier, slot=f"s{number}",
        created_at=NOON + number * DAY if at is None else at, reason="", status=status, files=1, bytes=1,  # type: ignore[arg-type]
        scope=Scope(("**",)), damaged=damaged, pinned=pinned,
    )  # fmt: skip


HISTORIES = st.lists(
    st.builds(
        dict,
        status=st.sampled_from(["good", "good", "suspect", "partial"]),
        agent=st.sampled_from(["z", "jay"]),
        tier=st.sampled_from(["daily", "on-change", "gone"]),
        at=st.integers(0, 40).map(lambda hours: NOON + hours * 3600),
        damaged=st.booleans(),
        pinned=st.sampled_from([False, False, False, True]),
    ),
    max_size=30,
).map(lambda rows: [head(number, **row) for number, row in enumerate(rows)])


@given(HISTORIES, st.integers(0, 5), st.integers(0, 3), st.data())
def test_no_history_breaks_a_promise(heads: list[Head], keep: int, days: int, data: st.DataObject) -> None:
    ids = [one.id for one in heads]
    in_use = frozenset(data.draw(st.lists(st.sampled_from(ids), max_size=3))) if ids else frozenset()
    failing = data.draw(st.sets(st.sampled_from([("z", "daily"), ("jay", "on-change")])))
    policies = {tier: Policy(keep, days=days) for tier in ("daily", "on-change")}
    plan = plan_retention(heads, policies, now=NOON + 3 * DAY, in_use=in_use, failing=failing)
    gone = {decision.id for decision in plan.delete}
    assert sorted([d.id for d in plan.keep] + [d.id for d in plan.delete]) == sorted(ids)
    assert all(decision.reasons for decision in (*plan.keep, *plan.delete))
    assert not gone & in_use
    for one in heads:
        assert not (one.pinned and one.id in gone)
        assert not (one.tier == "gone" and one.id in gone)
    for pair in {(one.agent, one.tier) for one in heads}:
        group = sorted((one for one in heads if (one.agent, one.tier) == pair), key=lambda one: one.sort_key)
        good = [one for one in group if one.is_good]
        kept_good = [one for one in good if one.id not in gone]
        assert not good or good[-1].id not in gone, "the last good one"
        assert len(kept_good) >= min(keep, len(good)), "as many good ones as promised"
        if pair in failing or not group[-1].is_good:
            assert kept_good == good, "nothing good goes while backups fail"


def test_the_newest_good_ones_stay_and_the_rest_goes() -> None:
    plan = plan_retention([head(n) for n in range(6)], {"daily": Policy(3)}, now=NOON + 6 * DAY)
    assert [d.id for d in plan.delete] == ["daily/s0/z", "daily/s1/z", "daily/s2/z"]


def test_a_suspect_snapshot_never_pushes_out_a_good_one() -> None:
    heads = [head(0), head(1), *[head(n, status="suspect") for n in range(2, 9)], head(9)]
    plan = plan_retention(heads, {"daily": Policy(3)}, now=NOON + 9 * DAY)
    assert {d.id for d in plan.keep} >= {"daily/s0/z", "daily/s1/z", "daily/s9/z"}


def test_suspect_snapshots_do_not_pile_up() -> None:
    heads = [head(0), *[head(n, status="suspect") for n in range(1, 50)]]
    plan = plan_retention(heads, {"daily": Policy(3)}, now=NOON + 50 * DAY)
    assert [d.id for d in plan.keep] == ["daily/s0/z", "daily/s47/z", "daily/s48/z", "daily/s49/z"]


def test_order_is_by_creation_never_by_name() -> None:
    heads = [head(9, at=NOON), head(1, at=NOON + 1), head(5, at=NOON + 2)]
    plan = plan_retention(heads, {"daily": Policy(1)}, now=NOON + 3)
    assert [d.id for d in plan.keep] == ["daily/s5/z"]


def test_a_burst_of_changes_leaves_the_last_one_of_each_earlier_day() -> None:
    days = [head(n, tier="on-change", at=NOON + n * DAY) for n in range(9)]
    burst = [head(100 + n, tier="on-change", at=NOON + 9 * DAY + n) for n in range(20)]
    plan = plan_retention([*days, *burst], {"on-change": Policy(10, days=7)}, now=NOON + 9 * DAY + 60)
    kept = {d.id for d in plan.keep}
    assert {f"on-change/s{n}/z" for n in range(2, 9)} <= kept
    assert len(kept) == 17


# -- the executor -----------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path).fill()


def take(place: Place, count: int) -> list[str]:
    return [place.take(slot=f"s{n}", now=NOON + n, unchanged="link").id for n in range(count)]


def test_pruning_deletes_what_the_plan_says_and_nothing_else(place: Place) -> None:
    ids = take(place, 5)
    plan = plan_prune(place.repo, {"daily": Policy(2)}, now=NOON + 9)
    assert prune(place.repo, plan) == ids[:3]
    assert [one.id for one in place.repo.snapshots()] == ids[3:]
    assert all(verify_snapshot(place.repo, one, NOON) == [] for one in ids[3:]), "shared files stay whole"
    assert sorted(os.listdir(place.repo.root / "daily")) == ["s3", "s4"]
    assert os.listdir(place.repo.hidden / "trash") == []


def test_a_snapshot_that_is_read_or_pinned_after_the_plan_was_made_stays(place: Place) -> None:
    ids = take(place, 4)
    plan = plan_prune(place.repo, {"daily": Policy(1)}, now=NOON + 9)
    place.repo.pin(ids[0])
    with place.repo.hold([ids[1]]):
        assert place.repo.in_use(ids) == {ids[1]}
        assert prune(place.repo, plan) == [ids[2]]
    assert prune(place.repo, plan) == [ids[1]]
    assert place.repo.unpin(ids[0])
    assert prune(place.repo, plan) == [ids[0]]


def test_one_that_became_the_last_good_since_the_plan_stays(place: Place) -> None:
    ids = take(place, 2)
    plan = plan_prune(place.repo, {"daily": Policy(1)}, now=NOON + 9)
    (place.repo.path(ids[1]) / "files" / "SOUL.md").write_text("flipped")
    assert verify_snapshot(place.repo, ids[1], NOON)
    assert prune(place.repo, plan) == []


def test_nothing_is_deleted_while_backups_fail(place: Place) -> None:
    take(place, 4)
    (place.base / "agents").rename(place.base / "away")
    with pytest.raises(SnapshotError):
        place.take(slot="s9", now=NOON + 9)
    assert plan_prune(place.repo, {"daily": Policy(1)}, now=NOON + 9).delete == ()
    (place.base / "away").rename(place.base / "agents")
    place.take(slot="s9", now=NOON + 10)
    assert len(plan_prune(place.repo, {"daily": Policy(1)}, now=NOON + 9).delete) == 4


def test_what_dead_processes_left_is_swept_and_what_living_ones_use_is_not(place: Place) -> None:
    place.take()
    for name in ("staging", "trash"):
        (place.repo.hidden / name / "left" / "deep").mkdir(parents=True)
        (place.repo.hidden / name / "left" / "deep").chmod(0o500)
    with place.repo.staging() as mine:
        assert place.repo.sweep() == 2
        assert mine.is_dir()
    assert not mine.exists()


def test_the_dates_of_a_snapshot_that_is_gone_are_not_those_of_the_next_one_of_its_name(place: Place) -> None:
    ids = take(place, 3)
    place.repo.record_verified(ids[0], now=NOON, ok=False)
    notes = place.repo.hidden / "damaged"
    name = os.listdir(notes)[0]
    assert place.repo.delete(ids[0])
    # What a prune leaves that is killed between the last two calls of a deletion.
    (notes / name).touch()
    prune(place.repo, plan_prune(place.repo, {"daily": Policy(2)}, now=NOON + 9))
    assert place.take(slot=ids[0].split("/")[1], now=NOON + 10).id == ids[0]
    assert not place.repo.get_head(ids[0]).damaged
