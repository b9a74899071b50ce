"""Manifest, checksums, verification and sanity."""

from __future__ import annotations

import io
import os
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backup_worker.snapshots import (
    Entry,
    Manifest,
    NoSpace,
    Problem,
    Scope,
    SnapshotError,
    sanity,
    take_snapshot,
    verify_snapshot,
)
from backup_worker.snapshots.manifest import checksum_line, decode, encode, read_head
from backup_worker.snapshots.sanity import Limits, json_problem
from tests.agent_on_disk import NOON, Place, coreutils_proves

NAMES = st.binary(min_size=1, max_size=40).filter(
    lambda b: b"/" not in b and b"\0" not in b and b not in (b".", b"..")
)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path).fill()


@settings(max_examples=25, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=8, unique=True))
def test_checksum_lines_are_exactly_those_of_coreutils(names: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            Path(folder, os.fsdecode(name)).write_bytes(b"")
        said = subprocess.run(["sha256sum", "--", *names], cwd=folder, capture_output=True, check=True).stdout
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert b"".join(checksum_line(empty, os.fsdecode(name)) for name in names) == said


@given(
    path=NAMES.map(os.fsdecode),
    target=NAMES.map(os.fsdecode),
    reason=st.text(max_size=30),
    skipped=st.dictionaries(st.sampled_from(["pipe", "socket"]), st.integers(0, 9)),
)
def test_a_manifest_comes_back_as_it_was(
    path: str, target: str, reason: str, skipped: dict[str, int]
) -> None:
    manifest = Manifest(
        id="daily/s/z", agent="z", tier="daily", slot="s", created_at=NOON, reason=reason, status="partial", files=1,
        bytes=2, scope=Scope(("**",), ("*.lock",)), approved=False, problems=(Problem(path, "is odd"),),
        skipped=skipped,
        entries=(Entry(path, "link", 0, 0o777, 5, target=target), Entry(path + "2", "file", 2, 0o600, 6, sha256="ab")),
    )  # fmt: skip
    content = encode(manifest)
    assert decode(content) == manifest
    head = read_head(io.BytesIO(content))
    assert head == read_head(io.BytesIO(encode(decode(content))))
    assert (head.reason, head.problems) == (reason, manifest.problems)


@given(st.binary(max_size=300))
def test_no_bytes_make_the_manifest_reader_fall_over(content: bytes) -> None:
    for read in (decode, lambda data: read_head(io.BytesIO(data))):
        with pytest.raises(SnapshotError):
            read(content)


def test_a_manifest_that_points_out_of_the_snapshot_is_refused(place: Place) -> None:
    made = place.take()
    manifest = place.repo.path(made.id) / "manifest.json"
    good = manifest.read_bytes()
    for evil in (b"../../SOUL.md", b"/etc/cron.d/x", b"memory/../../x", b""):
        manifest.write_bytes(good.replace(b'"path": "SOUL.md"', b'"path": "' + evil + b'"'))
        with pytest.raises(SnapshotError):
            place.repo.get(made.id)


def test_a_flipped_byte_in_any_file_of_a_snapshot_is_found(place: Place) -> None:
    made = place.take()
    folder = place.repo.path(made.id)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 7
    for file in files:
        good = file.read_bytes()
        for position in {0, len(good) // 2, len(good) - 1}:
            flipped = bytearray(good)
            flipped[position] ^= 0x04
            file.write_bytes(flipped)
            assert verify_snapshot(place.repo, made.id, NOON), (file.name, position)
            assert file.name == "SHA256SUMS" or not coreutils_proves(folder)
        file.write_bytes(good)
    assert verify_snapshot(place.repo, made.id, NOON + 5) == []
    assert place.repo.get(made.id).verified_at == pytest.approx(NOON + 5)


def test_missing_added_retyped_and_opened_files_are_found(place: Place) -> None:
    (place.root / "memory" / "link").symlink_to("notes.md")
    made = place.take()
    stored = place.repo.path(made.id) / "files"

    def problems() -> dict[str, str]:
        return {problem.path: problem.problem for problem in verify_snapshot(place.repo, made.id, NOON)}

    assert problems() == {}
    (stored / "memory" / "extra").write_text("x")
    (stored / "SOUL.md").chmod(0o644)
    (stored / "memory" / "link").unlink()
    (stored / "memory" / "link").symlink_to("/etc/passwd")
    (stored / "skills" / "greet.py").unlink()
    (stored.parent / "more").write_text("x")
    found = problems()
    assert set(found) == {"memory/extra", "SOUL.md", "memory/link", "skills/greet.py", "more"}
    assert place.repo.get(made.id).damaged
    assert not place.repo.get(made.id).is_good


def test_a_snapshot_without_manifest_is_reported_and_not_listed(place: Place) -> None:
    made = place.take()
    (place.repo.path(made.id) / "manifest.json").unlink()
    assert place.repo.snapshots() == []
    assert place.repo.unreadable() == [made.id]
    assert verify_snapshot(place.repo, made.id, NOON)[0].path == "manifest.json"


@pytest.mark.parametrize(
    ("path", "content", "why"),
    [
        ("SOUL.md", "", "required, and empty"),
        ("weights.json", '{"speed": NaN}', "NaN"),
        ("weights.json", '{"speed": 1, "speed": 2}', "twice"),
        ("weights.json", "\ufeff{}", "byte-order mark"),
        ("weights.json", '{"speed": 1', "at line 1"),
        ("memory/deep/state.json", "", "not valid JSON"),
        ("memory/deep/state.json", "[" * 100_000, "not valid JSON"),
        ("memory/deep/state.json", b"\xff", "not UTF-8"),
        ("skills/greet.py", "def greet(:\n", "does not compile"),
        ("skills/greet.py", b"\0", "does not compile"),
        ("memory/mind.db", b"SQLite format 3\0" + bytes(range(256)) * 8, "not a sound SQLite database"),
    ],
)
def test_nonsense_is_stored_but_suspect(place: Place, path: str, content: str | bytes, why: str) -> None:
    place.write(path, content)
    made = place.take()
    assert made.status == "suspect"
    assert [problem.path for problem in made.problems] == [path]
    assert why in made.problems[0].problem
    assert verify_snapshot(place.repo, made.id, NOON) == []


def test_a_key_of_any_length_does_not_become_a_problem_of_that_length(place: Place) -> None:
    # The problem goes into an alert, the record and the manifest's head.
    long = "k" * 100_000
    place.write("weights.json", f'{{"{long}": 1, "{long}": 2}}')
    (problem,) = place.take().problems
    assert problem.problem == f"not valid JSON: the key “{'k' * 80}…” is there twice"


def test_an_unchanged_poison_stays_suspect(place: Place) -> None:
    place.write("skills/greet.py", "def broken(:\n")
    place.take(slot="1", unchanged="link")
    second = place.take(slot="2", now=NOON + 1, unchanged="link")
    assert second.by_path()["skills/greet.py"].linked
    assert [problem.path for problem in second.problems] == ["skills/greet.py"]


@pytest.mark.parametrize("changed", ["nothing", "the content", "the rules", "what is a skill"])
def test_contents_are_judged_again_if_they_or_the_rules_changed(
    place: Place, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    place.take(slot="1", unchanged="link")
    judged: list[bytes] = []
    real = sanity._python_problem

    def watching(content: bytes, path: str) -> str | None:
        judged.append(content)
        return real(content, path)

    monkeypatch.setattr(sanity, "_python_problem", watching)
    agent = place.agent
    if changed == "the content":
        place.write("skills/greet.py", "def greet():\n    return 'good morning'\n")
    elif changed == "the rules":
        monkeypatch.setattr(sanity, "_RULES", "those of another Python")
    elif changed == "what is a skill":
        agent = replace(agent, files={**agent.files, "skills": ["skills/**", "more/**"]})
    take_snapshot(
        place.repo,
        agent,
        tier="daily",
        slot="2",
        include=["*"],
        unchanged="link",
        now=NOON + 1,
        reason="test",
    )
    assert judged == ([] if changed == "nothing" else [(place.root / "skills/greet.py").read_bytes()])


def test_a_required_file_that_is_a_link_out_of_the_root_is_suspect(place: Place) -> None:
    soul = place.root / "SOUL.md"
    elsewhere = place.base / "elsewhere.md"
    soul.rename(elsewhere)
    soul.symlink_to(elsewhere)
    made = place.take(include=["charter"])
    assert (made.status, made.problems[0].path) == ("suspect", "SOUL.md")
    assert "which is not stored" in made.problems[0].problem


def test_a_required_file_that_is_a_link_to_a_stored_file_is_good(place: Place) -> None:
    (place.root / "SOUL.md").rename(place.root / "memory" / "soul.md")
    (place.root / "SOUL.md").symlink_to("memory/soul.md")
    assert place.take(include=["charter", "memory"]).status == "good"


def test_a_missing_required_file_is_suspect_only_where_the_tier_covers_it(place: Place) -> None:
    (place.root / "SOUL.md").unlink()
    assert place.take(include=["memory", "weights"]).status == "good"
    made = place.take(tier="weekly")
    assert made.problems == (Problem("SOUL.md", "required, and missing"),)


def test_a_wiped_memory_is_suspect_against_the_last_good_one(place: Place) -> None:
    place.take(slot="1")
    place.write("memory/notes.md", "")
    place.write("memory/deep/er/log.txt", "")
    wiped = place.take(slot="2", now=NOON + 1)
    assert wiped.status == "suspect"
    assert "bytes since “daily/1/z”" in wiped.problems[0].problem
    again = place.take(slot="3", now=NOON + 2)
    assert again.status == "suspect", "the last good one counts, not the last one"
    assert place.take(slot="4", now=NOON + 3, limits=Limits(shrink=None)).status == "good"


def test_a_narrower_scope_is_not_a_loss(place: Place) -> None:
    place.take(slot="1")
    assert place.take(slot="2", now=NOON + 1, include=["weights"]).status == "good"


def test_too_little_space_is_refused_before_anything_is_written(place: Place) -> None:
    with pytest.raises(NoSpace, match="free"):
        place.take(limits=Limits(reserve_bytes=1 << 60))
    assert place.repo.snapshots() == []
    assert os.listdir(place.repo.hidden / "staging") == []
    assert place.repo.failing() == frozenset(), "a full disk must not stop pruning"


def test_a_file_of_many_names_needs_its_space_once(place: Place) -> None:
    size = 64 << 20  # Others write to this disk meanwhile, so the margin is wide; a hole is quick to copy.
    place.take(slot="1")
    place.write("memory/big.bin", "")
    os.truncate(place.root / "memory/big.bin", size)
    for number in range(8):
        os.link(place.root / "memory/big.bin", place.root / f"memory/name-{number}.bin")
    spare = place.repo.free_bytes() - 4 * size
    assert place.take(slot="2", unchanged="copy", limits=Limits(reserve_bytes=spare)).files > 8


def test_json_within_the_rules_is_accepted() -> None:
    assert json_problem(b'{"a": [1, 2.5, null, "\\u00e9"], "b": {"a": 1}}') is None
