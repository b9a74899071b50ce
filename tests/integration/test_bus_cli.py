"""The commands of `em-bridge`, as a person or a script runs them."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from em_bridge import messages, streams
from tests.integration.conftest import ValkeyServer, free_port
from tests.integration.processes import EM_BRIDGE, em_bridge, eventually

pytestmark = pytest.mark.valkey

COMMANDS = ("publish state", "publish change", "send", "log", "replay", "em", "agent", "run")


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
