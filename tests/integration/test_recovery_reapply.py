"""Approved changes that a recovery has left out are put back: laid over, proven, backed up, and on the record."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backup_worker.approval import change_events
from backup_worker.recovery.incident import RECOVERED
from backup_worker.snapshots import Manifest
from em_bridge import streams
from em_bridge.events import ConfigApplied
from tests.integration.conftest import ValkeyServer
from tests.living_fleet import PROGRAM, Fleet, cli, steps, wait_for

FLAWED = """
import os, sys
if os.path.exists("../../flaw") and open("rules/limit").read() != "10\\n":
    sys.exit("a flaw")
"""
"""It dies of its new limit, as long as something outside is wrong too."""


@pytest.fixture
def fleet(valkey: ValkeyServer, tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, valkey.url)
    schedule = fleet.folder / "config" / "backup_schedule.json"
    facts = json.loads(schedule.read_text())
    facts["tiers"]["on-change"] = {
        "events": ["config.applied"], "include": ["rules", "how"], "slot": "%Y-%m-%d-%H%M%S", "keep": 9,
    }  # fmt: skip
    schedule.write_text(json.dumps(facts))
    fleet.add("z", files={"rules": ["rules/**"], "how": ["mode"]})
    (fleet.root("z") / "rules").mkdir()
    (fleet.root("z") / "rules" / "limit").write_text("10\n")
    (fleet.root("z") / "agent.py").write_text(FLAWED + PROGRAM)
    fleet.backup("z")
    yield fleet
    fleet.close()


def change(fleet: Fleet, name: str, path: str, text: str) -> Manifest:
    """Apply a change with the EM's approval; return its snapshot."""
    (fleet.root("z") / path).write_text(text)
    applied = ConfigApplied(name, "z", (path,), by="em", approved_by="kari")
    entry = streams.append(fleet.client, applied)
    (stored,) = change_events.handle(fleet.runtime, applied, entry, now=time.time())
    assert stored.approved
    time.sleep(0.02)
    return stored


def reapply(fleet: Fleet, *names: str) -> tuple[int, Any]:
    result = cli(fleet, "recover", "z", "--reapply", *names, "--json", "--redis-url", fleet.url)
    if result.returncode:
        return result.returncode, result.stderr
    (opened,) = json.loads(result.stdout)
    return 0, fleet.drive(opened["id"])[0]


def test_a_change_that_a_recovery_has_left_out_is_put_back_with_all_that_was_learned_since(
    fleet: Fleet,
) -> None:
    flaw = fleet.folder / "flaw"
    flaw.write_text("a fault outside of the agent\n")
    stored = change(fleet, "c1", "rules/limit", "20\n")
    incident = fleet.recover("z")
    assert (incident.state, incident.attempts) == (RECOVERED, 2)
    assert [(one.change, one.snapshot) for one in incident.missed] == [("c1", stored.id)]
    flaw.unlink()
    assert "--reapply" in (fleet.root("z") / "RECOVERY.md").read_text()
    (fleet.root("z") / "memory" / "since.md").write_text("learned since\n")
    code, again = reapply(fleet)
    assert (code, again.state, again.attempts) == (0, RECOVERED, 1)
    assert "reapply" in steps(again)
    assert (fleet.root("z") / "rules" / "limit").read_text() == "20\n"
    assert (fleet.root("z") / "memory" / "since.md").exists(), "a running agent is backed up first"
    assert (again.missed, [one.snapshot for one in again.reapplied]) == ((), [stored.id])
    heads = [one for one in fleet.runtime.repository.snapshots("z") if one.reason.startswith("re-applied c1")]
    assert [(one.approved, one.approved_by) for one in heads] == [(True, "kari")]
    recorded = [line for line in fleet.history("change") if line["event"] == "reapplied"]
    assert [(line["change"], line["incident"]) for line in recorded] == [("c1", again.id)]
    assert "put back" in (fleet.root("z") / "RECOVERY.md").read_text() or again.reapplied
    code, said = reapply(fleet)
    assert code == 4, "there is nothing left to put back"
    assert "no approved change" in said


def test_one_that_does_not_live_with_what_was_put_back_gets_its_state_without_it(fleet: Fleet) -> None:
    change(fleet, "c2", "mode", "die")
    incident = fleet.recover("z")
    assert incident.state == RECOVERED
    assert [one.change for one in incident.missed] == ["c2"]
    (fleet.root("z") / "memory" / "since.md").write_text("learned since\n")
    code, again = reapply(fleet)
    assert (code, again.state, again.attempts) == (0, RECOVERED, 2)
    assert (fleet.root("z") / "mode").read_text() == "beat"
    assert (fleet.root("z") / "memory" / "since.md").exists()
    assert again.reapplied == ()
    assert [one.change for one in again.missed] == ["c2"]


def test_a_dead_agent_gets_the_changes_over_its_newest_state(fleet: Fleet) -> None:
    change(fleet, "c2", "mode", "die")
    assert fleet.recover("z").state == RECOVERED
    for found in fleet.running("z"):
        os.kill(found.pid, signal.SIGKILL)
    wait_for(lambda: not fleet.running("z"), "its end")
    code, again = reapply(fleet)
    assert code == 0
    assert again.state == RECOVERED
    assert (fleet.root("z") / "mode").read_text() == "beat"
