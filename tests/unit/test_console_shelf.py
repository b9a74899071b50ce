"""The list of snapshots in memory, and how far an agent has moved from its newest good state."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from backup_worker.config import load
from backup_worker.console import shelf
from backup_worker.console.drift import Drifts, drift_of
from backup_worker.console.shelf import Shelf
from backup_worker.runtime import Runtime
from backup_worker.snapshots import AgentFiles, Repository, take_snapshot
from tests.console_fleet import make_world, until

NOW = 1_760_000_000.0


def take(repo: Repository, agent: AgentFiles, slot: str, **options: object) -> str:
    known: dict[str, object] = {
        "tier": "daily",
        "include": ["*"],
        "unchanged": "copy",
        "now": NOW,
        "reason": "test",
    }
    return take_snapshot(repo, agent, slot=slot, **{**known, **options}).id  # type: ignore[arg-type]


@pytest.fixture
def agent(tmp_path: Path) -> AgentFiles:
    root = tmp_path / "z"
    (root / "memory").mkdir(parents=True)
    (root / "SOUL.md").write_text("be good")
    (root / "memory" / "a.md").write_text("one")
    return AgentFiles("z", root, {"memory": ["memory/**"]}, ["SOUL.md"], ["*.lock"])


@pytest.fixture
def repo(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "backups")


def test_a_new_a_pinned_and_a_removed_snapshot_are_seen(repo: Repository, agent: AgentFiles) -> None:
    kept = Shelf()
    assert kept.heads(repo) == []
    one = take(repo, agent, "2026-01-01")
    assert [head.id for head in kept.heads(repo)] == [one]
    repo.pin(one)
    assert kept.heads(repo)[0].pinned
    two = take(repo, agent, "2026-01-02", now=NOW + 1)
    assert [head.id for head in kept.heads(repo)] == [one, two]
    repo.delete(two)
    assert [head.id for head in kept.heads(repo)] == [one]


def test_a_long_list_is_looked_at_once_a_second_and_what_was_done_here_is_seen_at_once(
    repo: Repository, agent: AgentFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "FEW", 0)
    monkeypatch.setattr(shelf, "FRESH_S", 60.0)
    one = take(repo, agent, "2026-01-01")
    kept = Shelf()
    assert [head.id for head in kept.heads(repo)] == [one]
    two = take(repo, agent, "2026-01-02", now=NOW + 1)
    assert [head.id for head in kept.heads(repo)] == [one], "no page looks through 20,000 each time"
    repo.pin(one)
    kept.renew(repo, one)
    assert kept.heads(repo)[0].pinned
    monkeypatch.setattr(shelf, "FRESH_S", 0.0)
    assert [head.id for head in kept.heads(repo)] == [one, two]


def test_only_slots_that_changed_are_read_again(
    repo: Repository, agent: AgentFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "SETTLED_S", 0.0)
    for day in range(1, 4):
        take(repo, agent, f"2026-01-0{day}", now=NOW + day)
    time.sleep(0.02)
    kept = Shelf()
    before = kept.heads(repo)
    take(repo, agent, "2026-01-04", now=NOW + 4)
    repo.delete("daily/2026-01-01/z")
    after = kept.heads(repo)
    assert [head.slot for head in after] == ["2026-01-02", "2026-01-03", "2026-01-04"]
    assert (after[0], after[1]) == (before[1], before[2])
    assert (after[0] is before[1], after[1] is before[2]) == (True, True)


def test_a_snapshot_that_comes_within_one_tick_of_the_clock_is_not_missed(
    repo: Repository, agent: AgentFiles
) -> None:
    take(repo, agent, "2026-01-01")
    slot = repo.root / "daily" / "2026-01-01"
    tick = slot.stat().st_mtime_ns
    kept = Shelf()
    assert len(kept.heads(repo)) == 1
    other = AgentFiles("jay", agent.root, agent.files, agent.required, agent.exclude)
    take(repo, other, "2026-01-01")
    os.utime(slot, ns=(tick, tick))
    assert {head.agent for head in kept.heads(repo)} == {"z", "jay"}


def test_damage_and_dates_of_verification_come_with_the_notes(
    repo: Repository, agent: AgentFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = take(repo, agent, "2026-01-01"), take(repo, agent, "2026-01-02", now=NOW + 1)
    kept = Shelf()
    kept.heads(repo)
    monkeypatch.setattr(shelf, "SETTLED_S", -3600.0)
    assert [head.damaged for head in kept.heads(repo)] == [False, False]
    repo.record_verified(one, now=NOW + 5, ok=False)
    assert [(head.id, head.damaged) for head in kept.heads(repo)] == [(one, True), (two, False)]
    repo.record_verified(two, now=NOW + 9, ok=True)
    monkeypatch.setattr(shelf, "NOTES_S", 0.0)
    assert [head.verified_at for head in kept.heads(repo)][1] == NOW + 9


def test_an_untouched_agent_has_not_drifted(repo: Repository, agent: AgentFiles) -> None:
    identifier = take(repo, agent, "2026-01-01")
    found = drift_of(repo, agent, NOW)
    assert found is not None
    assert (found.count, found.paths, found.since) == (0, (), identifier)
    (agent.root / "SOUL.md").touch()
    (agent.root / "memory" / "x.lock").write_text("excluded")
    again = drift_of(repo, agent, NOW)
    assert again is not None
    assert again.count == 0, "a file with new times and the old content has not changed"


def test_what_was_added_changed_and_removed_is_named(repo: Repository, agent: AgentFiles) -> None:
    take(repo, agent, "2026-01-01")
    (agent.root / "SOUL.md").write_text("be bad!")
    (agent.root / "memory" / "a.md").unlink()
    (agent.root / "memory" / "b.md").write_text("two")
    found = drift_of(repo, agent, NOW)
    assert found is not None
    assert found.paths == (("~", "SOUL.md"), ("-", "memory/a.md"), ("+", "memory/b.md"))
    assert found.count == 3


def test_without_a_snapshot_or_a_root_there_is_no_drift(repo: Repository, agent: AgentFiles) -> None:
    assert drift_of(repo, agent, NOW) is None
    take(repo, agent, "2026-01-01")
    gone = AgentFiles("z", agent.root / "nothing", agent.files, agent.required, agent.exclude)
    assert drift_of(repo, gone, NOW) is None


def test_drift_is_looked_for_in_the_background_and_not_at_every_page(tmp_path: Path) -> None:
    world = make_world(tmp_path / "w", "redis://127.0.0.1:1/0", ("z",))
    runtime = Runtime(load(world.config_dir))
    take(runtime.repository, runtime.config.files_of("z"), "2026-01-01", now=time.time())
    drifts = Drifts()
    until(lambda: drifts.of(runtime, ["z"]))
    (world.root("z") / "SOUL.md").write_text("changed")
    assert drifts.of(runtime, ["z"])["z"].count == 0, "the last look still holds"
    drifts.close()
