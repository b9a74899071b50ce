"""A restore is proven by doing it, aside, and the proof has a date."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import sqlite3
import sys
from pathlib import Path
from typing import Any

import fakeredis
import pytest

from backup_worker import alerts
from backup_worker.maintenance import drill, maintain
from backup_worker.restoring import proofs
from backup_worker.runtime import Runtime
from backup_worker.snapshots import Manifest, execute, plan_restore, take_snapshot
from em_bridge.errors import NotFound
from tests.agent_on_disk import NOBODY
from tests.small_fleet import SmallFleet
from tests.unit.test_scrub import flip

SEVEN = 1795417200.0
DAY = 86400.0


@pytest.fixture
def fleet(tmp_path: Path) -> SmallFleet:
    return SmallFleet(tmp_path, ("z", "jay"))


@pytest.fixture
def client() -> Any:
    return fakeredis.FakeRedis()


@pytest.fixture
def runtime(fleet: SmallFleet, client: Any) -> Runtime:
    return fleet.runtime(client)


def take(runtime: Runtime, agent: str = "z", slot: str = "s", now: float = SEVEN) -> Manifest:
    return take_snapshot(
        runtime.repository, runtime.config.files_of(agent), tier="daily", slot=slot, include=["*"],
        unchanged="copy", now=now, reason="test",
    )  # fmt: skip


def configure(fleet: SmallFleet, client: Any, **options: Any) -> Runtime:
    fleet.edit("agents.json", lambda document: document["agents"]["z"].update(options))
    return fleet.runtime(client)


def open_keys(client: Any) -> list[str]:
    return sorted(alert.key for alert in alerts.open_alerts(client))


def scratch(fleet: SmallFleet) -> list[str]:
    return os.listdir(fleet.folder / "state" / "drills")


def reasons(done: drill.Drill) -> str:
    return "; ".join(f"{problem.path}: {problem.problem}" for problem in done.problems)


def test_a_drill_restores_for_real_proves_it_and_leaves_nothing_behind(
    fleet: SmallFleet, runtime: Runtime, client: Any
) -> None:
    sqlite3.connect(fleet.root() / "memory.db").execute("create table t (x)")
    (fleet.root() / "empty").mkdir()
    (fleet.root() / "link").symlink_to("SOUL.md")
    snapshot = take(runtime)
    (fleet.root() / "SOUL.md").write_text("wiped")

    done = drill.run(runtime, "z", SEVEN + 5)

    assert (done.ok, done.sources, done.files) == (True, (snapshot.id,), 3)
    assert scratch(fleet) == []
    assert (fleet.root() / "SOUL.md").read_text() == "wiped", "the agent's own files are not touched"
    (line,) = fleet.history("drill")
    assert (line["agent"], line["ok"], line["from"]) == ("z", True, [snapshot.id])
    assert open_keys(client) == []


def test_the_date_of_the_last_proof_is_found_without_redis(fleet: SmallFleet) -> None:
    alone = Runtime(fleet.config)
    snapshot = take(alone)
    drill.run(alone, "z", SEVEN + 5)
    (fleet.root() / "SOUL.md").unlink()
    note = proofs.note_of(fleet.repository, "z")
    assert note == proofs.Note(SEVEN + 5, True, SEVEN + 5, snapshot.id)


def test_a_failed_drill_does_not_forget_the_last_proof(
    fleet: SmallFleet, runtime: Runtime, client: Any
) -> None:
    snapshot = take(runtime)
    drill.run(runtime, "z", SEVEN + 5)
    flip(fleet.folder / "backups" / snapshot.id / "files" / "SOUL.md")
    assert not drill.run(runtime, "z", SEVEN + DAY).ok
    assert proofs.note_of(fleet.repository, "z") == proofs.Note(SEVEN + DAY, False, SEVEN + 5, snapshot.id)


def test_a_drill_that_comes_upon_damage_fails_and_alerts_though_an_older_state_can_be_restored(
    fleet: SmallFleet, runtime: Runtime, client: Any
) -> None:
    older = take(runtime, slot="s1")
    (fleet.root() / "SOUL.md").write_text("I am z, and wiser than yesterday.\n")
    newer = take(runtime, slot="s2", now=SEVEN + 1)
    flip(fleet.folder / "backups" / newer.id / "files" / "SOUL.md")

    done = drill.run(runtime, "z", SEVEN + 5)

    assert done.sources == (older.id,)
    assert f"snapshot “{newer.id}” is damaged" in reasons(done)
    assert open_keys(client) == ["drill/z", f"rot/{newer.id}"]
    assert scratch(fleet) == []
    # Now that the damage is known, restores use the older state, and that works.
    assert drill.run(runtime, "z", SEVEN + 6).ok
    assert open_keys(client) == [f"rot/{newer.id}"]


def test_damage_that_can_be_healed_does_not_fail_a_drill(
    fleet: SmallFleet, runtime: Runtime, client: Any
) -> None:
    take(runtime, slot="s1")
    newer = take(runtime, slot="s2", now=SEVEN + 1)
    flip(fleet.folder / "backups" / newer.id / "files" / "SOUL.md")
    done = drill.run(runtime, "z", SEVEN + 5)
    assert (done.ok, done.sources) == (True, (newer.id,))
    assert open_keys(client) == [f"healed/{newer.id}"]


def test_an_agent_without_a_good_snapshot_cannot_be_restored(
    fleet: SmallFleet, runtime: Runtime, client: Any
) -> None:
    (fleet.root() / "SOUL.md").write_text("")
    assert take(runtime).status == "suspect"
    assert "there is no good snapshot of “z”" in reasons(drill.run(runtime, "z", SEVEN + 5))
    assert open_keys(client) == ["drill/z"]


def test_a_required_file_that_no_tier_copies_is_missed_by_the_drill(
    fleet: SmallFleet, runtime: Runtime, client: Any
) -> None:
    take(runtime)
    runtime = configure(fleet, client, required=["SOUL.md", "rules.md"])
    assert "rules.md: required, and missing" in reasons(drill.run(runtime, "z", SEVEN + 5))


def test_too_little_space_for_the_drill_is_a_failure_and_not_a_full_disk(
    fleet: SmallFleet, runtime: Runtime, client: Any
) -> None:
    take(runtime)
    fleet.edit("backup_schedule.json", lambda document: document["limits"].update(reserve_bytes=10**17))
    assert "0 B are free" in reasons(drill.run(fleet.runtime(client), "z", SEVEN + 5))


def test_an_unknown_agent_is_refused(runtime: Runtime) -> None:
    with pytest.raises(NotFound):
        drill.run(runtime, "ghost", SEVEN)


def test_the_alert_of_a_failed_drill_is_closed_by_the_next_one_that_works(
    fleet: SmallFleet, runtime: Runtime, client: Any
) -> None:
    drill.run(runtime, "z", SEVEN)
    assert open_keys(client) == ["drill/z"]
    take(runtime)
    drill.run(runtime, "z", SEVEN + 5)
    assert open_keys(client) == []


# -- what is compared --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda root: flip(root / "SOUL.md"), "SOUL.md: came back changed"),
        (lambda root: (root / "SOUL.md").unlink(), "SOUL.md: is missing"),
        (lambda root: (root / "more").write_text(""), "more: is in no snapshot"),
        (lambda root: (root / "SOUL.md").chmod(0o640), "SOUL.md: has the mode 0640, not 0644"),
        (lambda root: os.utime(root / "SOUL.md", (1, 1)), "SOUL.md: has another time of modification"),
    ],
)  # fmt: skip
def test_every_difference_from_the_manifest_is_seen(
    fleet: SmallFleet, runtime: Runtime, spoil: Any, reason: str, tmp_path: Path
) -> None:
    (fleet.root() / "SOUL.md").chmod(0o644)
    take(runtime)
    agent = runtime.config.files_of("z")
    plan = plan_restore(runtime.repository, agent)
    execute(plan, tmp_path / "out", evidence=None, now=SEVEN)
    assert drill._examine(plan, agent, tmp_path / "out") == []
    spoil(tmp_path / "out")
    found = [
        f"{problem.path}: {problem.problem}" for problem in drill._examine(plan, agent, tmp_path / "out")
    ]
    assert reason in found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_owners_come_back_and_are_compared_where_that_is_possible(
    fleet: SmallFleet, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.chown(fleet.root() / "SOUL.md", NOBODY, NOBODY)
    take(runtime)
    done = drill.run(runtime, "z", SEVEN + 5)
    assert (done.ok, done.owners, done.as_json()["owners"]) == (True, True, True)
    agent = runtime.config.files_of("z")
    plan = plan_restore(runtime.repository, agent)
    execute(plan, tmp_path / "out", evidence=None, now=SEVEN)
    os.chown(tmp_path / "out" / "SOUL.md", 0, NOBODY)
    (problem,) = drill._examine(plan, agent, tmp_path / "out")
    assert problem.problem == f"belongs to 0:{NOBODY}, not {NOBODY}:{NOBODY}"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert not drill.Drill(agent="z", at=SEVEN).owners
    assert drill._examine(plan, agent, tmp_path / "out") == [], "who is not root cannot give them back"


# -- the health command ------------------------------------------------------------------------------------


def test_the_health_command_judges_the_restored_files_and_not_the_living_agent(
    fleet: SmallFleet, runtime: Runtime, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://nowhere")
    script = (
        "import os; print(open('SOUL.md').read(), "
        "os.getcwd() == os.environ['AGENT_ROOT'], os.environ['REDIS_URL'])"
    )
    runtime = configure(fleet, client, health=[sys.executable, "-c", script])
    take(runtime)
    (fleet.root() / "SOUL.md").write_text("wiped")
    done = drill.run(runtime, "z", SEVEN + 5)
    assert done.ok
    assert done.health is not None
    assert done.health.output == "I am z, and this is who I am.\n True unix:///dev/null\n"


def test_an_agent_that_is_not_well_on_its_restored_files_fails_the_drill(
    fleet: SmallFleet, runtime: Runtime, client: Any
) -> None:
    runtime = configure(fleet, client, health=[sys.executable, "-c", "import sys; sys.exit('no memory')"])
    take(runtime)
    done = drill.run(runtime, "z", SEVEN + 5)
    assert reasons(done) == ".: the health command exited with 1: no memory"
    assert fleet.history("drill")[0]["health"] == {"ok": False, "exit_code": 1, "output": "no memory\n"}
    assert open_keys(client) == ["drill/z"]


# -- scratch folders ---------------------------------------------------------------------------------------


def test_the_scratch_folder_of_a_killed_drill_is_removed_and_that_of_a_living_one_is_not(
    fleet: SmallFleet, runtime: Runtime
) -> None:
    take(runtime)
    folder = fleet.folder / "state" / "drills"
    for name in ("dead", "living"):
        (folder / name / "root").mkdir(parents=True)
        (folder / name / "root" / "SOUL.md").write_text("I was z")
    fd = os.open(folder / "living", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert drill.run(runtime, "z", SEVEN + 5).ok
    assert scratch(fleet) == ["living"]
    os.close(fd)
    drill.run(runtime, "z", SEVEN + 6)
    assert scratch(fleet) == []


def test_a_drill_waits_for_no_backup_of_the_agent_and_holds_none_up(
    fleet: SmallFleet, runtime: Runtime
) -> None:
    take(runtime)
    with runtime.repository.lock("tree.z"):
        assert drill.run(runtime, "z", SEVEN + 5).ok


# -- when --------------------------------------------------------------------------------------------------


def test_agents_are_drilled_one_after_the_other_the_oldest_first(fleet: SmallFleet, runtime: Runtime) -> None:
    take(runtime, "jay", now=SEVEN)
    take(runtime, "z", now=SEVEN + 1)
    assert maintain.run(runtime, "drill", now=SEVEN + 10) == {"drilled": ["jay"], "failed": []}
    assert maintain.run(runtime, "drill", now=SEVEN + 610) == {"drilled": ["z"], "failed": []}
    assert maintain.run(runtime, "drill", now=SEVEN + 1210) == {"drilled": [], "failed": []}
    assert maintain.run(runtime, "drill", now=SEVEN + 16 * DAY)["drilled"] == ["jay"]


def test_an_agent_without_any_snapshot_is_not_drilled(runtime: Runtime) -> None:
    assert maintain.run(runtime, "drill", now=SEVEN) == {"drilled": [], "failed": []}


def test_a_new_agent_is_drilled_when_each_scheduled_tier_has_its_first_snapshot(runtime: Runtime) -> None:
    tier = runtime.config.schedule.tiers["daily"]
    tiers = runtime.config.schedule.tiers | {"weekly": tier}
    schedule = runtime.config.schedule.model_copy(update={"tiers": tiers})
    config = dataclasses.replace(runtime.config, schedule=schedule)
    take(runtime, "z", now=SEVEN)

    def chosen(now: float) -> list[str]:
        return drill.plan(config, runtime.repository, runtime.repository.snapshots(), now=now, every_s=600)

    assert chosen(SEVEN + 10) == []
    assert chosen(SEVEN + 700) == ["z"]


def test_a_failed_drill_is_made_again_when_there_is_a_newer_snapshot_or_the_next_day(
    fleet: SmallFleet, runtime: Runtime, client: Any
) -> None:
    soul = fleet.root() / "SOUL.md"
    good = soul.read_text()
    soul.write_text("")
    take(runtime, slot="s1")
    assert maintain.run(runtime, "drill", now=SEVEN + 10)["failed"] == ["z"]
    assert maintain.run(runtime, "drill", now=SEVEN + 610)["drilled"] == []
    assert maintain.run(runtime, "drill", now=SEVEN + 1.1 * DAY)["failed"] == ["z"]
    soul.write_text(good)
    take(runtime, slot="s2", now=SEVEN + 1.2 * DAY)
    assert maintain.run(runtime, "drill", now=SEVEN + 1.21 * DAY) == {"drilled": ["z"], "failed": []}


def test_a_proof_that_is_too_old_alerts_and_a_new_one_resolves_it(runtime: Runtime, client: Any) -> None:
    take(runtime)
    maintain.run(runtime, "watch", now=SEVEN + 29 * DAY)
    assert "drill-overdue/z" not in open_keys(client)
    maintain.run(runtime, "watch", now=SEVEN + 31 * DAY)
    assert "drill-overdue/z" in open_keys(client)
    assert "drill-overdue/jay" not in open_keys(client), "there is nothing yet to be proven"
    drill.run(runtime, "z", SEVEN + 31 * DAY)
    assert "drill-overdue/z" not in open_keys(client)
    maintain.run(runtime, "watch", now=SEVEN + 60 * DAY)
    assert "drill-overdue/z" not in open_keys(client)


def test_alerts_about_an_agent_that_is_no_longer_configured_are_closed(
    fleet: SmallFleet, runtime: Runtime, client: Any
) -> None:
    drill.run(runtime, "z", SEVEN)
    fleet.edit("agents.json", lambda document: document["agents"].pop("z"))
    maintain.run(fleet.runtime(client), "watch", now=SEVEN + 1)
    assert "drill/z" not in open_keys(client)


def test_a_note_that_cannot_be_read_counts_as_none(fleet: SmallFleet, runtime: Runtime) -> None:
    take(runtime)
    drill.run(runtime, "z", SEVEN)
    for content in ("{", json.dumps({"tried_at": 1}), "[]"):
        (fleet.repository.hidden / "drills" / "z.json").write_text(content)
        assert proofs.note_of(fleet.repository, "z") is None
