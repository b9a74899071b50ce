"""Dead letters: tried again once, dropped for good, and never put back where they would only come back."""

from __future__ import annotations

import json
import time

import pytest
from redis import Redis
from typer.testing import CliRunner

from backup_worker import letters
from backup_worker.cli._app import app
from em_bridge import events, streams
from em_bridge.errors import AgentBackupError, NotFound, UsageError
from tests.console_fleet import make_world
from tests.integration.conftest import ValkeyServer


def bury(client: Redis, event: events.Event, reason: str = "nobody could handle it") -> str:
    """Put an event into the dead letters, as the dispatcher does."""
    letter = streams.dead_letter(event.stream, "1-1", reason, events.encode(event), time.time())
    return streams.append(client, letter)


def test_an_event_is_put_back_as_it_was_and_its_letter_is_gone(client: Redis) -> None:
    event = events.AgentState("z", "DEAD", reason="no heartbeat")
    entry = bury(client, event)
    assert "is on “em:agent-state” again" in letters.retry(client, entry)
    rows = list(streams.read_range(client, streams.AGENT_STATE))
    assert [events.decode(fields) for _, fields in rows] == [event]
    assert list(letters.newest(client)) == []


def test_pressing_twice_makes_one_event(client: Redis) -> None:
    entry = bury(client, events.AgentState("z", "DEAD"))
    letters.retry(client, entry)
    with pytest.raises(NotFound):
        letters.retry(client, entry)
    assert client.xlen(streams.AGENT_STATE) == 1


def test_what_is_no_event_is_not_put_back(client: Redis) -> None:
    broken = streams.dead_letter(
        "em:agent-state", "1-1", "not msgpack", {b"type": b"agent.state", b"body": b"\xff"}, time.time()
    )
    strange = streams.dead_letter("em:inbox:z", "1-1", "?", {b"type": b"message"}, time.time())
    for letter in (broken, strange):
        entry = streams.append(client, letter)
        with pytest.raises(UsageError):
            letters.retry(client, entry)
    assert client.xlen(streams.DEAD_LETTER) == 2


def test_a_message_is_never_put_back_behind_newer_ones(client: Redis) -> None:
    entry = bury(client, events.Message("z", "ghost", 1, b"hello", time.time()), "unknown recipient")
    with pytest.raises(AgentBackupError, match="not delivered"):
        letters.retry(client, entry)
    assert client.xlen(streams.MESSAGES) == 0
    assert client.xlen(streams.DEAD_LETTER) == 1


@pytest.mark.parametrize("entry", ["1-1", "", "+", "-", "x", "999999999999999999999-1"])
def test_a_letter_that_is_not_there_is_not_found(client: Redis, entry: str) -> None:
    bury(client, events.AgentState("z", "DEAD"))
    for action in (letters.get, letters.retry, letters.drop):
        with pytest.raises(NotFound):
            action(client, entry)
    assert client.xlen(streams.DEAD_LETTER) == 1


def test_the_commands_list_retry_and_drop_and_put_it_on_the_record(
    valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    world = make_world(tmp_path_factory.mktemp("w") / "w", valkey.url, ("z",))
    client = world.runtime.redis
    kept, dropped = (
        bury(client, events.AgentState("z", "ALIVE")),
        bury(client, events.AgentState("z", "DEAD")),
    )
    where = ["--config", str(world.config_dir), "--redis-url", world.url]

    def call(*words: str) -> str:
        result = CliRunner().invoke(app, ["dead-letters", *words, *where])
        assert result.exit_code == 0, result.output
        return result.stdout

    found = json.loads(call("list", "--json"))
    assert [(one["entry"], one["stream"], one["reason"]) for one in found] == [
        (dropped, "em:agent-state", "nobody could handle it"), (kept, "em:agent-state", "nobody could handle it"),
    ]  # fmt: skip
    retried = json.loads(call("retry", kept, "--json"))
    assert (retried["entry"], retried["action"]) == (kept, "retry")
    gone = json.loads(call("drop", dropped, "--json"))
    assert (gone["entry"], gone["letter"]["stream"]) == (dropped, "em:agent-state")
    assert "no dead letters" in call("list")
    lines = [(line["action"], line.get("entry")) for line in world.runtime.history.read("dead-letter")]
    assert lines == [("retry", kept), ("drop", None)]
