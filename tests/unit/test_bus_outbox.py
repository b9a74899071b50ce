"""The outbox: numbers, order, bounds and what is told of a file that cannot be used."""

from __future__ import annotations

import stat
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from em_bridge import outbox as outbox_module
from em_bridge.errors import AgentBackupError, OutboxFull
from em_bridge.outbox import Outbox


def content(outbox: Outbox) -> list[tuple[int, bytes]]:
    return [(item.seq, item.payload) for item in outbox.batch()]


def test_numbers_grow_also_after_everything_was_sent_and_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "KEEP_S", -1.0)
    with Outbox(tmp_path / "o", "z") as outbox:
        assert [outbox.put("jay", b"x") for _ in range(3)] == [1, 2, 3]
        outbox.acknowledge(outbox.batch())
        assert outbox.forget_old() == 0
    with Outbox(tmp_path / "o", "z") as outbox:
        assert outbox.put("jay", b"x") == 4


def test_an_acknowledged_message_is_kept_for_a_while_and_can_be_sent_again(tmp_path: Path) -> None:
    with Outbox(tmp_path / "o", "z") as outbox:
        for payload in (b"a", b"b"):
            outbox.put("jay", payload)
        outbox.acknowledge(outbox.batch(limit=1))
        assert content(outbox) == [(2, b"b")] and outbox.confirmed() == {outbox.line: 1}
        assert outbox.forget_old() == 1
        assert outbox.send_again() == 1
        assert content(outbox) == [(1, b"a"), (2, b"b")]


def test_renumbering_keeps_the_order_and_leaves_no_number_to_be_used_twice(tmp_path: Path) -> None:
    with Outbox(tmp_path / "o", "z") as outbox:
        for payload in (b"a", b"b", b"c"):
            outbox.put("jay", payload)
        outbox.renumber(2, above=50)
        assert outbox.put("jay", b"d") == 53
        assert content(outbox) == [(1, b"a"), (51, b"b"), (52, b"c"), (53, b"d")]
        outbox.renumber(1, above=10)
        assert [payload for _, payload in content(outbox)] == [b"a", b"b", b"c", b"d"]
        assert content(outbox)[0][0] > 53


def test_a_full_outbox_refuses_and_stores_nothing_and_takes_again_when_it_was_drained(tmp_path: Path) -> None:
    with Outbox(tmp_path / "o", "z", limit_bytes=1000) as outbox:
        outbox.put("jay", b"x" * 600)
        with pytest.raises(OutboxFull, match="is full"):
            outbox.put("jay", b"x" * 600)
        assert len(outbox.batch()) == 1
        outbox.acknowledge(outbox.batch())
        assert outbox.put("jay", b"x" * 600) == 2
    with Outbox(tmp_path / "o", "z", limit_bytes=1000) as outbox, pytest.raises(OutboxFull):
        outbox.put("jay", b"x" * 600)


def test_batches_are_bounded_but_never_empty(tmp_path: Path) -> None:
    with Outbox(tmp_path / "o", "z") as outbox:
        for _ in range(5):
            outbox.put("jay", b"x" * 100)
        assert [
            len(outbox.batch(limit=2)),
            len(outbox.batch(limit_bytes=250)),
            len(outbox.batch(limit_bytes=1)),
        ] == [
            2,
            2,
            1,
        ]


def test_last_seen_only_grows(tmp_path: Path) -> None:
    with Outbox(tmp_path / "o", "jay") as outbox:
        assert outbox.last_seen("z") == 0
        outbox.note_seen("z", 5)
        outbox.note_seen("z", 3)
    with Outbox(tmp_path / "o", "jay") as outbox:
        assert outbox.last_seen("z") == 5 and outbox.all_last_seen() == {"z": 5}


def test_many_threads_get_numbers_of_their_own(tmp_path: Path) -> None:
    with Outbox(tmp_path / "o", "z") as outbox:
        got: list[int] = []

        def put() -> None:
            got.extend(outbox.put("jay", b"x") for _ in range(50))

        threads = [threading.Thread(target=put) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(got) == list(range(1, 201))


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    with Outbox(tmp_path / "o", "z") as outbox:
        outbox.put("jay", b"secret")
        files = list(tmp_path.iterdir())
        assert len(files) >= 3
        assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)


def test_a_file_that_is_not_an_outbox_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "o").write_bytes(b"these are not the bytes of a database" * 100)
    with pytest.raises(AgentBackupError, match="cannot be used") as caught:
        Outbox(tmp_path / "o", "z")
    assert caught.value.hint
    assert (tmp_path / "o").read_bytes().startswith(b"these are")
    with pytest.raises(FileNotFoundError):
        Outbox(tmp_path / "no" / "o", "z")


def test_a_clock_that_is_set_back_does_not_keep_messages_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Outbox(tmp_path / "o", "z") as outbox:
        outbox.put("jay", b"x")
        outbox.acknowledge(outbox.batch())
        real = time.time()
        monkeypatch.setattr(outbox_module.clock, "now", lambda: real - 3600)
        assert outbox.forget_old() == 0


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.one_of(st.just("put"), st.integers(0, 3), st.just("again"), st.just("behind")), max_size=30)
)
def test_whatever_happens_the_queue_keeps_order_and_loses_nothing(steps: list[str | int]) -> None:
    with tempfile.TemporaryDirectory() as folder, Outbox(Path(folder) / "o", "z") as outbox:
        put, acknowledged, highest = 0, 0, 0
        for step in steps:
            if step == "put":
                highest = max(highest, outbox.put("jay", b"%d" % put))
                put += 1
            elif step == "again":
                outbox.send_again()
                acknowledged = 0
            elif step == "behind":
                if waiting := outbox.batch():
                    outbox.renumber(waiting[0].seq, above=highest)
            elif isinstance(step, int):
                batch = outbox.batch(limit=step)
                outbox.acknowledge(batch)
                acknowledged += len(batch)
            assert [item.payload for item in outbox.batch()] == [b"%d" % n for n in range(acknowledged, put)]
            assert outbox.waiting() == put - acknowledged
