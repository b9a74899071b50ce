"""Starting the parts, or asking about them, in a wrong way: one line, a hint, the right exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backup_worker import backups
from em_bridge import Publisher
from tests.integration.conftest import ValkeyServer, free_port
from tests.small_fleet import SmallFleet

pytestmark = pytest.mark.valkey

PARTS = ("dispatcher", "worker", "scheduler", "watchdog")


@pytest.fixture
def fleet(tmp_path: Path) -> SmallFleet:
    return SmallFleet(tmp_path)


def run(fleet: SmallFleet, *words: str, url: str | None = None) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("REDIS_URL", "BACKUP_CONFIG")}
    command = [sys.executable, "-m", "backup_worker", *words, "--config", str(fleet.config_dir)]
    if url:
        command += ["--redis-url", url]
    return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=30, check=False)


def fails(
    answer: subprocess.CompletedProcess[str], code: int, message: str, *, password: str = "hunter2"
) -> None:
    """Check an error: its exit code, one line that says what is wrong, a hint, no traceback, no password."""
    assert answer.returncode == code, answer.stderr
    lines = answer.stderr.strip().splitlines()
    assert [line for line in lines if line.startswith("error: ")] != [], answer.stderr
    assert message in next(line for line in lines if line.startswith("error: "))
    assert lines[-1].startswith("hint: ")
    assert "Traceback" not in answer.stderr
    assert password not in answer.stderr


@pytest.mark.parametrize("queue", ["backups", "", ".host", "os.system"])
def test_a_worker_of_an_unknown_queue_is_refused(fleet: SmallFleet, queue: str) -> None:
    fails(run(fleet, "worker", "--queue", queue), 2, f"there is no queue “{queue}”")


@pytest.mark.parametrize(
    ("listen", "message"),
    [
        ("127.0.0.1:0", "“127.0.0.1:0” is not an address to listen on"),
        ("8080", "“8080” is not an address to listen on"),
        ("0.0.0.0:8080", "the console has no users, so it does not listen on “0.0.0.0:8080”"),
    ],
)
def test_up_refuses_a_console_that_it_would_start_for_ever(
    fleet: SmallFleet, listen: str, message: str
) -> None:
    fails(run(fleet, "up", "--listen", listen), 2, message)


@pytest.mark.parametrize("command", [*PARTS, "status", "changes", "up"])
def test_a_wrong_url_is_a_usage_error(fleet: SmallFleet, command: str) -> None:
    fails(run(fleet, command, url="http://:hunter2@127.0.0.1"), 2, "wrong redis url")


@pytest.mark.parametrize("command", ["changes", "approve c1", "reject c1", "status"])
def test_a_redis_that_is_away_is_exit_code_three(fleet: SmallFleet, command: str) -> None:
    fleet.edit("backup_schedule.json", lambda document: document["tiers"].pop("daily"))
    answer = run(fleet, *command.split(), url=f"redis://:hunter2@127.0.0.1:{free_port()}/0")
    fails(answer, 3, "cannot be reached")


@pytest.mark.parametrize("command", [*PARTS, "worker --queue backup --processes 1", "changes", "status"])
def test_a_wrong_password_is_exit_code_three_at_once(
    fleet: SmallFleet, command: str, locked_valkey: ValkeyServer
) -> None:
    fleet.edit("backup_schedule.json", lambda document: document["tiers"].pop("daily"))
    answer = run(fleet, *command.split(), url=f"redis://:hunter2@127.0.0.1:{locked_valkey.port}/0")
    fails(answer, 3, "refuses us")


@pytest.mark.parametrize("command", [*PARTS, "up", "status", "changes"])
def test_a_broken_configuration_is_a_usage_error(fleet: SmallFleet, command: str) -> None:
    (fleet.config_dir / "agents.json").write_text('{"agents": {"z": {"rot": "x"}}}')
    answer = run(fleet, command)
    assert answer.returncode == 2, answer.stderr
    assert "agents.json" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_approving_and_rejecting(fleet: SmallFleet, valkey: ValkeyServer) -> None:
    em = Publisher(valkey.url)
    fails(run(fleet, "approve", "c1", url=valkey.url), 4, "there is no change “c1”")
    em.config_proposed("c1", "z", ["weights.json"], "leroy", reason="faster")
    em.config_proposed("c2", "z", ["weights.json"], "leroy")
    waiting = json.loads(run(fleet, "changes", "--json", url=valkey.url).stdout)
    assert [(one["change"], one["state"], one["by"]) for one in waiting] == [
        ("c1", "proposed", "leroy"),
        ("c2", "proposed", "leroy"),
    ]
    fails(run(fleet, "approve", "c1", "--by", "leroy", url=valkey.url), 2, "“leroy” proposed change “c1”")
    done = run(fleet, "approve", "c1", "--by", "kari", "--json", url=valkey.url)
    assert done.returncode == 0
    assert json.loads(done.stdout)["decision"] == "approved"
    for word in ("approve", "reject"):
        fails(run(fleet, word, "c1", "--by", "ola", url=valkey.url), 2, "already approved by kari")
    assert run(fleet, "reject", "c2", "--by", "kari", url=valkey.url).returncode == 0
    assert run(fleet, "changes", url=valkey.url).stdout == "no change waits for a decision\n"
    (fleet.config_dir / "allowed_signers").write_text("kari ssh-ed25519 AAAA\n")
    em.config_proposed("c3", "z", ["weights.json"], "leroy")
    fails(run(fleet, "approve", "c3", "--by", "kari", url=valkey.url), 2, "allowed_signers")


def test_status_is_exit_code_one_while_a_backup_is_overdue(fleet: SmallFleet, valkey: ValkeyServer) -> None:
    answer = run(fleet, "status", "--json", url=valkey.url)
    assert answer.returncode == 1
    facts: Any = json.loads(answer.stdout)
    assert (facts["ok"], facts["redis"]) == (False, True)
    assert [one.split("/")[0::2] for one in facts["overdue"]] == [["daily", "z"]]
    slot = facts["overdue"][0].split("/")[1]
    backups.scheduled(fleet.runtime(valkey.client()), "z", "daily", slot, now=facts["at"])
    again = run(fleet, "status", url=valkey.url)
    assert again.returncode == 0, again.stdout
    assert "overdue" not in again.stdout


def test_status_tells_what_it_knows_also_while_redis_is_away(fleet: SmallFleet) -> None:
    answer = run(fleet, "status", "--json", url=f"redis://127.0.0.1:{free_port()}/0")
    facts = json.loads(answer.stdout)
    assert facts["redis"] is False
    assert facts["queues"] is None
    assert facts["overdue"]
    assert answer.returncode == 1


def test_status_says_which_stream_waits_for_which_queue_and_what_redis_uses(
    fleet: SmallFleet, valkey: ValkeyServer
) -> None:
    fleet.edit("backup_schedule.json", lambda document: document.update(limits={"queue_jobs": 2}))
    client = valkey.client()
    client.sadd("rq:queues", "rq:queue:backup.far")
    client.rpush("rq:queue:backup.far", "a", "b", "c")
    client.config_set("maxmemory", str(512 * 1024**2))
    facts: Any = json.loads(run(fleet, "status", "--json", url=valkey.url).stdout)
    assert facts["queues"] == {"recovery": 0, "backup": 0, "maintenance": 0, "backup.far": 3}
    assert facts["held"] == {"em:config-change": "backup"}
    assert 100_000 < facts["memory"]["used_bytes"] < facts["memory"]["limit_bytes"] == 512 * 1024**2
    text = run(fleet, "status", url=valkey.url).stdout
    assert "held em:config-change is not read: the backup queue is full" in text
    assert "of 512.0 MiB" in text
