"""What `status` says of each agent's state, with a server and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fakeredis
import msgpack
import pytest

from backup_worker.console import create_app
from backup_worker.runtime import Runtime
from backup_worker.status import overview
from em_bridge import streams
from tests.small_fleet import SmallFleet

NOW = 1795441803.0


@pytest.fixture
def fleet(tmp_path: Path) -> SmallFleet:
    return SmallFleet(tmp_path, agents=("Z", "jay", "rick"))


def states(fleet: SmallFleet, client: Any) -> dict[str, str | None]:
    return {row["agent"]: row["state"] for row in overview(Runtime(fleet.config, client), NOW)["agents"]}


def test_the_state_is_the_monitor_s_word_whatever_the_case_of_the_name(fleet: SmallFleet) -> None:
    client = fakeredis.FakeRedis()
    client.hset(streams.STATES, "z", msgpack.packb({"state": "DEAD"}))
    client.hset(streams.STATES, "jay", b"\xc1 this is no record")
    assert states(fleet, client) == {"Z": "DEAD", "jay": None, "rick": None}


def test_a_record_that_cannot_be_read_keeps_no_page_from_the_console(fleet: SmallFleet) -> None:
    client = fakeredis.FakeRedis()
    client.hset(streams.STATES, "z", msgpack.packb({"state": "DEAD", "since": 1.0}))
    client.hset(streams.STATES, "jay", msgpack.packb([1, 2]))
    client.hset(streams.STATES, "rick", b"\xc1 this is no record")
    client.hset(streams.STATES, b"\xff", msgpack.packb({"state": 7, "since": "now"}))
    visitor = create_app(Runtime(fleet.config, client)).test_client()
    assert {path: visitor.get(path).status_code for path in ("/", "/metrics")} == {"/": 200, "/metrics": 200}


def test_without_a_server_no_state_is_guessed(fleet: SmallFleet) -> None:
    assert set(states(fleet, None).values()) == {None}
