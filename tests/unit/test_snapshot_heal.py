"""Rot is mended from a sound copy of the same content, wherever in the repository that is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backup_worker.snapshots import Repository, Sources, heal_snapshot, plan_restore, verify_snapshot
from tests.agent_on_disk import NOON, Place, content_of, coreutils_proves


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path).fill()


def rot(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    with file.open("r+b") as out:
        out.write(content)


def test_a_damaged_file_is_healed_from_another_snapshot_and_counts_as_good_again(place: Place) -> None:
    old, new = (place.take(slot=f"{n}", now=NOON + n) for n in (1, 2))
    rot(place.stored(new.id, "memory/notes.md"))
    assert verify_snapshot(place.repo, new.id, NOON)
    assert not place.repo.get(new.id).is_good
    problems, healed = heal_snapshot(place.repo, new.id, NOON + 3)
    assert problems == []
    assert [(one.path, one.source) for one in healed] == [("memory/notes.md", old.id)]
    assert place.repo.get(new.id).is_good
    assert place.repo.get(new.id).verified_at == pytest.approx(NOON + 3)
    assert coreutils_proves(place.repo.path(new.id))
    assert content_of(place.repo.path(new.id) / "files") == content_of(place.root)
    assert os.listdir(place.repo.hidden / "staging") == []


def test_a_copy_of_another_agent_in_another_path_will_do_and_a_missing_file_too(place: Place) -> None:
    other = Place(place.base, "jay").fill()
    other.write("memory/copied.md", (place.root / "memory/notes.md").read_bytes())
    (other.root / "memory/notes.md").unlink()
    theirs, mine = other.take(), place.take()
    place.stored(mine.id, "memory/notes.md").unlink()
    problems, healed = heal_snapshot(place.repo, mine.id, NOON)
    assert problems == []
    assert [one.source for one in healed] == [theirs.id]
    assert coreutils_proves(place.repo.path(mine.id))


def test_what_shares_the_rot_is_no_sound_copy(place: Place) -> None:
    first = place.take(slot="1", unchanged="link")
    second = place.take(slot="2", now=NOON + 1, unchanged="link")
    assert place.stored(first.id, "SOUL.md").samefile(place.stored(second.id, "SOUL.md"))
    rot(place.stored(first.id, "SOUL.md"))
    for snapshot in (first, second):
        problems, healed = heal_snapshot(place.repo, snapshot.id, NOON)
        assert [problem.path for problem in problems] == ["SOUL.md"]
        assert healed == []
        assert place.repo.get(snapshot.id).damaged


def test_what_was_healed_shares_nothing_with_what_it_was_healed_from(place: Place) -> None:
    first = place.take(slot="1", unchanged="link")
    second = place.take(slot="2", now=NOON + 1, unchanged="link")
    place.take(tier="weekly", slot="w", now=NOON + 2)
    rot(place.stored(first.id, "SOUL.md"))
    for snapshot in (first, second):
        assert heal_snapshot(place.repo, snapshot.id, NOON)[0] == []
    assert place.stored(first.id, "SOUL.md").stat().st_nlink == 1
    assert place.stored(second.id, "SOUL.md").stat().st_nlink == 1


def test_a_snapshot_healed_only_in_part_stays_damaged(place: Place) -> None:
    place.take(slot="1")
    place.write("memory/only.md", "only here\n")
    second = place.take(slot="2", now=NOON + 1)
    for path in ("memory/only.md", "memory/notes.md"):
        rot(place.stored(second.id, path))
    problems, healed = heal_snapshot(place.repo, second.id, NOON)
    assert [problem.path for problem in problems] == ["memory/only.md"]
    assert [one.path for one in healed] == ["memory/notes.md"]
    assert place.repo.get(second.id).damaged
    assert plan_restore(place.repo, place.agent).sources == ("daily/1/z",)


def test_a_run_that_heals_many_reads_the_manifests_of_all_only_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of 12 snapshots the damaged one and the one that a sound copy comes from are read again; it was all of them.
    for number in range(8):
        Place(place.base, f"other-{number}").write("SOUL.md", f"{number}\n")
        Place(place.base, f"other-{number}").take()
    mine = [place.take(slot=f"{number}", now=NOON + number).id for number in range(4)]
    read: list[str] = []
    real = Repository.get
    monkeypatch.setattr(Repository, "get", lambda repo, name: (read.append(name), real(repo, name))[1])
    sources = Sources(place.repo)
    for identifier in mine[:3]:
        rot(place.stored(identifier, "memory/notes.md"))
        problems, healed = heal_snapshot(place.repo, identifier, NOON, sources)
        assert (problems, len(healed)) == ([], 1)
    for number in range(8):
        assert read.count(f"daily/s/other-{number}") == 1
    assert {name.rpartition("/")[2] for name in read} == {"z", *(f"other-{n}" for n in range(8))}
