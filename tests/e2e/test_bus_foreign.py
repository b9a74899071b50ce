"""A program in another language, written from the contract alone: whatever it publishes is understood."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from em_bridge import Agent, streams
from em_bridge.events import decode
from em_bridge.monitor import read_record
from tests import documents
from tests.integration.conftest import ValkeyServer
from tests.integration.processes import Process, em_bridge, eventually
from tests.small_fleet import SmallFleet
from tests.tools import needs

pytestmark = pytest.mark.valkey

PACKAGES = ("redis@5.12.1", "@msgpack/msgpack@3.1.3")


@pytest.fixture
def program(pytestconfig: pytest.Config) -> Path:
    """The program beside its packages, which are installed once into pytest's cache."""
    assert pytestconfig.cache is not None
    folder = Path(pytestconfig.cache.mkdir("foreign-publisher"))
    for tool in ("node", "npm"):
        needs(tool, why="the contract is tried from another language")
    marker = folder / "installed"
    if not marker.exists() or marker.read_text() != " ".join(PACKAGES):
        install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts"]
        patience = ["--fetch-retries=1", "--fetch-timeout=20000"]
        try:
            done = subprocess.run(
                [*install, *patience, "--prefix", str(folder), *PACKAGES],
                capture_output=True, text=True, check=False, timeout=60,
            )  # fmt: skip
            problem = done.stdout + done.stderr if done.returncode else ""
        except subprocess.TimeoutExpired:
            problem = "no answer within 60 s"
        # npm may end with 0 although it reached nobody.
        if problem or not (folder / "node_modules" / "@msgpack").is_dir():
            pytest.skip(f"npm cannot install {', '.join(PACKAGES)} here: {problem}")
        marker.write_text(" ".join(PACKAGES))
    return Path(shutil.copy(Path(__file__).with_name("foreign.mjs"), folder))


@pytest.fixture
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Any:
    server = ValkeyServer(tmp_path_factory.mktemp("valkey"))
    yield server
    server.close()


def test_a_program_in_node_is_a_full_member_of_the_fleet(
    valkey: ValkeyServer, tmp_path: Path, program: Path
) -> None:
    fleet = SmallFleet(tmp_path / "fleet", agents=("z", "jay", "node"))
    client = valkey.client()
    env = {"REDIS_URL": valkey.url}

    def part(role: str, *options: str) -> Process:
        words = ("-m", "backup_worker", role, "--config", str(fleet.config_dir), *options)
        return Process(tmp_path, role, sys.executable, *words, env=env)

    with (
        em_bridge(tmp_path, "em", valkey.url, "em") as em,
        part("dispatcher"),
        part("worker", "--processes", "1"),
        Agent("jay", valkey.url, outbox=tmp_path / "jay") as jay,
    ):
        # The monitor judges who beats while it watches.
        eventually(lambda: "jay is ALIVE" in em.err.read_text())
        node = Process(tmp_path, "node", "node", str(program), env=env)
        with node:
            for number in (1, 2, 3):
                message = jay.receive(20)
                assert message is not None and message.payload == b"hello %d" % number
                assert (message.sender, message.seq) == ("node", number)
                jay.ack(message)
                jay.send("node", b"answer %d" % number)
            assert node.process.wait(30) == 0, node.err.read_text()
        told = json.loads(node.lines()[-1])
        assert [(m["from"], m["seq"], m["text"]) for m in told["got"]] == [
            ("jay", n, f"answer {n}") for n in (1, 2, 3)
        ]
        log = {entry for entry, _ in streams.read_range(client, streams.MESSAGES)}
        assert all(m["log"] in log for m in told["got"]) and told["beats"] >= 1
        eventually(lambda: read_record(client.hget(streams.STATES, "node")).get("state") == "ALIVE")  # type: ignore[arg-type]
        # The backup of the change, the incident of the death, and the changes as they were decided.
        eventually(lambda: any(name.startswith("on-change/") for name in fleet.snapshots), 20)
        eventually(lambda: any(row["kind"] == "recovery" for row in fleet.history()), 20)
        assert client.xpending(streams.MESSAGES, streams.ROUTER_GROUP)["pending"] == 0
        assert client.xpending(streams.inbox("node"), streams.INBOX_GROUP)["pending"] == 0
    kinds = {
        decode(fields).type
        for stream in (streams.AGENT_STATE, streams.CONFIG_CHANGE, streams.MESSAGES, streams.HEARTBEATS)
        for _, fields in streams.read_range(client, stream)
    }
    assert kinds >= {
        "agent.state", "config.proposed", "config.approved", "config.rejected", "config.applied", "message",
        "heartbeat",
    }  # fmt: skip
    letters = [decode(fields) for _, fields in streams.read_range(client, streams.DEAD_LETTER)]
    assert letters == []


def test_the_agent_in_node_that_the_documents_show_sends_and_receives(
    valkey: ValkeyServer, tmp_path: Path, program: Path
) -> None:
    example = program.with_name("example.mjs")
    example.write_text(documents.block("node").text)
    with (
        em_bridge(tmp_path, "em", valkey.url, "em") as em,
        Agent("jay", valkey.url, outbox=tmp_path / "jay") as jay,
    ):
        eventually(lambda: "jay is ALIVE" in em.err.read_text())
        with Process(tmp_path, "node", "node", str(example), env={"REDIS_URL": valkey.url}) as node:
            message = jay.receive(20)
            assert message is not None and (message.sender, message.payload) == ("node", b"hello from node")
            jay.ack(message)
            jay.send("node", b"good morning")
            assert node.process.wait(30) == 0, node.err.read_text()
        assert node.lines() == ["jay says: good morning"]
    client = valkey.client()
    assert client.xpending(streams.inbox("node"), streams.INBOX_GROUP)["pending"] == 0
    assert client.xlen(streams.DEAD_LETTER) == 0
