"""The console with no more rights on the server than its role has: pages are whole, and it says what it may not do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backup_worker.console import create_app
from em_bridge import events, streams
from tests.console_fleet import Visitor, World, live_through, make_world
from tests.integration.test_bus_rights import Locked

PAGES = ("/", "/backups", "/incidents", "/changes", "/alerts", "/messages", "/history", "/weights/z", "/metrics",
         "/rq/", "/rq/0/view/jobs", "/rq/0/view/workers")  # fmt: skip


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    made = Locked(tmp_path_factory.mktemp("locked"))
    yield made
    made.server.close()


@pytest.fixture
def world(locked: Locked, tmp_path: Path) -> World:
    made = make_world(tmp_path / "w", locked.url("operator"), ("em", "z", "jay", "rick", "leroy"))
    live_through(made, time.time(), days=6)
    return made


def test_every_page_is_whole_and_letters_are_retried_and_dropped(locked: Locked, world: World) -> None:
    visitor = Visitor(create_app(World(world.folder, locked.url("console")).runtime))
    for path in PAGES:
        answer = visitor.get(path)
        assert answer.status_code == 200, (path, answer.text)
        assert "Redis is away" not in answer.text, path
    client = world.runtime.redis
    letters = []
    for event in (
        events.ConfigApproved("c1", "kari"), events.ConfigApproved("c2", "kari"), events.AgentState("z", "DEAD"),
    ):  # fmt: skip
        letter = streams.dead_letter(event.stream, "1-1", "nobody", events.encode(event), time.time())
        letters.append(streams.append(client, letter))
    assert visitor.post(f"/messages/dead-letters/{letters[0]}/retry").status_code == 302
    assert visitor.post(f"/messages/dead-letters/{letters[1]}/drop", reason="old").status_code == 302
    # Who got hold of the console's password must not be able to call an agent dead.
    assert visitor.post(f"/messages/dead-letters/{letters[2]}/retry").status_code == 503
    left = [entry for entry, _ in streams.read_range(client, streams.DEAD_LETTER)]
    assert letters[2] in left
    assert not {letters[0], letters[1]} & set(left)
