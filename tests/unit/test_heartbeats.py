"""What heartbeats prove: order by the server's ids, streaks of one incarnation, old ones never."""

from __future__ import annotations

import fakeredis
from hypothesis import given
from hypothesis import strategies as st

from backup_worker.recovery import heartbeats
from backup_worker.recovery.heartbeats import Beats
from em_bridge import streams
from em_bridge.events import Heartbeat, Message


def fed(*beats: tuple[str, str, str]) -> Beats:
    """Feed (entry id, agent, incarnation)."""
    folded = Beats()
    for entry, agent, incarnation in beats:
        folded.feed(entry, Heartbeat(agent, incarnation, 0))
    return folded


def test_beats_in_a_row_are_those_of_the_last_incarnation() -> None:
    beats = fed(("1-0", "z", "a"), ("2-0", "z", "b"), ("3-0", "jay", "x"), ("4-0", "z", "b"))
    assert beats.streak("z", "0-0", ()) == ("b", 2)


def test_two_incarnations_that_beat_in_turn_never_get_a_row() -> None:
    beats = fed(*((f"{n}-0", "z", "ab"[n % 2]) for n in range(1, 20)))
    assert beats.streak("z", "0-0", ())[1] == 1


def test_beats_up_to_the_mark_do_not_count() -> None:
    beats = fed(("1-0", "z", "a"), ("2-0", "z", "a"), ("2-1", "z", "a"))
    assert beats.streak("z", "2-0", ()) == ("a", 1)
    assert beats.lived_after("z", "2-0")
    assert not beats.lived_after("z", "2-1")


def test_marks_are_compared_as_numbers_and_not_as_text() -> None:
    beats = fed(("10-2", "z", "a"))
    assert beats.lived_after("z", "9-9")
    assert beats.lived_after("z", "10-1")
    assert not beats.lived_after("z", "10-10")
    assert heartbeats.earliest(["10-0", "9-0", "9-10"]) == "9-0"


def test_an_old_incarnation_that_still_beats_breaks_the_row_of_the_new_one() -> None:
    beats = fed(("1-0", "z", "new"), ("2-0", "z", "new"), ("3-0", "z", "old"), ("4-0", "z", "new"))
    assert beats.streak("z", "0-0", ("old",)) == ("new", 1)


def test_agents_are_told_apart_ignoring_case_and_nothing_else() -> None:
    beats = fed(("1-0", "Z", "a"), ("2-0", "zz", "b"))
    assert beats.streak("z", "0-0", ()) == ("a", 1)


@given(
    st.lists(st.tuples(st.sampled_from(["old", "a", "b"]), st.booleans()), max_size=60),
    st.integers(0, 60),
)
def test_the_streak_is_the_unbroken_end_behind_the_mark_without_any_old_beat(
    sent: list[tuple[str, bool]], mark: int
) -> None:
    entries = [(f"{n}-0", "z" if is_z else "jay", name) for n, (name, is_z) in enumerate(sent, start=1)]
    incarnation, count = fed(*entries).streak("z", f"{mark}-0", {"old"})
    behind = [name for entry, agent, name in entries if agent == "z" and int(entry[:-2]) > mark]
    tail = []
    for name in reversed(behind):
        if name == "old" or (tail and name != tail[-1]):
            break
        tail.append(name)
    assert (incarnation, count) == ((tail[0], len(tail)) if tail else ("", 0))


def test_reading_goes_on_where_it_stopped_and_passes_over_what_is_no_heartbeat() -> None:
    client = fakeredis.FakeRedis()
    beats = Beats()
    streams.append(client, Heartbeat("z", "a", 1))
    client.xadd(streams.HEARTBEATS, {"rubbish": b"\xff"})
    client.xadd(streams.HEARTBEATS, dict(streams.encode(Message("z", "jay", 1, b"", 1.0))))
    assert heartbeats.read(client, beats).streak("z", "0-0", ()) == ("a", 1)
    last = streams.append(client, Heartbeat("z", "a", 2))
    assert heartbeats.read(client, beats).streak("z", "0-0", ()) == ("a", 2)
    assert beats.cursor == last
