"""The real parts under `em-bridge acl`, on a server where the default user is off: all works, and nothing more."""

from __future__ import annotations

import hashlib
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from em_bridge import Agent, Publisher, messages, streams
from em_bridge.acl import acl_file, users
from em_bridge.connection import connect
from em_bridge.errors import RedisRefused, UsageError
from em_bridge.events import decode
from tests.integration.conftest import ValkeyServer, free_port
from tests.integration.processes import Process, em_bridge, eventually
from tests.integration.test_bus_cli import call
from tests.small_fleet import SmallFleet

pytestmark = pytest.mark.valkey

AGENTS = ("em", "z", "jay", "rick")


class Locked:
    """A server with the ACL of `em-bridge acl`, an `admin` for the test itself, and a URL for each user."""

    def __init__(self, folder: Path) -> None:
        self.passwords = folder / "passwords.json"
        text = call(None, "acl", *AGENTS, "--passwords", str(self.passwords)).stdout
        self.words: dict[str, str] = json.loads(self.passwords.read_text())
        admin = hashlib.sha256(b"admin").hexdigest()
        (folder / "users.acl").write_text(text + f"user admin on #{admin} ~* &* +@all\n")
        (folder / "data").mkdir()
        self.server = ValkeyServer(
            folder / "data", options={"aclfile": str(folder / "users.acl")}, login="admin:admin"
        )
        self.client = self.server.client()

    def url(self, user: str) -> str:
        return f"redis://{user}:{self.words[user]}@127.0.0.1:{self.server.port}/0"

    def connect(self, user: str) -> redis.Redis:
        return connect(self.url(user), retrying=False)

    def refusals(self) -> list[str]:
        """Return what the server has refused: who wanted to do what."""
        rows: Any = self.client.acl_log(100)
        # RQ asks for the list of connections to name its own address, and does without.
        return [str(row) for row in rows if row["object"] != "client|list"]


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Locked]:
    made = Locked(tmp_path)
    yield made
    made.server.close()


def part(folder: Path, locked: Locked, fleet: SmallFleet, role: str, *options: str) -> Process:
    return Process(
        folder, role, sys.executable, "-m", "backup_worker", role, "--config", str(fleet.config_dir), *options,
        env={"REDIS_URL": locked.url(role), "BACKUP_CONFIG": str(fleet.config_dir)},
    )  # fmt: skip


def test_everything_works_under_the_least_rights(locked: Locked, tmp_path: Path) -> None:
    fleet = SmallFleet(tmp_path / "fleet", agents=AGENTS)
    client = locked.client
    listen = f"127.0.0.1:{free_port()}"
    with (
        em_bridge(tmp_path, "em", locked.url("em"), "em", "--message-log", str(tmp_path / "log")),
        part(tmp_path, locked, fleet, "dispatcher"),
        part(tmp_path, locked, fleet, "scheduler"),
        part(tmp_path, locked, fleet, "watchdog"),
        part(tmp_path, locked, fleet, "worker", "--processes", "1"),
        part(tmp_path, locked, fleet, "console", "--listen", listen),
        Agent("z", locked.url("agent-z"), outbox=tmp_path / "z") as z,
        Agent("jay", locked.url("agent-jay"), outbox=tmp_path / "jay") as jay,
    ):
        eventually(lambda: len(fleet.snapshots) >= 3, 40)
        for number in range(10):
            z.send("jay", b"%d" % number)
        for number in range(10):
            message = jay.receive(10)
            assert message is not None and message.payload == b"%d" % number
            jay.ack(message)
        with Publisher(locked.url("em")) as em:
            em.config_applied("c1", "z", ["weights.json"], "em", "kari")
            em.agent_state("z", "DEGRADED", reason="tired")
            em.agent_state("rick", "DEAD", reason="gone")
        eventually(lambda: any(name.startswith("on-change/") for name in fleet.snapshots), 30)
        eventually(lambda: client.hexists(streams.STATES, "jay") and client.hexists(streams.STATES, "em"), 20)
        eventually(lambda: any(row["kind"] == "recovery" for row in fleet.history()), 30)
        eventually(lambda: int(client.hlen("backup:alerts")) > 0, 30)
        eventually(lambda: _answers(f"http://{listen}/login"), 20)
        client.xadd(streams.CONFIG_CHANGE, {"type": "config.applied", "body": b"\xc1"})
        eventually(lambda: client.xlen(streams.DEAD_LETTER) == 1, 20)
        eventually(lambda: client.exists("backup:watched-at"), 30)
        for command in (
            ["lag"],
            ["log"],
            ["replay", "--from", "0", "--dry-run"],
            ["log", "--stream", "em:due"],
        ):
            call(locked.url("operator"), *command)
        call(locked.url("operator"), "publish", "change", "z", "weights.json", "--by", "kari")
        call(locked.url("operator"), "import", str(tmp_path / "log"))
        eventually(lambda: z.waiting() == 0)
        for user in locked.words:
            # Behind Sentinel everybody asks what a replica has.
            locked.connect(user).wait(0, 1)
    assert locked.refusals() == []
    assert client.llen("rq:queue:backup") == 0
    for log in tmp_path.glob("*.err"):
        said = log.read_text()
        assert "Traceback" not in said and "NOPERM" not in said, said
        assert not [user for user, word in locked.words.items() if word in said]


BEATING = """
import json, os, sys, time
from em_bridge import Agent

open("url", "w").write(os.environ["REDIS_URL"])
with Agent(os.environ["AGENT_ID"], outbox=os.path.join(sys.argv[1], "z.outbox"), heartbeat_s=0.1):
    time.sleep(60)
"""


def test_an_agent_that_a_worker_brings_back_has_the_rights_of_an_agent_and_not_those_of_the_worker(
    locked: Locked, tmp_path: Path
) -> None:
    fleet = SmallFleet(tmp_path / "fleet", agents=("z",))
    (fleet.root() / "agent.py").write_text(BEATING)
    url = f"redis://{{user}}:{{password}}@127.0.0.1:{locked.server.port}/0"
    fleet.edit(
        "backup_schedule.json",
        lambda document: document.update(agent_redis={"url": url, "passwords": str(locked.passwords)}),
    )
    fleet.edit(
        "agents.json",
        lambda document: document["agents"]["z"].update(
            start={"command": [sys.executable, "agent.py", str(tmp_path)]},
            recovery={"first_try": "current"},
            heartbeat={"dead_after": 30},
        ),
    )
    with (
        part(tmp_path, locked, fleet, "dispatcher"),
        part(tmp_path, locked, fleet, "worker", "--processes", "1"),
    ):
        try:
            with Publisher(locked.url("em")) as em:
                em.agent_state("z", "DEAD", reason="gone")
            eventually(lambda: any(row.get("step") == "recovered" for row in fleet.history()), 40)
            given = (fleet.root() / "url").read_text()
            assert given == locked.url("agent-z")
            with pytest.raises(redis.exceptions.NoPermissionError):
                connect(given).set("backup:anything", "1")
        finally:
            _stop(fleet.root())
    assert not [row for row in locked.refusals() if "'set'" not in row]


def _stop(root: Path) -> None:
    for process in psutil.process_iter(["cwd"]):
        if process.info["cwd"] == str(root):
            process.kill()


def _answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=5).status)
    except urllib.error.HTTPError as answer:
        return answer.code < 500
    except OSError:
        return False


FORBIDDEN: dict[str, list[tuple[str, ...]]] = {
    "agent-z": [
        ("XADD", "em:config-change", "*", "type", "config.approved", "body", "x"),
        ("XADD", "em:agent-state", "*", "type", "agent.state", "body", "x"),
        ("XADD", "em:inbox:jay", "*", "type", "message", "body", "x"),
        ("XADD", "em:due", "*", "type", "x", "body", "x"),
        ("XREADGROUP", "GROUP", "agent", "z", "STREAMS", "em:inbox:jay", ">"),
        ("XRANGE", "em:inbox:jay", "-", "+"),
        ("XACK", "em:inbox:jay", "agent", "1-1"),
        ("XRANGE", "em:messages", "-", "+"),
        ("XREADGROUP", "GROUP", "em-router", "z", "STREAMS", "em:messages", ">"),
        ("XTRIM", "em:messages", "MAXLEN", "0"),
        ("DEL", "em:messages"),
        ("HSET", "em:sender:jay", "last", "1"),
        ("HSET", "em:last-seen:jay", "z", "99"),
        ("HSET", "em:fleet", "z", "x"),
        ("HSET", "em:states", "z", "x"),
        ("SET", "em:epoch:em", "99"),
        ("EVAL", "return redis.call('DEL', KEYS[1])", "1", "em:messages"),
        ("EVAL", "return redis.call('XADD', 'em:config-change', '*', 'a', 'b')", "0"),
        ("LPUSH", "rq:queue:backup", "x"),
        ("HSET", "rq:job:x", "data", "x"),
        ("SMEMBERS", "em:seen"),
        ("GET", "backup:watched-at"),
        ("PUBLISH", "rq:pubsub:x", "x"),
    ],
    "em": [
        ("LPUSH", "rq:queue:backup", "x"),
        ("HSET", "em:fleet", "z", "x"),
        ("HSET", "em:sender:z", "last", "1"),
        ("XADD", "em:due", "*", "type", "x", "body", "x"),
        ("HGETALL", "backup:alerts"),
        ("DEL", "em:fleet"),
    ],
    "dispatcher": [
        ("XADD", "em:agent-state", "*", "type", "agent.state", "body", "x"),
        ("XADD", "em:config-change", "*", "type", "x", "body", "x"),
        ("XRANGE", "em:messages", "-", "+"),
        ("XTRIM", "em:config-change", "MAXLEN", "0"),
        ("SET", "em:epoch:em", "99"),
        ("XRANGE", "em:inbox:z", "-", "+"),
    ],
    "worker": [
        ("XADD", "em:inbox:z", "*", "type", "message", "body", "x"),
        ("HSET", "em:sender:z", "last", "1"),
        ("DEL", "em:messages"),
        ("HSET", "em:fleet", "z", "x"),
    ],
    "scheduler": [
        ("LPUSH", "rq:queue:backup", "x"),
        ("XADD", "em:agent-state", "*", "type", "agent.state", "body", "x"),
        ("XADD", "em:config-change", "*", "type", "x", "body", "x"),
        ("DEL", "em:messages"),
    ],
    "watchdog": [
        ("XADD", "em:config-change", "*", "type", "x", "body", "x"),
        ("XADD", "em:heartbeats", "*", "type", "heartbeat", "body", "x"),
        ("XADD", "em:due", "*", "type", "x", "body", "x"),
        ("LPUSH", "rq:queue:backup", "x"),
        ("SET", "em:epoch:em", "99"),
        ("XRANGE", "em:messages", "-", "+"),
    ],
    "console": [
        ("XADD", "em:messages", "*", "type", "message", "body", "x"),
        ("XADD", "em:agent-state", "*", "type", "agent.state", "body", "x"),
        ("XTRIM", "em:config-change", "MAXLEN", "0"),
        ("DEL", "em:states"),
    ],
    "operator": [("SET", "something:else", "x")],
}
FOR_NOBODY: list[tuple[str, ...]] = [
    ("FLUSHALL",), ("CONFIG", "GET", "*"), ("ACL", "LIST"), ("KEYS", "*"), ("SHUTDOWN",), ("MODULE", "LIST"),
    ("SCRIPT", "FLUSH"), ("FUNCTION", "LIST"), ("CLIENT", "LIST"), ("MONITOR",), ("SAVE",), ("REPLICAOF", "NO", "ONE"),
    ("MIGRATE", "x", "1", "x", "0", "1"), ("SET", "something:else", "x"),
]  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    made = Locked(tmp_path_factory.mktemp("locked"))
    yield made
    made.server.close()


@pytest.mark.parametrize("user", FORBIDDEN)
def test_a_role_is_refused_what_it_must_not_do(shared: Locked, user: str) -> None:
    shared.client.set("em:epoch:em", 1)
    commands: list[tuple[str, ...]] = [*FORBIDDEN[user], *FOR_NOBODY]
    for command in commands:
        client: Any = shared.connect(user)
        with pytest.raises(redis.ResponseError, match=r"permission|NOPERM"):
            client.execute_command(*command)
            print(command)
        client.close()
    assert shared.client.get("em:epoch:em") == b"1"


def test_without_a_user_nothing_is_answered(shared: Locked) -> None:
    for login in ("", "agent-z:wrong@", "nobody:x@"):
        with pytest.raises(RedisRefused), Publisher(f"redis://{login}127.0.0.1:{shared.server.port}") as em:
            em.agent_state("z", "DEAD")


def test_an_agent_cannot_pass_for_the_em(shared: Locked) -> None:
    with Publisher(shared.url("agent-z")) as em:
        forbidden: tuple[Callable[[], object], ...] = (
            lambda: em.config_approved("c1", "kari"),
            lambda: em.config_applied("c1", "z", ["a"]),
            lambda: em.agent_state("jay", "DEAD"),
        )
        for publish in forbidden:
            with pytest.raises(RedisRefused):
                publish()
    with pytest.raises(redis.exceptions.RedisError):
        messages.send_once(shared.connect("agent-z"), "jay", "z", b"in jay's name", at=1.0)
    messages.send_once(shared.connect("agent-z"), "z", "jay", b"in its own", at=1.0)
    [*_, (_, fields)] = streams.read_range(shared.client, streams.MESSAGES)
    assert decode(fields).sender == "z"  # type: ignore[attr-defined]


def test_the_file_holds_no_password_and_the_passwords_stay(tmp_path: Path) -> None:
    file = tmp_path / "passwords.json"
    first = call(None, "acl", "z", "--passwords", str(file)).stdout
    words = json.loads(file.read_text())
    assert set(words) == set(users(["z"])) and file.stat().st_mode & 0o777 == 0o600
    assert not [word for word in words.values() if word in first]
    second = call(None, "acl", "z", "jay", "--passwords", str(file)).stdout
    assert set(second.splitlines()) > set(first.splitlines())
    assert json.loads(file.read_text()).items() >= words.items()
    assert "resetpass" in call(None, "acl", "z").stdout.splitlines()[1]
    (tmp_path / "agents.json").write_text('{"agents": {"moe": {}, "em": {}}}')
    told = json.loads(call(None, "acl", "--config", str(tmp_path), "--json").stdout)
    assert told["users"][-1] == "agent-moe" and "agent-em" not in told["users"]
    call(None, "acl", "--config", str(tmp_path / "no"), code=4)
    call(None, "acl", "no one", code=2)
    file.write_text("[]")
    call(None, "acl", "z", "--passwords", str(file), code=2)
    with pytest.raises(UsageError):
        acl_file(["a b"], {})
