"""How long evidence is kept: a pure plan, and what carries it out."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import fakeredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backup_worker.config import load
from backup_worker.maintenance import maintain
from backup_worker.recovery import keeping
from backup_worker.recovery.incident import IncidentStore
from backup_worker.recovery.keeping import FRESH_S, Kept, plan
from backup_worker.runtime import Runtime
from tests.living_fleet import Fleet
from tests.unit.test_snapshot_commands import Shell

NOW = 1_795_000_000.0
DAY = 86400.0


def names(found: list[Kept], **options: object) -> list[str]:
    limits = {"now": NOW, "max_bytes": 10**9, "max_days": 90.0, "in_use": ()} | options
    return [removal.kept.name for removal in plan(found, **limits)]


def test_what_is_too_old_goes_whatever_its_size() -> None:
    assert names([Kept("old", NOW - 91 * DAY, 1), Kept("new", NOW - 89 * DAY, 1)]) == ["old"]


def test_the_oldest_goes_first_until_the_rest_fits() -> None:
    found = [Kept("b", NOW - 2 * DAY, 40), Kept("a", NOW - 3 * DAY, 40), Kept("c", NOW - DAY, 40)]
    assert names(found, max_bytes=100) == ["a"]
    assert names(found, max_bytes=79) == ["a", "b"]
    assert names(found, max_bytes=120) == []


def test_the_evidence_of_an_open_incident_stays_however_old_and_large() -> None:
    found = [Kept("open", NOW - 400 * DAY, 10**12), Kept("other", NOW - DAY, 1)]
    assert names(found, max_bytes=0, in_use={"open"}) == ["other"]


def test_what_a_restore_may_be_standing_on_right_now_stays() -> None:
    found = [Kept("fresh", NOW - FRESH_S + 1, 10), Kept("stale", NOW - FRESH_S, 10)]
    assert names(found, max_bytes=0) == ["stale"]


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 100)), max_size=12),
    st.integers(0, 500),
    st.sets(st.integers(0, 11)),
)
def test_nothing_goes_that_need_not(ages: list[tuple[int, int]], max_bytes: int, used: set[int]) -> None:
    found = [Kept(str(n), NOW - days * DAY, size) for n, (days, size) in enumerate(ages)]
    in_use = {str(n) for n in used}
    gone = names(found, max_bytes=max_bytes, in_use=in_use)
    assert not in_use & set(gone)
    left = [one for one in found if one.name not in gone]
    removable = [one for one in left if one.name not in in_use and NOW - one.since >= FRESH_S]
    assert all(NOW - one.since <= 90 * DAY for one in removable)
    assert sum(one.bytes for one in left) <= max_bytes or not removable
    if gone:
        last = next(one for one in found if one.name == gone[-1])
        too_old = NOW - last.since > 90 * DAY
        assert too_old or sum(one.bytes for one in left) + last.bytes > max_bytes


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    fleet = Fleet(tmp_path, "redis://127.0.0.1:1/0")
    fleet.add("z")
    return Runtime(load(tmp_path / "config"), fakeredis.FakeRedis())


def evidence(runtime: Runtime, name: str) -> Path:
    folder = runtime.config.schedule.state / "evidence" / name
    (folder / "tree-1" / "deep").mkdir(parents=True)
    (folder / "tree-1" / "deep" / "file").write_bytes(b"x" * 1000)
    (folder / "tree-1" / "away").symlink_to(runtime.config.agent("z").root)
    # As a restored tree may be: without the right to change it.
    (folder / "tree-1" / "deep").chmod(0o500)
    # A time of modification that lies.
    os.utime(folder, (1, 1))
    return folder


def test_the_prune_task_removes_old_evidence_records_it_and_spares_open_incidents(runtime: Runtime) -> None:
    incident, _ = IncidentStore(runtime.redis).open("z", token="1", now=NOW, reason="", beat_mark="0-0")
    kept, gone = evidence(runtime, incident.id), evidence(runtime, "restore-z-1")
    assert maintain.run(runtime, "prune", now=time.time())["evidence"] == []
    later = time.time() + 91 * DAY
    assert maintain.run(runtime, "prune", now=later)["evidence"] == ["restore-z-1"]
    assert kept.is_dir()
    assert not gone.exists()
    assert (runtime.config.agent("z").root / "SOUL.md").exists()
    (line,) = [line for line in runtime.history.read() if line["kind"] == "prune"]
    assert line["evidence"] == str(gone)
    assert line["bytes"] >= 1000
    assert "90 days" in line["reason"]


def test_no_evidence_is_no_work(runtime: Runtime) -> None:
    assert keeping.prune(runtime, NOW) == []


def test_without_redis_only_what_restores_by_hand_have_kept_is_removed(runtime: Runtime) -> None:
    alone = Runtime(runtime.config)
    incident, by_hand = evidence(runtime, "z-20261123-1"), evidence(runtime, "restore-z-1")
    cut_off = evidence(runtime, ".restore-z-2.0f0f")
    assert keeping.prune(alone, time.time()) == []
    assert sorted(keeping.prune(alone, time.time() + 91 * DAY)) == [cut_off.name, by_hand.name]
    assert incident.is_dir()
    assert [line["kind"] for line in runtime.history.read()] == ["prune", "prune"]


def test_the_command_prune_keeps_evidence_within_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = Shell(tmp_path)
    document = json.loads((shell.config / "backup_schedule.json").read_text())
    document["limits"]["evidence_bytes"] = 1
    (shell.config / "backup_schedule.json").write_text(json.dumps(document))
    shell.json("backup", "z", "--tier", "weekly")
    shell.z.write("SOUL.md", "poisoned")
    kept = Path(shell.json("restore", "z")[0]["evidence"])
    shell.run("prune")
    assert kept.is_dir(), "a restore may be standing on it"
    monkeypatch.setattr(keeping, "FRESH_S", 0.0)
    shell.run("prune", "--dry-run")
    assert kept.is_dir()
    shell.run("prune")
    assert not kept.exists()
    assert shell.recorded()[-1] == "prune"
