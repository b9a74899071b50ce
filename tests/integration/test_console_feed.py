"""What changed, told to open pages: one reader for all, a bound on streams, an end on shutdown."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backup_worker import backups
from backup_worker.console import create_app
from backup_worker.console import feed as feeds
from backup_worker.console.feed import Feed
from backup_worker.console.roles import VIEWER
from backup_worker.recovery.incident import IncidentStore
from backup_worker.recovery.service import RecoveryService
from em_bridge import Publisher
from tests.console_fleet import PASSWORD, Visitor, World, make_world, served, until
from tests.integration.conftest import ValkeyServer, free_port


@pytest.fixture
def world(valkey: ValkeyServer, tmp_path: Path) -> World:
    return make_world(tmp_path / "w", valkey.url, ("em", "z"))


@pytest.fixture
def feed(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Feed]:
    monkeypatch.setattr(feeds, "PERIOD_S", 0.05)
    found: Feed = create_app(world.runtime).extensions["backup-worker-feed"]
    yield found
    found.close()


class Listener:
    """Collects the topics of a stream in a thread."""

    def __init__(self, feed: Feed) -> None:
        stream = feed.listen()
        assert stream is not None
        self.topics: set[str] = set()
        self.ended = threading.Event()
        threading.Thread(target=self._run, args=(stream,), daemon=True).start()
        time.sleep(0.2)

    def _run(self, stream: Iterator[str]) -> None:
        for event in stream:
            if event.startswith("event: changed\ndata: "):
                self.topics |= set(event.split("data: ")[1].split())
        self.ended.set()


def change_incident(world: World) -> None:
    IncidentStore(world.runtime.redis).open("z", token="t", now=time.time(), reason="x", beat_mark="0-0")


CHANGES: dict[str, Callable[[World], object]] = {
    "incidents": change_incident,
    "alerts": lambda world: world.runtime.alert("low-disk", "warning", "x", "y"),
    "changes": lambda world: Publisher(world.runtime.redis).config_proposed("c1", "z", ["SOUL.md"], "em"),
    "fleet": lambda world: RecoveryService(world.runtime).pause("kari", "test"),
    "backups": lambda world: backups.by_hand(world.runtime, "z", "daily", now=time.time()),
    "history": lambda world: world.runtime.record("action", action="test"),
}


@pytest.mark.parametrize("topic", CHANGES)
def test_each_kind_of_change_is_told_under_its_topic(world: World, feed: Feed, topic: str) -> None:
    listener = Listener(feed)
    CHANGES[topic](world)
    until(lambda: topic in listener.topics)


def test_nothing_is_told_while_nothing_changes(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "BEATS_PERIOD_S", 60.0)
    listener = Listener(feed)
    time.sleep(0.5)
    assert listener.topics == set()


def test_many_windows_cost_redis_no_more_than_one(world: World, feed: Feed) -> None:
    client = world.runtime.redis

    def connections() -> int:
        return int(client.info("clients")["connected_clients"])

    first = Listener(feed)
    until(lambda: feed.listeners == 1)
    alone = connections()
    others = [Listener(feed) for _ in range(10)]
    assert connections() <= alone
    world.runtime.record("action", action="test")
    until(lambda: all("history" in one.topics for one in [first, *others]))


def test_there_are_no_more_streams_than_threads_for_them(feed: Feed) -> None:
    streams = [feed.listen() for _ in range(feeds.MOST_STREAMS)]
    assert all(stream is not None for stream in streams)
    assert feed.listen() is None
    one = streams[0]
    assert one is not None
    next(one)
    one.close()  # type: ignore[attr-defined]
    assert feed.listen() is not None


def test_who_asks_for_the_head_alone_takes_no_stream_away(world: World) -> None:
    app = create_app(world.runtime)
    for _ in range(feeds.MOST_STREAMS + 1):
        assert app.test_client().head("/events").status_code == 200
    assert app.extensions["backup-worker-feed"].listeners == 0


def test_a_stream_ends_so_that_who_was_logged_out_hears_no_more(
    feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "STREAM_S", 0.3)
    listener = Listener(feed)
    assert listener.ended.wait(5)
    until(lambda: feed.listeners == 0)


def test_while_redis_is_away_the_streams_stay(valkey: ValkeyServer, world: World, feed: Feed) -> None:
    listener = Listener(feed)
    valkey.kill()
    world.runtime.config.schedule.history.parent.mkdir(parents=True, exist_ok=True)
    world.runtime.config.schedule.history.write_text("")
    until(lambda: "history" in listener.topics)
    assert not listener.ended.is_set()
    valkey.start()


def test_a_window_that_is_gone_gives_its_thread_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "SILENCE_S", 0.2)
    monkeypatch.setattr(feeds, "PERIOD_S", 0.1)
    with served(world) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
        connection.request("GET", "/events")
        answer = connection.getresponse()
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert answer.readline() == b"retry: 3000\n"
        connection.close()
        answer.close()
        # All streams can be had again and again.
        for _ in range(3 * feeds.MOST_STREAMS):
            other = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)

            def taken(other: http.client.HTTPConnection = other) -> bool:
                other.request("GET", "/events")
                found = other.getresponse()
                taken = found.status == 200
                if not taken:
                    found.read()
                return taken

            until(taken)
            other.close()


def test_events_need_a_login(world: World) -> None:
    world.users.add("kari", PASSWORD, role=VIEWER)
    app = create_app(world.runtime)
    assert Visitor(app).get("/events").status_code == 302


def test_the_console_ends_at_once_also_while_windows_listen(world: World) -> None:
    port = free_port()
    program = [sys.executable, "-m", "backup_worker", "console", "--config", str(world.config_dir),
               "--redis-url", world.url, "--listen", f"127.0.0.1:{port}"]  # fmt: skip
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)

        def listening() -> bool:
            try:
                connection.request("GET", "/events")
            except OSError:
                connection.close()
                return False
            return True

        until(listening)
        answer = connection.getresponse()
        answer.readline()
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=15)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert time.monotonic() - begun < 5
    assert "Traceback" not in err
