"""The rounds of the watch over guarded files, and the hints between them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import fakeredis
import pytest

from backup_worker import alerts
from backup_worker.approval import guard_rounds, guarded, hints
from backup_worker.approval.approved import ApprovedStates
from backup_worker.approval.hints import Hints
from backup_worker.maintenance import maintain
from backup_worker.queueing.queues import MsgpackSerializer
from tests.small_fleet import SmallFleet, until

NOW = 1795435200.0


@pytest.fixture
def client() -> Any:
    return fakeredis.FakeRedis()


def put_on(fleet: SmallFleet, agent: str, host: str) -> None:
    fleet.edit("agents.json", lambda document: document["agents"][agent].update(host=host))


def test_a_round_looks_at_every_agent_and_one_that_fails_does_not_keep_the_others(
    tmp_path: Path, client: Any
) -> None:
    fleet = SmallFleet(tmp_path, agents=("jay", "z"))
    runtime = fleet.runtime(client)
    maintain.run(runtime, "guard", now=NOW)
    (ApprovedStates(fleet.repository).folder("jay") / "state.json").write_text("{")
    (fleet.root("z") / "weights.json").write_text("{}")
    found = maintain.run(runtime, "guard", now=time.time() + 600)
    assert found["deviating"] == {"z": ["weights.json"]}
    assert list(found["failed"]) == ["jay"]
    assert "guard/jay" in [alert.key for alert in alerts.open_alerts(client)]


def test_a_name_that_is_no_text_is_told_of_and_does_not_keep_the_other_agents_from_being_looked_at(
    tmp_path: Path, client: Any
) -> None:
    fleet = SmallFleet(tmp_path, agents=("jay", "z"))
    fleet.edit("agents.json", lambda document: document["agents"]["jay"]["files"].update(rules=["rules/**"]))
    runtime = fleet.runtime(client)
    maintain.run(runtime, "guard", now=NOW)
    (fleet.root("jay") / "rules").mkdir()
    Path(os.fsdecode(os.fsencode(fleet.root("jay") / "rules") + b"/\xff.json")).write_text("{")
    (fleet.root("z") / "weights.json").write_text("{}")
    for later_s in (600, 1200):
        found = maintain.run(runtime, "guard", now=time.time() + later_s)
        assert found["deviating"] == {"jay": ["rules/\\xff.json"], "z": ["weights.json"]}
        assert MsgpackSerializer.loads(MsgpackSerializer.dumps(found)) == found
    told = {
        alert.key.partition("/")[0]: alert.body
        for alert in alerts.open_alerts(client)
        if alert.agent == "jay"
    }
    assert "rules/\\xff.json of jay is not what was approved" in told["unapproved"]
    assert told.keys() == {"unapproved", "suspect"}


def test_agents_of_a_host_are_looked_at_there_by_one_job(tmp_path: Path, client: Any) -> None:
    fleet = SmallFleet(tmp_path, agents=("jay", "z"))
    put_on(fleet, "jay", "web1.example")
    runtime = fleet.runtime(client)
    for _ in range(3):
        assert maintain.run(runtime, "guard", now=NOW)["asked"] == ["web1.example"]
    states = ApprovedStates(fleet.repository)
    assert states.load("z") is not None
    assert states.load("jay") is None
    (job,) = client.lrange("rq:queue:backup.web1.example", 0, -1)
    assert job == b"guard_web1-example"
    guard_rounds.run(runtime, NOW, host="web1.example")
    assert states.load("jay") is not None


def test_the_period_of_the_rounds_is_configured(tmp_path: Path) -> None:
    fleet = SmallFleet(tmp_path)
    fleet.edit("backup_schedule.json", lambda document: document.update(approvals={"scan_minutes": 2}))
    assert maintain.periods(fleet.config)["guard"] == 120.0


def test_a_written_file_gives_one_hint_when_it_has_settled(tmp_path: Path) -> None:
    fleet = SmallFleet(tmp_path)
    fleet.edit("backup_schedule.json", lambda document: document.update(approvals={"settle_seconds": 0}))
    (fleet.root() / "memory").mkdir()
    watching = Hints()
    watching.follow(fleet.config)
    try:

        def hinted() -> bool:
            (fleet.root() / "weights.json").write_text(f"{time.time()}")
            return watching.due(time.time() + 5)

        until(hinted, 15, every_s=0.2)
    finally:
        watching.close()


def test_a_write_elsewhere_gives_no_hint(tmp_path: Path) -> None:
    fleet = SmallFleet(tmp_path)
    root = fleet.root()
    watched = {root: guarded.scope_of(fleet.config, "z")}
    assert hints.folders(watched) == [root]
    assert hints._is_guarded(root / "weights.json", watched)
    assert not hints._is_guarded(root / "log.txt", watched)
    assert not hints._is_guarded(root.parent / "weights.json", watched)


def test_agents_without_a_folder_are_not_watched(tmp_path: Path) -> None:
    fleet = SmallFleet(tmp_path)
    fleet.root().rename(tmp_path / "gone")
    watching = Hints()
    watching.follow(fleet.config)
    assert not watching.due(time.time() + 1e6)
