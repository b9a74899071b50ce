"""`alerts` and `ack`, as a person on duty uses them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from backup_worker import alerts
from backup_worker.recovery.incident import IncidentStore
from tests.integration.conftest import ValkeyServer


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration of one agent."""
    (tmp_path / "z").mkdir()
    folder = tmp_path / "config"
    folder.mkdir()
    schedule = {"timezone": "UTC", "repository": "../backups", "history": "../history.jsonl"}
    (folder / "backup_schedule.json").write_text(json.dumps(schedule))
    agent = {
        "root": "../z",
        "files": {"charter": ["SOUL.md"], "weights": ["w.json"], "rules": [], "memory": []},
    }
    (folder / "agents.json").write_text(json.dumps({"agents": {"z": agent}}))
    return folder


def backup_worker(config: Path, url: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "backup_worker", *words, "--config", str(config)],
        env={**os.environ, "REDIS_URL": url},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_an_acknowledged_alert_stays_open_and_says_who_has_seen_it(
    config: Path, valkey: ValkeyServer
) -> None:
    alerts.raise_alert(valkey.client(), alerts.Alert("lag", "critical", "slow", "events wait"), now=1.0)
    assert backup_worker(config, valkey.url, "ack", "lag", "--by", "kari").returncode == 0
    shown = json.loads(backup_worker(config, valkey.url, "alerts", "--json").stdout)
    assert [(row["key"], row["acknowledged_by"]) for row in shown] == [("lag", "kari")]
    assert '"action":"acknowledge"' in (config.parent / "history.jsonl").read_text()


def test_an_escalation_is_acknowledged_by_its_incident(config: Path, valkey: ValkeyServer) -> None:
    client = valkey.client()
    incident, _ = IncidentStore(client).open("z", token="t", now=1.0, reason="", beat_mark="0-0")
    alerts.raise_alert(client, alerts.Alert("escalation/z", "critical", "z is gone", "why", "z"), now=1.0)
    done = backup_worker(config, valkey.url, "ack", incident.id, "--by", "kari", "--json")
    assert json.loads(done.stdout)["key"] == "escalation/z"


def test_an_unknown_alert_is_no_traceback(config: Path, valkey: ValkeyServer) -> None:
    done = backup_worker(config, valkey.url, "ack", "nonsense")
    assert done.returncode == 4
    assert done.stderr.startswith("error: there is no open alert and no incident “nonsense”\nhint: ")
