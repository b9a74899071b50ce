"""The memory of heads: it makes lists fast, and never hides, invents or changes a snapshot in them."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backup_worker.snapshots import Head, Repository, index, repository, verify_snapshot
from em_bridge import clock
from tests.agent_on_disk import NOON, Place

SLOTS = 5


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An agent with a few snapshots of all kinds, remembered as soon as they are listed."""
    monkeypatch.setattr(index, "WRITE_FROM", 1)
    monkeypatch.setattr(clock, "now", lambda: time.time() + 10)
    place = Place(tmp_path).fill()
    for number in range(SLOTS):
        place.take(slot=f"s{number}", now=NOON + number)
    place.write("SOUL.md", "")
    place.write("memory/\udcff\n.md", "a name that is no text")
    suspect = place.take(tier="weekly", slot="w", now=NOON + 50)
    place.repo.pin(suspect.id)
    place.repo.record_verified("daily/s1/z", now=NOON + 60, ok=True)
    place.repo.record_verified("daily/s2/z", now=NOON + 70, ok=False)
    return place


@pytest.fixture
def manifests_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the manifests of which the head was read from the disk."""
    found: list[str] = []
    original = index.read_head

    def reading(file: object) -> Head:
        found.append(file.name)  # type: ignore[attr-defined]
        return original(file)  # type: ignore[arg-type]

    monkeypatch.setattr(index, "read_head", reading)
    yield found


def without_memory(repo: Repository) -> list[Head]:
    """Return what a repository lists that has no memory."""
    (repo.hidden / repository.INDEX).unlink(missing_ok=True)
    return repo.snapshots()


def test_a_second_list_reads_no_manifest_and_says_the_same(place: Place, manifests_read: list[str]) -> None:
    first = place.repo.snapshots()
    assert len(manifests_read) == SLOTS + 1
    manifests_read.clear()
    assert place.repo.snapshots() == first
    assert manifests_read == []
    assert [head.as_row() for head in place.repo.snapshots(tier="weekly")] == [first[-1].as_row()]
    assert without_memory(place.repo) == first
    assert {head.id for head in first if head.damaged} == {"daily/s2/z"}
    assert first[-1].pinned
    assert first[-1].problems


def test_what_is_taken_and_deleted_shows_at_once(place: Place) -> None:
    place.repo.snapshots()
    place.take(slot="new", now=NOON + 100)
    assert place.repo.delete("daily/s0/z")
    found = place.repo.snapshots()
    assert [head.slot for head in found] == ["s1", "s2", "s3", "s4", "w", "new"]
    assert found == without_memory(place.repo)


def test_a_snapshot_in_the_place_of_another_one_is_read(place: Place) -> None:
    place.repo.snapshots()
    shutil.rmtree(place.repo.path("daily/s3/z"))
    place.write("SOUL.md", "I am somebody else now\n")
    made = place.take(slot="s3", now=NOON + 3)
    found = {head.id: head for head in place.repo.snapshots()}
    assert found["daily/s3/z"].bytes == made.bytes
    assert list(found.values()) == without_memory(place.repo)


def test_a_manifest_changed_in_place_without_a_trace_in_size_and_mtime_is_read(place: Place) -> None:
    place.repo.snapshots()
    manifest = place.repo.path("daily/s3/z") / "manifest.json"
    info = manifest.stat()
    manifest.write_bytes(manifest.read_bytes().replace(b'"reason": "test"', b'"reason": "fake"'))
    os.utime(manifest, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert {head.reason for head in place.repo.snapshots()} == {"test", "fake"}


def test_a_manifest_that_can_no_longer_be_read_is_said_to_be(place: Place) -> None:
    place.repo.snapshots()
    (place.repo.path("daily/s3/z") / "manifest.json").write_text("{}")
    (place.repo.path("daily/s4/z") / "manifest.json").unlink()
    heads, unreadable = place.repo.survey()
    assert [head.slot for head in heads] == ["s0", "s1", "s2", "w"]
    assert unreadable == ["daily/s3/z", "daily/s4/z"] == place.repo.unreadable()


def test_a_young_manifest_is_not_remembered(
    place: Place, manifests_read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "now", time.time)
    for _ in range(2):
        manifests_read.clear()
        assert len(place.repo.snapshots()) == SLOTS + 1
        assert len(manifests_read) == SLOTS + 1


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 1 << 20), flip=st.integers(1, 255), cut=st.integers(0, 3))
def test_no_damage_to_the_memory_changes_a_list(place: Place, position: int, flip: int, cut: int) -> None:
    whole = without_memory(place.repo)
    file = place.repo.hidden / repository.INDEX
    content = bytearray(file.read_bytes())
    position %= len(content)
    if cut == 0:
        del content[position:]
    else:
        content[position] ^= flip
    file.write_bytes(content)
    assert place.repo.snapshots() == whole
    assert index.load(file), "written anew"


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"{}", b"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\n"]
)
def test_a_file_that_was_never_a_memory_is_nothing(place: Place, content: bytes) -> None:
    whole = without_memory(place.repo)
    (place.repo.hidden / repository.INDEX).write_bytes(content)
    assert place.repo.snapshots() == whole


def test_a_memory_of_another_version_is_nothing(place: Place, tmp_path: Path) -> None:
    import hashlib

    for body in (b"[]", b'{"fields": ["id"], "scopes": [], "heads": []}', b'{"heads": 1}', b"not json"):
        file = tmp_path / "heads"
        file.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        assert index.load(file) == {}


def test_where_it_cannot_be_written_lists_are_only_slower(place: Place, manifests_read: list[str]) -> None:
    whole = without_memory(place.repo)
    (place.repo.hidden / repository.INDEX).unlink()
    (place.repo.hidden / repository.INDEX).mkdir()
    for _ in range(2):
        manifests_read.clear()
        assert place.repo.snapshots() == whole
        assert len(manifests_read) == len(whole)
    assert os.listdir(place.repo.hidden / "staging") == []


def test_looking_at_a_repository_that_is_not_there_makes_nothing(tmp_path: Path) -> None:
    assert Repository(tmp_path / "none").survey() == ([], [])
    assert os.listdir(tmp_path) == []


def test_it_is_written_anew_only_when_that_pays() -> None:
    worth = index.is_worth_writing
    assert not worth(known=1000, current=1000, read=0)
    assert not worth(known=1000, current=1010, read=10)
    assert worth(known=0, current=100, read=100)
    assert not worth(known=20_000, current=20_500, read=500)
    assert worth(known=19_000, current=20_000, read=1000)
    assert worth(known=20_000, current=18_000, read=0)


def test_many_may_list_while_others_take_and_delete(place: Place) -> None:
    fixed = {f"daily/s{number}/z" for number in range(1, SLOTS)}
    wrong: list[object] = []
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            try:
                found = {head.id for head in Repository(place.base / "repo").snapshots()}
            except Exception as error:
                wrong.append(error)
                raise
            if not fixed <= found:
                wrong.append(fixed - found)

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    try:
        for number in range(12):
            made = place.take(slot=f"t{number}", now=NOON + 200 + number)
            assert made.id in {head.id for head in place.repo.snapshots()}
            assert place.repo.delete(made.id)
            assert made.id not in {head.id for head in place.repo.snapshots()}
    finally:
        over.set()
        for looker in lookers:
            looker.join()
    assert wrong == []
    assert all(verify_snapshot(place.repo, identifier, NOON) == [] for identifier in fixed)
