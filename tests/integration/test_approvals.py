"""Approvals as people and the EM live them: proposed, signed, applied, changed by hand, put back; on real servers."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backup_worker import alerts, backups
from backup_worker.approval import changes
from em_bridge import Publisher
from tests.change_house import BOTH
from tests.integration.conftest import ValkeyServer
from tests.integration.parts import Part
from tests.small_fleet import DAILY, SmallFleet, until
from tests.tools import needs

pytestmark = pytest.mark.valkey

NEW = b'{"speed": 0.6, "care": 2}\n'


@pytest.fixture
def fleet(tmp_path: Path) -> SmallFleet:
    fleet = SmallFleet(tmp_path, tiers={"daily": DAILY, "on-change": BOTH})
    quick = {"settle_seconds": 0, "scan_minutes": 0.02}
    fleet.edit("backup_schedule.json", lambda document: document.update(approvals=quick))
    return fleet


@pytest.fixture
def parts(fleet: SmallFleet, valkey: ValkeyServer) -> Iterator[list[Part]]:
    started: list[Part] = []
    yield started
    for part in started:
        part.close()


def up(parts: list[Part], fleet: SmallFleet, valkey: ValkeyServer) -> Part:
    config = str(fleet.config_dir)
    parts.append(Part(fleet.folder, "up", "--no-console", "--config", config, "--redis-url", valkey.url))
    parts[-1].says("Ctrl-C stops")
    return parts[-1]


def run(fleet: SmallFleet, valkey: ValkeyServer, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a person does; the server is named by the environment."""
    clean = {key: value for key, value in os.environ.items() if key not in ("REDIS_URL", "BACKUP_CONFIG")}
    command = [sys.executable, "-m", "backup_worker", *words, "--config", str(fleet.config_dir)]
    clean["REDIS_URL"] = valkey.url
    return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=60, check=False)


def sign_as(fleet: SmallFleet, name: str) -> Path:
    """Make a key for `name` and allow it to sign."""
    needs("ssh-keygen", why="approvals are signed with it")
    key = fleet.folder / f"{name}.key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    public = " ".join((fleet.folder / f"{name}.key.pub").read_text().split()[:2])
    with (fleet.config_dir / "allowed_signers").open("a") as file:
        file.write(f'{name} namespaces="agent-backup" {public}\n')
    return key


def made(fleet: SmallFleet, reason: str) -> list[Any]:
    return [head for head in fleet.repository.snapshots("z", "on-change") if reason in head.reason]


def critical(valkey: ValkeyServer) -> list[str]:
    found = alerts.open_alerts(valkey.client())
    return [one.key for one in found if one.severity == "critical" and one.resolved_at is None]


def test_a_signed_change_from_the_proposal_to_its_snapshot(
    fleet: SmallFleet, valkey: ValkeyServer, parts: list[Part]
) -> None:
    key = sign_as(fleet, "kari")
    up(parts, fleet, valkey)
    until(lambda: fleet.history("approved-state"), 30)
    em = Publisher(valkey.url)
    em.config_proposed("c1", "z", ["weights.json"], "em", reason="impact", proposed={"weights.json": NEW})

    by_name = run(fleet, valkey, "approve", "c1", "--by", "kari")
    assert by_name.returncode == 2
    assert "by name alone does not count" in by_name.stderr
    # Somebody with the password of Redis says so in kari's name.
    em.config_approved("c1", "kari")
    done = run(fleet, valkey, "approve", "c1", "--by", "kari", "--key", str(key), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["signed"] is True
    (before,) = until(lambda: made(fleet, "config.approved c1"), 20)
    (fleet.root() / "weights.json").write_bytes(NEW)
    em.config_applied("c1", "z", ["weights.json"], "em")
    (after,) = until(lambda: made(fleet, "config.applied c1"), 20)
    assert (before.approved, after.approved, after.approved_by) == (None, True, "kari")
    (line,) = until(lambda: [one for one in fleet.history("approved-state") if one["change"] == "c1"], 10)
    assert (line["how"], line["sha256"]) == ("signed", {"weights.json": hashlib.sha256(NEW).hexdigest()})
    assert critical(valkey) == []


def test_signing_elsewhere_takes_three_steps(fleet: SmallFleet, valkey: ValkeyServer) -> None:
    key = sign_as(fleet, "kari")
    em = Publisher(valkey.url)
    em.config_proposed("c1", "z", ["weights.json"], "em", proposed={"weights.json": NEW})
    printed = run(fleet, valkey, "approve", "c1", "--by", "kari", "--statement")
    statement = fleet.folder / "c1"
    statement.write_text(printed.stdout)
    command: list[str | Path] = ["ssh-keygen", "-Y", "sign", "-q", "-n", "agent-backup", "-f", key, statement]
    subprocess.run(command, check=True, capture_output=True)
    em.config_proposed("c2", "z", ["weights.json"], "em", proposed={"weights.json": NEW})
    signature = str(fleet.folder / "c1.sig")
    replayed = run(fleet, valkey, "approve", "c2", "--by", "kari", "--signature", signature)
    assert replayed.returncode == 2
    assert "does not prove" in replayed.stderr
    done = run(fleet, valkey, "approve", "c1", "--by", "kari", "--signature", signature)
    assert done.stdout == "change c1 approved by kari, signed\n"


def test_the_command_that_show_prints_approves_nothing_else(fleet: SmallFleet, valkey: ValkeyServer) -> None:
    em = Publisher(valkey.url)
    em.config_proposed("c1", "z", ["weights.json"], "em", proposed={"weights.json": NEW})
    command = (
        run(fleet, valkey, "changes", "show", "c1").stdout.strip().partition("backup-worker ")[2].split()
    )
    em.config_proposed("c1", "z", ["weights.json"], "em", proposed={"weights.json": b'{"speed": 99}'})
    late = run(fleet, valkey, *command, "--by", "kari")
    assert late.returncode == 2
    assert "is not the one you have seen" in late.stderr
    command = (
        run(fleet, valkey, "changes", "show", "c1").stdout.strip().partition("backup-worker ")[2].split()
    )
    assert run(fleet, valkey, *command, "--by", "kari").stdout == "change c1 approved by kari\n"


def test_a_change_shows_its_difference_and_who_asks(fleet: SmallFleet, valkey: ValkeyServer) -> None:
    backups.by_hand(fleet.runtime(valkey.client()), "z", "daily", now=time.time())
    em = Publisher(valkey.url)
    soul = b"I am z, and this is what I am.\n"
    proposed = {"weights.json": NEW, "SOUL.md": soul}
    em.config_proposed(
        "c1", "z", [*proposed, "new.json"], "leroy", reason="more \x1b[2Jimpact", proposed=proposed
    )
    shown = run(fleet, valkey, "changes", "show", "c1").stdout
    assert "asked for by leroy" in shown
    assert "\x1b[2J" not in shown
    speed = next(line for line in shown.splitlines() if "speed" in line)
    assert speed.split() == ["speed", "0.5", "0.6", "+0.1"]
    assert "-I am z, and this is who I am." in shown
    assert "+I am z, and this is what I am." in shown
    assert "whoever approves it has seen nothing" in shown
    assert f"sha256 {hashlib.sha256(NEW).hexdigest()}" in shown
    facts = json.loads(run(fleet, valkey, "changes", "show", "c1", "--json").stdout)
    keys = {one["path"]: one["keys"] for one in facts["difference"]}
    assert keys["weights.json"][0] == {
        "key": "speed",
        "kind": "changed",
        "old": 0.5,
        "new": 0.6,
        "delta": 0.1,
    }
    assert run(fleet, valkey, "changes", "show", "c9").returncode == 4


def test_a_change_by_hand_while_everything_was_down_is_found_told_and_put_back(
    fleet: SmallFleet, valkey: ValkeyServer, parts: list[Part]
) -> None:
    weights = fleet.root() / "weights.json"
    first = up(parts, fleet, valkey)
    until(lambda: fleet.history("approved-state"), 30)
    assert first.stop() == 0
    weights.write_text('{"speed": 9.9}\n')

    up(parts, fleet, valkey)
    (key,) = until(lambda: critical(valkey), 30)
    assert key.startswith("unapproved/z/")
    (head,) = made(fleet, "changed without an approval: weights.json")
    assert head.approved is False
    (waiting,) = changes.all_changes(valkey.client())
    shown = run(fleet, valkey, "changes", "show", waiting.change).stdout
    speed = next(line for line in shown.splitlines() if "speed" in line)
    assert speed.split() == ["speed", "0.5", "9.9", "+9.4"]
    done = run(fleet, valkey, "revert", "z", "--by", "kari", "--reason", "not ours")
    assert done.returncode == 0, done.stderr
    assert weights.read_text() == '{"speed": 0.5}\n'
    assert until(lambda: not critical(valkey), 20)
    (line,) = fleet.history("revert")
    assert (Path(line["evidence"]) / "weights.json").read_text() == '{"speed": 9.9}\n'
    verified = json.loads(run(fleet, valkey, "history", "verify", "--json").stdout)
    assert (verified["ok"], verified["noted"]["seq"] > 0) == (True, True)
