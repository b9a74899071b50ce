"""Rot on the disk, with everything running as it does for people: found, told, in the way of restores, and mended."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from backup_worker import alerts, backups
from backup_worker.demo.pager import Pager
from backup_worker.embedded import url_file
from backup_worker.queueing.due import MaintenanceDue
from backup_worker.restoring import proofs
from backup_worker.runtime import Runtime
from em_bridge import streams
from em_bridge.connection import connect
from tests.integration.parts import Part, running
from tests.small_fleet import SmallFleet, until
from tests.unit.test_scrub import flip

pytestmark = pytest.mark.valkey

SECOND = 1 / 86400
"""In days."""


def test_rot_is_found_by_the_scrub_told_fails_the_drill_and_all_is_well_again_when_it_is_mended(
    tmp_path: Path,
) -> None:
    fleet = SmallFleet(tmp_path, ("z", "jay"), limits={"reserve_bytes": 0})
    with Pager() as pager, running() as parts:
        often = {"scrub": {"days": SECOND}, "drill": {"days": SECOND}, "alerts": [pager.url]}
        fleet.edit("backup_schedule.json", lambda document: document.update(often))
        up = Part(tmp_path, "up", "--no-console", "--config", str(fleet.config_dir))
        parts.append(up)
        up.says("Ctrl-C stops")
        client = connect(url_file(tmp_path / "state").read_text().strip())
        until(lambda: client.exists("backup:alive:worker:" + socket.gethostname()), 20)

        def ask_for(task: str) -> str:
            return streams.append(client, MaintenanceDue(task))

        def has_resolved(key: str, task: str) -> bool:
            ask_for(task)
            return key not in open_keys()

        def open_keys() -> set[str]:
            return {alert.key for alert in alerts.open_alerts(client)}

        def told(alert: str) -> bool:
            # Alone, or with another in one message: the scheduler may ask for the drill just then.
            return any(alert in f"{title}\n{body}" for title, body in pager.pages)

        # The scheduler makes what is due by itself, at the start.
        until(lambda: len(fleet.snapshots) == 2, 20)
        ask_for("drill")
        until(lambda: {line["agent"] for line in fleet.history("drill")} == {"z", "jay"}, 10)
        assert open_keys() == set()
        snapshot = next(one for one in fleet.snapshots if one.endswith("/z"))
        flip(fleet.repository.path(snapshot) / "files" / "SOUL.md")
        time.sleep(0.6)  # half of the period, in which what was proven rests

        ask_for("scrub")
        until(lambda: f"rot/{snapshot}" in open_keys(), 10)
        until(lambda: told(f"[critical] snapshot {snapshot} is damaged"), 30)
        ask_for("drill")
        until(lambda: "drill/z" in open_keys(), 10)
        until(lambda: told("[critical] restoring z does not work"), 30)
        assert "drill/jay" not in open_keys()
        assert {line["agent"]: line["ok"] for line in fleet.history("drill")} == {"z": False, "jay": True}
        found = [line for line in fleet.history("verify") if not line["ok"]]
        assert found[0]["problems"] == [{"path": "SOUL.md", "problem": "its content changed"}]

        flip(fleet.repository.path(snapshot) / "files" / "SOUL.md")
        until(lambda: has_resolved(f"rot/{snapshot}", "scrub"), 10, every_s=0.7)
        until(lambda: has_resolved("drill/z", "drill"), 10, every_s=0.7)
        note = proofs.note_of(fleet.repository, "z")
        assert note is not None
        assert (note.ok, note.proven_from) == (True, snapshot)
        assert list((tmp_path / "state" / "drills").iterdir()) == []


def test_a_drill_that_is_killed_takes_its_health_command_along_and_the_next_one_clears_up(
    tmp_path: Path,
) -> None:
    fleet = SmallFleet(tmp_path, limits={"reserve_bytes": 0})
    runs = tmp_path / "runs"
    # The first one hangs, any other one is well.
    script = (
        f"import os, time; runs = {str(runs)!r}\n"
        "if not os.path.exists(runs): open(runs, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    health = [sys.executable, "-c", script]
    fleet.edit("agents.json", lambda document: document["agents"]["z"].update(health=health))
    backups.by_hand(Runtime(fleet.config), "z", "daily", now=time.time())
    words = ("drill", "z", "--config", str(fleet.config_dir))
    away = {"REDIS_URL": "redis://127.0.0.1:1/0"}
    with running() as parts:
        killed = Part(tmp_path, *words, env=away)
        parts.append(killed)
        until(lambda: runs.exists() and runs.read_text())
        killed.kill()
        hanging = int(runs.read_text())
        until(lambda: not psutil.pid_exists(hanging) or psutil.Process(hanging).status() == "zombie", 5)
        assert len(list((tmp_path / "state" / "drills").iterdir())) == 1
        again = Part(tmp_path, *words, env=away)
        parts.append(again)
        assert again.process.wait(20) == 0
    assert list((tmp_path / "state" / "drills").iterdir()) == []
