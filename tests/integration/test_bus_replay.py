"""A replay on a real Valkey: what an agent lacks, in order, and nothing that it has."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from em_bridge import Agent, ExecutionManager, messages, replay, streams
from tests.integration.conftest import ValkeyServer
from tests.integration.processes import eventually
from tests.integration.talk import drain, inbox_of, make_known, numbers, receive_all, router

pytestmark = pytest.mark.valkey


def test_a_replay_gives_nobody_a_message_twice(
    valkey: ValkeyServer, em: ExecutionManager, tmp_path: Path
) -> None:
    client = valkey.client()
    make_known(client, "jay")
    for payload in numbers(10):
        messages.send_once(client, "z", "jay", payload, at=1.0)
    with Agent("jay", valkey.url, outbox=tmp_path / "jay") as jay:
        found = []
        for _ in range(5):
            message = jay.receive(5)
            assert message is not None
            jay.ack(message)
            found.append(message.payload)
        eventually(lambda: int(client.xlen(streams.inbox("jay"))) == 10)
        plan = replay.execute(client, replay.plan_replay(client))
        assert plan.as_dict()["redelivered"] == 0
        assert (plan.as_dict()["already_there"], plan.as_dict()["waiting_in_inbox"]) == (5, 5)
        assert found + receive_all(jay, 5) == numbers(10)


def test_a_replay_gives_a_restored_agent_what_came_after_its_backup_and_in_order(
    valkey: ValkeyServer, em: ExecutionManager, tmp_path: Path
) -> None:
    client = valkey.client()
    make_known(client, "jay")

    def send(start: int, end: int) -> None:
        for number in range(start, end):
            messages.send_once(client, "z", "jay", b"%d" % number, at=1.0)

    send(0, 3)
    with Agent("jay", valkey.url, outbox=tmp_path / "jay") as jay:
        assert receive_all(jay, 3) == numbers(3)
    shutil.copytree(tmp_path, tmp_path / "backup")
    send(3, 6)
    with Agent("jay", valkey.url, outbox=tmp_path / "jay") as jay:
        assert receive_all(jay, 3) == numbers(6)[3:]
    for file in tmp_path.glob("jay*"):
        file.unlink()
    for file in (tmp_path / "backup").glob("jay*"):
        shutil.copy(file, tmp_path)
    send(6, 8)
    eventually(lambda: int(client.xlen(streams.inbox("jay"))) == 8)
    with Agent("jay", valkey.url, outbox=tmp_path / "jay") as jay:
        eventually(lambda: client.hget("em:last-seen:jay", "z") == b"3")
        # It lacks 3 to 5, and 6 and 7 wait already: they must come after.
        plan = replay.plan_replay(client)
        assert plan.as_dict()["redelivered"] == 3
        replay.execute(client, plan)
        assert receive_all(jay, 5) == numbers(8)[3:]


def test_a_replay_leaves_unrouted_messages_to_the_router(valkey: ValkeyServer) -> None:
    client = valkey.client()
    make_known(client, "jay")
    messages.send_once(client, "z", "jay", b"0", at=1.0)
    assert replay.plan_replay(client).as_dict()["not_yet_routed"] == 1
    routing = router(valkey)
    drain(routing)
    messages.send_once(client, "z", "jay", b"1", at=1.0)
    messages.send_once(client, "z", "ghost", b"2", at=1.0)
    plan = replay.execute(client, replay.plan_replay(client)).as_dict()
    assert (plan["not_yet_routed"], plan["waiting_in_inbox"], plan["redelivered"]) == (2, 1, 0)
    drain(routing)
    assert replay.plan_replay(client).as_dict()["unknown_recipient"] == 1
    assert inbox_of(client, "jay") == [b"0", b"1"]
