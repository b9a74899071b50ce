"""`alerts`, `ack` and `silence`, as a person on duty uses them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backup_worker import alerts
from backup_worker.config import load
from backup_worker.maintenance.notices import TEST_TITLE
from backup_worker.recovery.incident import IncidentStore
from backup_worker.runtime import Runtime
from tests.integration.conftest import ValkeyServer
from tests.receivers import WebHook


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


def test_a_recovery_that_goes_on_is_acknowledged_by_its_incident_too(
    config: Path, valkey: ValkeyServer
) -> None:
    client = valkey.client()
    incident, _ = IncidentStore(client).open("z", token="t", now=1.0, reason="", beat_mark="0-0")
    for key, severity in (("recovery/z", "warning"), ("attempt/z", "critical")):
        alerts.raise_alert(client, alerts.Alert(key, severity, "t", "b", "z"), now=1.0)  # type: ignore[arg-type]  # literals
    for key in ("attempt/z", "attempt/z"):
        done = backup_worker(config, valkey.url, "ack", incident.id, "--by", "kari", "--json")
        assert json.loads(done.stdout)["key"] == key


def test_an_unknown_alert_is_no_traceback(config: Path, valkey: ValkeyServer) -> None:
    done = backup_worker(config, valkey.url, "ack", "nonsense")
    assert done.returncode == 4
    assert done.stderr.startswith("error: there is no open alert and no incident “nonsense”\nhint: ")


def test_a_silence_is_begun_listed_and_ended_by_hand_and_all_of_it_is_on_the_record(
    config: Path, valkey: ValkeyServer
) -> None:
    def row(of: subprocess.CompletedProcess[str]) -> Any:
        assert of.returncode == 0, of.stderr
        return json.loads(of.stdout)

    client = valkey.client()
    alerts.raise_alert(client, alerts.Alert("missing/daily/z", "critical", "t", "b", "z"), now=1.0)
    words = ("silence", "missing", "z", "--for", "2h", "--why", "moving the disks", "--by", "kari")
    begun = row(backup_worker(config, valkey.url, *words, "--json"))
    assert (begun["id"], begun["kinds"], begun["agents"]) == ("s1", ["missing"], ["z"])
    assert 7199 < begun["until"] - begun["since"] < 7201
    (open_one,) = row(backup_worker(config, valkey.url, "alerts", "--json"))
    assert open_one["silenced_by"] == "s1"
    assert open_one["look"] == "backup-worker list --agent z --tier daily"
    listed = backup_worker(config, valkey.url, "silences").stdout
    assert "missing of z" in listed
    assert "moving the disks" in listed
    assert row(backup_worker(config, valkey.url, "unsilence", "s1", "--by", "kari", "--json"))["id"] == "s1"
    assert backup_worker(config, valkey.url, "silences").stdout == "nothing is silent\n"
    assert backup_worker(config, valkey.url, "unsilence", "s1").returncode == 4
    lines = [json.loads(line) for line in (config.parent / "history.jsonl").read_text().splitlines()]
    told = [(line["kind"], line["by"], line["why"]) for line in lines if line["kind"].startswith("silence")]
    assert told == [("silence", "kari", "moving the disks"), ("silence-ended", "kari", "moving the disks")]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["missing", "--why", "w"], 2, "--for"),
        (["missing", "--for", "2h"], 2, "--why"),
        (["missing", "--for", "forever", "--why", "w"], 2, "“forever” is not a duration"),
        (["missing", "--for", "99d", "--why", "w"], 2, "at most 30 days"),
        (["nonsense", "--for", "2h", "--why", "w"], 4, "neither a kind of alert nor an agent"),
    ],
)
def test_a_silence_without_an_end_a_reason_or_a_meaning_is_refused(
    config: Path, valkey: ValkeyServer, words: list[str], code: int, says: str
) -> None:
    done = backup_worker(config, valkey.url, "silence", *words)
    assert done.returncode == code
    assert says in done.stderr
    assert valkey.client().keys("backup:silences*") == []


def test_a_test_page_says_what_each_receiver_did_and_needs_no_redis(config: Path) -> None:
    nowhere = "redis://127.0.0.1:1/0"
    assert backup_worker(config, nowhere, "alerts", "test").returncode == 1  # nobody is configured
    with WebHook() as hook:
        schedule = json.loads((config / "backup_schedule.json").read_text())
        broken = {"url": "json://me:hunter2@127.0.0.1:1/x", "min_severity": "critical"}
        (config / "backup_schedule.json").write_text(json.dumps(schedule | {"alerts": [hook.url, broken]}))
        done = backup_worker(config, nowhere, "alerts", "test")
        assert [message["title"] for message in hook.got] == [f"[test] {TEST_TITLE}"]
    assert done.returncode == 1
    assert "took it  json://" in done.stdout
    assert "did not: FAILURE" in done.stdout
    assert "(critical)" in done.stdout
    assert "hunter2" not in done.stdout + done.stderr + (config.parent / "history.jsonl").read_text()


def test_a_receiver_that_cannot_be_reached_is_shown_with_the_alerts_and_in_the_status(
    config: Path, valkey: ValkeyServer
) -> None:
    schedule = json.loads((config / "backup_schedule.json").read_text())
    url = "json://me:hunter2@127.0.0.1:1/x"
    (config / "backup_schedule.json").write_text(json.dumps(schedule | {"alerts": [url]}))
    client = valkey.client()
    alerts.raise_alert(client, alerts.Alert("lag", "critical", "slow", "b"), now=1.0)
    runtime = Runtime(load(config), client)
    alerts.deliver_due(client, runtime.config.schedule.alerts, runtime.history, 100.0)
    shown = backup_worker(config, valkey.url, "alerts").stdout
    assert "not reached json://" in shown
    assert "1 time in a row" in shown
    facts = json.loads(backup_worker(config, valkey.url, "status", "--json").stdout)
    assert [row["failures"] for row in facts["receivers"]] == [1]
    assert "alerts do not arrive json://" in backup_worker(config, valkey.url, "status").stdout
    assert "hunter2" not in shown + json.dumps(facts)
