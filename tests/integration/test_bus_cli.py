"""The commands of `em-bridge`, as a person or a script runs them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from em_bridge import messages, streams
from em_bridge.events import Message, decode, encode
from tests.integration.conftest import ValkeyServer, free_port
from tests.integration.processes import EM_BRIDGE, em_bridge, eventually

pytestmark = pytest.mark.valkey

COMMANDS = (
    "publish state", "publish change", "send", "log", "replay", "lag", "export", "import", "em", "agent", "run", "acl"
)  # fmt: skip


def call(
    url: str | None, *arguments: str, stdin: str = "", code: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [EM_BRIDGE, *arguments, *(["--redis-url", url] if url else [])],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_with_an_example(command: str) -> None:
    assert f"em-bridge {command}" in call(None, *command.split(), "--help").stdout.partition("Example")[2]


def test_what_is_published_can_be_read_and_says_where_it_stands(valkey: ValkeyServer) -> None:
    state = json.loads(
        call(valkey.url, "publish", "state", "rick", "dead", "--reason", "gone", "--json").stdout
    )
    assert state["stream"] == "em:agent-state" and state["state"] == "DEAD"
    call(valkey.url, "publish", "change", "z", "a.json", "b.json", "--by", "em", "--approved-by", "kari")
    [row] = json.loads(call(valkey.url, "log", "--stream", "em:agent-state", "--json").stdout)
    assert (row["id"], row["agent"], row["state"], row["reason"]) == (state["entry"], "rick", "DEAD", "gone")
    [row] = json.loads(call(valkey.url, "log", "--stream", "em:config-change", "--json").stdout)
    assert (row["paths"], row["by"], row["approved_by"]) == (["a.json", "b.json"], "em", "kari")


def test_the_log_is_filtered_by_place_time_and_agent(valkey: ValkeyServer) -> None:
    for number in range(3):
        call(valkey.url, "send", "z", "jay", f"to jay {number}")
    call(valkey.url, "send", "z", "rick", "-", stdin="to rick\x1b[2J")
    call(valkey.url, "send", "leroy", "jay", "from leroy")
    rows = json.loads(call(valkey.url, "log", "--json").stdout)
    assert [(row["from"], row["to"], row["seq"]) for row in rows] == [
        ("z", "jay", 1),
        ("z", "jay", 2),
        ("z", "jay", 3),
        ("z", "rick", 4),
        ("leroy", "jay", 1),
    ]
    ids = [row["id"] for row in rows]

    def found(*options: str) -> list[str]:
        return [row["id"] for row in json.loads(call(valkey.url, "log", "--json", *options).stdout)]

    assert found("--from", ids[1], "--to", ids[3]) == ids[1:4]
    assert found("--from", rows[2]["time"], "--to", rows[3]["time"]) == ids[2:4]
    assert found("--from", str(streams.entry_time(ids[4]))) == ids[4:]
    assert found("--recipient", "rick") == [ids[3]]
    assert found("--sender", "leroy") == [ids[4]]
    assert found("--limit", "2") == ids[:2]
    plain = call(valkey.url, "log").stdout
    assert "z → rick #4" in plain and "\x1b" not in plain


def test_the_log_can_be_followed(valkey: ValkeyServer, tmp_path: Path) -> None:
    call(valkey.url, "send", "z", "jay", "before")
    with em_bridge(tmp_path, "log", valkey.url, "log", "--follow", "--json", "--from", "0") as log:
        eventually(lambda: len(log.lines()) == 1)
        messages.send_once(valkey.client(), "z", "jay", b"\xff\xfe", at=1.0)
        eventually(lambda: len(log.lines()) == 2)
        assert [json.loads(line)["payload"] for line in log.lines()] == ["before", {"base64": "//4="}]
        assert log.end(2) == 130


def test_an_agent_prints_what_it_receives_and_a_replay_adds_nothing(
    valkey: ValkeyServer, tmp_path: Path
) -> None:
    with (
        em_bridge(tmp_path, "em", valkey.url, "em") as em,
        em_bridge(tmp_path, "jay", valkey.url, "agent", "jay", "--outbox", str(tmp_path / "o")) as jay,
    ):
        eventually(lambda: valkey.client().sismember(streams.SEEN, "jay"))
        call(valkey.url, "send", "z", "jay", "one")
        call(valkey.url, "send", "z", "jay", "two")
        eventually(lambda: len(jay.lines()) == 2)
        assert jay.lines()[0].endswith("z → jay #1  one")
        eventually(lambda: valkey.client().hget("em:last-seen:jay", "z") == b"2")
        result = json.loads(call(valkey.url, "replay", "--from", "0", "--json").stdout)
        assert (result["messages"], result["redelivered"], result["already_there"]) == (2, 0, 2)
        assert jay.end() == 0 and em.end() == 0
        # Its outbox is lost, and with it the memory of what it has seen.
        (tmp_path / "o").unlink()
    with (
        em_bridge(tmp_path, "em", valkey.url, "em"),
        em_bridge(tmp_path, "jay2", valkey.url, "agent", "jay", "--outbox", str(tmp_path / "o2")) as jay,
    ):
        eventually(lambda: valkey.client().hget("em:last-seen:jay", "z") is None)
        dry = json.loads(call(valkey.url, "replay", "--from", "0", "--dry-run", "--json").stdout)
        assert (dry["redelivered"], dry["dry_run"]) == (2, True)
        assert jay.lines() == []
        assert "2 delivered again" in call(valkey.url, "replay", "--from", "0").stdout
        eventually(lambda: len(jay.lines()) == 2)


def test_what_is_wrong_is_one_line_with_a_hint_and_its_exit_code(
    valkey: ValkeyServer, tmp_path: Path
) -> None:
    nowhere = f"redis://:secret@127.0.0.1:{free_port()}"
    for url, arguments, code, said in (
        (valkey.url, ["publish", "state", "z", "SLEEPY"], 2, "“SLEEPY”, not one of ALIVE"),
        (valkey.url, ["publish", "change", "z", "../x", "--by", "em"], 2, "leaves the agent's root"),
        (valkey.url, ["send", "z", "no one", "hi"], 2, "not an agent id"),
        (valkey.url, ["log", "--from", "yesterday"], 2, "“yesterday” is neither"),
        (valkey.url, ["log", "--stream", "em:epoch:em"], 3, "redis"),
        (valkey.url, ["agent", "no one"], 2, "not an agent id"),
        (valkey.url, ["run", "rick", "--", "no-such-program"], 2, "“no-such-program” cannot be started"),
        (nowhere, ["log"], 3, "cannot be reached"),
        (nowhere, ["replay", "--from", "0"], 3, "cannot be reached"),
        ("http://example", ["log"], 2, "wrong redis url"),
    ):
        if "em:epoch:em" in arguments:
            valkey.client().set("em:epoch:em", 1)
        done = call(url, *arguments, code=code)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and said in errors[0], done.stderr
        assert "secret" not in done.stderr and done.stdout == ""


def test_a_wrong_password_ends_every_command_at_once(locked_valkey: ValkeyServer, tmp_path: Path) -> None:
    url = f"redis://:wrong@127.0.0.1:{locked_valkey.port}"
    for arguments in (["em"], ["send", "z", "jay", "hi"], ["publish", "state", "z", "DEAD"], ["log"]):
        begun = time.monotonic()
        assert "refuses us" in call(url, *arguments, code=3).stderr
        assert time.monotonic() - begun < 4


def test_an_outbox_in_use_is_said_plainly(valkey: ValkeyServer, tmp_path: Path) -> None:
    with em_bridge(tmp_path, "jay", valkey.url, "agent", "jay", "--outbox", str(tmp_path / "o")):
        eventually(lambda: valkey.client().sismember(streams.SEEN, "jay"))
        done = call(valkey.url, "agent", "jay", "--outbox", str(tmp_path / "o"), code=1)
        assert "in use by another process" in done.stderr


def test_what_waits_is_shown_per_stream_group_and_inbox(valkey: ValkeyServer) -> None:
    client = valkey.client()
    client.sadd(streams.SEEN, "jay")
    for number in range(5):
        messages.send_once(client, "z", "jay", b"%d" % number, at=1.0)
    streams.ensure_group(client, streams.MESSAGES, streams.ROUTER_GROUP)
    client.xreadgroup(streams.ROUTER_GROUP, "x", {streams.MESSAGES: ">"}, count=2)
    for number in range(3):
        client.xadd(streams.inbox("jay"), encode(Message("z", "jay", number, b"")))  # type: ignore[arg-type]
    time.sleep(0.3)
    result = json.loads(call(valkey.url, "lag", "--json").stdout)
    rows = {row["stream"]: row for row in result["streams"]}
    [group] = rows["em:messages"]["groups"]
    assert (rows["em:messages"]["length"], group["group"]) == (5, "em-router")
    assert (group["pending"], group["unread"], group["consumers"]) == (2, 3, 1)
    assert 0.3 <= group["oldest_waiting_s"] < 30 and rows["em:messages"]["bytes"] > 300
    assert rows["em:heartbeats"] == {
        "stream": "em:heartbeats", "length": 0, "bytes": 0, "oldest_s": None, "groups": [],
    }  # fmt: skip
    [inbox] = result["inboxes"]
    assert (inbox["agent"], inbox["waiting"], inbox["length"]) == ("jay", 3, 3)
    assert inbox["oldest_waiting_s"] >= 0.3 and result["memory"]["used_bytes"] > 0
    client.xreadgroup(streams.ROUTER_GROUP, "x", {streams.MESSAGES: ">"})
    client.xack(
        streams.MESSAGES, streams.ROUTER_GROUP, *(e for e, _ in streams.read_range(client, streams.MESSAGES))
    )
    [group] = json.loads(call(valkey.url, "lag", "--json").stdout)["streams"][-1]["groups"]
    assert (group["pending"], group["unread"], group["oldest_waiting_s"]) == (0, 0, 0.0)
    table = call(valkey.url, "lag").stdout
    assert "em-router" in table and "jay" in table and "memory of the server" in table


def test_messages_are_copied_into_a_stream_of_ones_own_once(valkey: ValkeyServer) -> None:
    client = valkey.client()
    for number in range(3):
        messages.send_once(client, "z", "jay" if number else "rick", b"%d" % number, at=1.0)
    client.xadd(streams.MESSAGES, {b"type": b"message", b"body": b"\xc1"})
    ids = [entry for entry, _ in streams.read_range(client, streams.MESSAGES)]
    copy = ("replay", "--from", "0", "--into", "audit", "--json")
    assert json.loads(call(valkey.url, *copy, "--dry-run").stdout)["copied"] == 3
    assert not client.exists("audit")
    assert json.loads(call(valkey.url, *copy, "--recipient", "jay").stdout)["copied"] == 2
    assert json.loads(call(valkey.url, *copy, "--recipient", "jay").stdout)["already_there"] == 2
    rows = json.loads(call(valkey.url, "log", "--stream", "em:inbox:x", "--json").stdout)
    assert rows == []
    copied = [(entry, decode(fields)) for entry, fields in streams.read_range(client, "audit")]
    assert [(e, m.log, m.payload) for e, m in copied] == [  # type: ignore[attr-defined]
        (ids[1], ids[1], b"1"), (ids[2], ids[2], b"2"),
    ]  # fmt: skip
    assert "holds later entries" in call(valkey.url, *copy, code=1).stderr
    messages.send_once(client, "z", "jay", b"3", at=1.0)
    assert "1 copied into audit, 2 there already" in call(valkey.url, *copy[:-1], "--recipient", "jay").stdout
    for reserved in ("em:inbox:jay", "em:messages", "rq:queue:x", "backup:x"):
        assert (
            "stream of the bus"
            in call(valkey.url, "replay", "--from", "0", "--into", reserved, code=2).stderr
        )


def test_an_export_and_an_import_by_hand(valkey: ValkeyServer, tmp_path: Path) -> None:
    messages.send_once(valkey.client(), "z", "jay", b"0", at=1.0)
    (tmp_path / "folder").mkdir()
    assert json.loads(call(valkey.url, "export", str(tmp_path / "file"), "--json").stdout)["messages"] == 1
    assert "1 messages exported" in call(valkey.url, "export", str(tmp_path / "folder")).stdout
    valkey.client().flushall()
    result = json.loads(call(valkey.url, "import", str(tmp_path / "file"), "--json").stdout)
    assert result == {"messages": 1, "added": 1, "redelivered": 0}
    assert "0 were not in the log" in call(valkey.url, "import", str(tmp_path / "folder")).stdout
    assert "no exported message log" in call(valkey.url, "import", str(tmp_path / "nothing"), code=4).stderr


def test_the_embedded_server_of_the_configuration_is_found(valkey: ValkeyServer, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.mkdir()
    here = ["--config", str(config), "--json"]
    clean = {key: value for key, value in os.environ.items() if key not in ("REDIS_URL", "BACKUP_CONFIG")}

    def found(**env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [EM_BRIDGE, "log", *here],
            env=clean | env,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )

    messages.send_once(valkey.client(), "z", "jay", b"0", at=1.0)
    for folder, schedule, env in (
        (tmp_path / "var", {}, {}),
        (tmp_path / "elsewhere", {"state": "../elsewhere"}, {}),
        (tmp_path / "abs", {"state": str(tmp_path / "abs")}, {}),
        (tmp_path / "named", {"state": "${HERE}/named"}, {"HERE": str(tmp_path)}),
    ):
        (config / "backup_schedule.json").write_text(json.dumps(schedule))
        (folder / "valkey").mkdir(parents=True)
        (folder / "valkey" / "url").write_text(valkey.url + "\n")
        done = found(**env)
        assert [row["payload"] for row in json.loads(done.stdout)] == ["0"], done.stderr
        shutil.rmtree(folder)
    for text, said in (
        ("{", "is not JSON"),
        ('{"state": 5}', "“state” is not a path"),
        ('{"state": "${NO}"}', "“NO”"),
    ):
        (config / "backup_schedule.json").write_text(text)
        done = found()
        assert done.returncode == 2 and said in done.stderr
    # What was said by hand wins.
    assert found(REDIS_URL=valkey.url).returncode == 0
