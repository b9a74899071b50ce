"""The incident as data: its table, its store, and what many at once may do to it."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace

import fakeredis
import msgpack
import pytest
import redis

from backup_worker.recovery.incident import (
    AGAIN_AFTER_S,
    DEADLINES,
    ESCALATED,
    NEXT,
    PHASES,
    RECOVERED,
    Incident,
    IncidentStore,
    Missed,
    Stale,
    after,
    attempted_before,
)
from em_bridge.errors import NotFound

NOW = 1_795_000_000.0


@pytest.fixture
def client() -> redis.Redis:
    return fakeredis.FakeRedis()


@pytest.fixture
def store(client: redis.Redis) -> IncidentStore:
    return IncidentStore(client)


def opened(store: IncidentStore, agent: str = "z", token: str = "1") -> Incident:
    return store.open(agent, token=token, now=NOW, reason="test", beat_mark="0-0")[0]


@pytest.mark.parametrize(("before", "after"), list(itertools.product(PHASES, PHASES)))
def test_only_the_transitions_of_the_table_are_allowed(before: str, after: str) -> None:
    incident = Incident("z-1", "z", NOW, phase=before, resumes=3)
    if after in NEXT[before]:
        assert incident.entering(after).phase == after
        assert incident.entering(after).resumes == 0
    else:
        with pytest.raises(ValueError, match=f"in {before} cannot enter {after}"):
            incident.entering(after)


def test_what_is_stored_comes_back_equal(store: IncidentStore) -> None:
    incident = replace(
        opened(store).noted("fence", NOW, True, "gone"), chosen=("daily/1/z",), tried=("current",),
        evidence=("/tree",), old_incarnations=("x",), pid=7, deadline=NOW + 1, start_mark="5-1",
    )  # fmt: skip
    saved = store.save(incident, wake_at=NOW)
    assert store.get(incident.id) == saved == replace(incident, version=2)


def test_many_that_open_at_once_open_one_incident(store: IncidentStore) -> None:
    results: list[tuple[Incident, bool]] = []

    def open_one(number: int) -> None:
        results.append(store.open("z", token=str(number), now=NOW, reason="dead", beat_mark="0-0"))

    threads = [threading.Thread(target=open_one, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 16
    assert len({incident.id for incident, _ in results}) == 1
    assert sum(is_new for _, is_new in results) == 1
    assert len(list(store.all())) == 1


def test_opening_again_after_a_lost_reply_still_counts_as_new(store: IncidentStore) -> None:
    first = store.open("z", token="1", now=NOW, reason="", beat_mark="0-0")
    again = store.open("z", token="1", now=NOW, reason="", beat_mark="0-0")
    assert first == again == (store.get("z-1"), True)


def test_an_index_without_its_incident_does_not_keep_a_new_one_from_opening(
    store: IncidentStore, client: redis.Redis
) -> None:
    lost = opened(store, token="lost")
    client.delete("backup:incident:" + lost.id)
    assert opened(store, token="new").id == "z-new"
    assert [one.id for one in store.open_incidents()] == ["z-new"]


def test_writing_over_what_somebody_else_wrote_is_refused(store: IncidentStore) -> None:
    incident = opened(store)
    mine, theirs = replace(incident, attempts=1), replace(incident, attempts=2)
    store.save(theirs, wake_at=NOW)
    with pytest.raises(Stale):
        store.save(mine, wake_at=NOW)
    assert store.get(incident.id).attempts == 2


def test_a_write_that_is_repeated_because_its_reply_was_lost_is_a_success(store: IncidentStore) -> None:
    incident = replace(opened(store), attempts=1)
    assert store.save(incident, wake_at=NOW) == store.save(incident, wake_at=NOW)
    assert store.get(incident.id).version == 2


def test_a_new_incident_is_looked_at_soon_even_if_nobody_wakes_it(
    store: IncidentStore, client: redis.Redis
) -> None:
    incident = opened(store)
    assert client.zscore(DEADLINES, incident.id) == NOW + AGAIN_AFTER_S


@pytest.mark.parametrize("state", [RECOVERED, ESCALATED])
def test_closing_removes_the_deadline_and_makes_room_for_the_next(
    store: IncidentStore, client: redis.Redis, state: str
) -> None:
    incident = opened(store)
    store.save(incident.closed(state, NOW, "9-0"), wake_at=None)
    assert client.zcard(DEADLINES) == 0
    assert store.open_ids() == {}
    assert store.open_incidents() == []
    assert store.latest(["z", "jay"]) == {"z": store.get(incident.id)}
    second = opened(store, token="2")
    assert second.id != incident.id
    assert store.latest(["z"])["z"].id == second.id


def test_an_open_incident_cannot_be_left_without_anybody_to_wake_it(store: IncidentStore) -> None:
    with pytest.raises(ValueError, match="look at"):
        store.save(opened(store), wake_at=None)


def test_closing_an_old_incident_leaves_a_newer_one_of_the_agent_open(
    store: IncidentStore, client: redis.Redis
) -> None:
    old = opened(store)
    client.hset("backup:incidents:open", "z", "z-newer")
    store.save(old.closed(RECOVERED, NOW, "0-0"), wake_at=None)
    assert store.open_ids() == {"z": "z-newer"}


def test_an_unknown_incident_is_not_found(store: IncidentStore) -> None:
    with pytest.raises(NotFound, match="z-404"):
        store.get("z-404")


def test_all_incidents_come_newest_first(store: IncidentStore) -> None:
    for number in range(250):
        store.open(f"a{number}", token="1", now=NOW + number, reason="", beat_mark="0-0")
    assert [one.agent for one in store.all()] == [f"a{number}" for number in reversed(range(250))]


def closed(store: IncidentStore, number: int, *, agent: str = "z", at: float = NOW) -> Incident:
    incident, _ = store.open(agent, token=str(number), now=at, reason="", beat_mark="0-0")
    return store.save(incident.closed(RECOVERED, at + 1, "0-0"), wake_at=None)


def test_closed_incidents_are_let_go_of_by_age_and_count_but_never_the_last_of_an_agent_or_an_open_one(
    store: IncidentStore, client: redis.Redis
) -> None:
    closed(store, 0, agent="jay", at=NOW - 500)
    waiting = store.open("rick", token="w", now=NOW - 500, reason="", beat_mark="0-0")[0]
    for number in range(10):
        closed(store, number, at=NOW - 100 + number)
    assert store.forget(NOW, max_age_s=95.5, keep=7) == 5
    assert [one.id for one in store.all()] == ["z-9", "z-8", "z-7", "z-6", "z-5", waiting.id, "jay-0"]
    assert store.forget(NOW, max_age_s=1, keep=0) == 4
    assert {one.agent for one in store.all()} == {"z", "jay", "rick"}
    assert len(list(client.scan_iter("backup:incident:*"))) == 3
    assert store.latest(["z", "jay"]).keys() == {"z", "jay"}


def test_an_incident_of_an_older_version_can_still_be_read(store: IncidentStore, client: redis.Redis) -> None:
    incident = opened(store)
    key = f"backup:incident:{incident.id}"
    raw = msgpack.unpackb(client.hget(key, "data"))
    for name in ("inherited", "reapply", "reapplied"):
        del raw[name]
    client.hset(key, "data", msgpack.packb(raw | {"missed": ["c1, approved by kari"]}))
    assert store.get(incident.id) == replace(incident, missed=(Missed("c1, approved by kari"),))


def test_only_a_death_soon_after_its_recovery_counts_against_the_state() -> None:
    recovered = Incident(
        "z-1", "z", NOW, state=RECOVERED, closed_at=NOW + 10, chosen=("s1", "s0"), attempts=1
    )
    for died_at in (NOW - 50, NOW + 10, NOW + 69.9):
        assert attempted_before(recovered, died_at, 60) is recovered
        assert attempted_before(recovered, died_at, 0) is None
    assert attempted_before(recovered, NOW + 70, 60) is None
    assert after(recovered) == {"tried": ("s1",), "attempts": 1, "inherited": 1}
    for other in (None, replace(recovered, state=ESCALATED), replace(recovered, chosen=())):
        assert attempted_before(other, NOW + 11, 60) is None
    assert after(None) == {}
