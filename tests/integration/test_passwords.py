"""The server's password is in no log, no process list, no record and no evidence, whatever happens to the fleet."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import psutil
import pytest

from em_bridge import Agent, Publisher
from tests.integration.conftest import ValkeyServer
from tests.integration.parts import Part
from tests.integration.processes import em_bridge
from tests.small_fleet import DAILY, SmallFleet, until

pytestmark = [pytest.mark.valkey, pytest.mark.timeout(120)]

WORD = "Xy7-no-one-may-read-this-Qz9"


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> ValkeyServer:
    return ValkeyServer(tmp_path_factory.mktemp("valkey"), password=WORD)


def test_a_password_stays_in_the_environment_through_a_recovery_that_fails(
    server: ValkeyServer, tmp_path: Path
) -> None:
    fleet = SmallFleet(tmp_path / "fleet", ("z", "jay"), tiers={"daily": DAILY})
    (fleet.root() / "agent.py").write_text("import sys; print('I cannot'); sys.exit(1)\n")
    fleet.edit(
        "agents.json",
        lambda document: document["agents"]["z"].update(
            start={"command": [sys.executable, "agent.py"]},
            recovery={"attempts": 1},
            heartbeat={"dead_after": 30, "verify_within": 1},
        ),
    )
    env = {"REDIS_URL": server.url, "BACKUP_CONFIG": str(fleet.config_dir)}
    with contextlib.ExitStack() as stack:
        stack.callback(server.close)
        stack.enter_context(
            em_bridge(tmp_path, "em", server.url, "em", "--message-log", str(tmp_path / "log"))
        )
        parts = [Part(fleet.folder, *words.split(), env=env) for words in (
            "dispatcher", "scheduler", "watchdog", "worker --processes 1",
        )]  # fmt: skip
        for part in parts:
            stack.callback(part.close)
        jay = stack.enter_context(Agent("jay", server.url, outbox=tmp_path / "jay.outbox"))
        until(lambda: len(fleet.snapshots) >= 2, 60)
        jay.send("z", b"are you there?")
        with Publisher(server.url) as em:
            em.agent_state("z", "DEAD", reason="gone")
        until(lambda: any(row.get("step") == "escalated" for row in fleet.history()), 60)
        evidence = fleet.config.schedule.state / "evidence"
        until(lambda: any(evidence.rglob("*")), 20)
        shown = [line for part in parts for one in (psutil.Process(part.process.pid), *part.family())
                 for line in _cmdline(one)]  # fmt: skip
        # The server goes away and comes back without the user: that is told, too.
        server.kill()
        until(lambda: all("cannot be reached" in part.log for part in parts[:3]), 20)
    shown += [json.dumps(row) for row in fleet.history()]
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 20 and any(path.is_relative_to(evidence) for path in files)
    for path in files:
        assert WORD.encode() not in path.read_bytes(), path
    assert shown and not [text for text in shown if WORD in text]


def _cmdline(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []
