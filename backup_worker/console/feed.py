"""What changed, told to every open page: server-sent events from one reader, however many windows are open.

A stream holds one of the server's threads, so there are at most `MOST_STREAMS` (the server has that many threads more
than it needs for pages); a page that gets none asks again every few seconds by itself, as every page does without
events. A stream says only which topics changed, never what: the page then asks for itself, with its own rights. It
ends after `STREAM_S`, so that who was logged out stops hearing, and at once when the console ends. The reader runs
only while somebody listens.
"""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import redis.exceptions
from flask import Blueprint, Flask, Response, abort, current_app, g, request

from backup_worker import alerts
from backup_worker.console.shelf import stamp
from backup_worker.queueing import due
from backup_worker.recovery import breakers
from backup_worker.recovery.incident import IncidentStore
from backup_worker.snapshots import Repository
from em_bridge import clock, streams
from em_bridge.monitor import read_states

if TYPE_CHECKING:
    from redis import Redis

    from backup_worker.console.live import Live

log = logging.getLogger(__name__)

blueprint = Blueprint("live", __name__)

MOST_STREAMS = 24
STREAM_S = 300.0
SILENCE_S = 10.0
"""After so long without news a comment is sent: a window that is gone is noticed by that."""

PERIOD_S = 1.0
BEATS_PERIOD_S = 5.0

FLEET, BACKUPS, INCIDENTS, CHANGES, ALERTS, MESSAGES, HISTORY, BEATS = (
    "fleet", "backups", "incidents", "changes", "alerts", "messages", "history", "beats",
)  # fmt: skip
_STREAMS = {
    streams.CONFIG_CHANGE: CHANGES, streams.MESSAGES: MESSAGES, streams.DEAD_LETTER: MESSAGES,
    streams.AGENT_STATE: FLEET, due.STREAM: MESSAGES,
}  # fmt: skip


class Feed:
    """Topics with a number that grows with every change."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._news = threading.Condition()
        self._versions: dict[str, int] = {}
        self._listeners = 0
        self._reader: threading.Thread | None = None
        self._closed = threading.Event()

    def listen(self) -> Iterator[str] | None:
        """Return a stream of events in the form of `text/event-stream`; None if there are too many."""
        with self._news:
            if self._listeners >= MOST_STREAMS or self._closed.is_set():
                return None
            if self._reader is None or not self._reader.is_alive():
                # Looked at before the stream is open: whatever comes behind that is told.
                self._reader = threading.Thread(
                    target=self._read, args=(self._look(),), name="feed", daemon=True
                )
                self._reader.start()
            self._listeners += 1
        return self._stream()

    def close(self) -> None:
        """End every stream. Safe in a signal handler: it takes no lock."""
        self._closed.set()

    @property
    def listeners(self) -> int:
        """How many streams are open."""
        return self._listeners

    def _stream(self) -> Iterator[str]:
        try:
            with self._news:
                seen = dict(self._versions)
            end = said = clock.monotonic()
            end += STREAM_S
            yield "retry: 3000\n\n"
            while not self._closed.is_set() and clock.monotonic() < end:
                with self._news:
                    if self._versions == seen:
                        self._news.wait(PERIOD_S)
                    now = dict(self._versions)
                new = {topic for topic, version in now.items() if seen.get(topic) != version}
                seen = now
                if new:
                    yield f"event: changed\ndata: {' '.join(sorted(new))}\n\n"
                elif clock.monotonic() - said < SILENCE_S:
                    continue
                else:
                    yield ": nothing new\n\n"
                said = clock.monotonic()
        finally:
            with self._news:
                self._listeners -= 1

    def _read(self, before: dict[str, int]) -> None:
        """Look every second, until nobody listens."""
        beats_at = clock.monotonic()
        while not self._closed.wait(PERIOD_S):
            with self._news:
                if not self._listeners:
                    self._reader = None
                    return
            now = self._look()
            changed = {topic for topic, mark in now.items() if before.get(topic, mark) != mark}
            before = now
            if clock.monotonic() - beats_at >= BEATS_PERIOD_S:
                changed.add(BEATS)
                beats_at = clock.monotonic()
            if changed:
                with self._news:
                    for topic in changed:
                        self._versions[topic] = self._versions.get(topic, 0) + 1
                    self._news.notify_all()

    def _look(self) -> dict[str, int]:
        """Return a mark of each topic, which differs if anything in it did."""
        config, problem = self._live.config()
        found: dict[str, list[Any]] = {FLEET: [problem], MESSAGES: []}
        found[HISTORY] = [_stamp(config.schedule.history)]
        found[BACKUPS] = [stamp(Repository(config.schedule.repository))]
        if self._live.client is not None:
            try:
                _ask(self._live.client, found)
            except redis.exceptions.RedisError as error:
                found[FLEET].append(type(error).__name__)
        return {topic: zlib.crc32(repr(marks).encode()) for topic, marks in found.items()}


def _ask(client: Redis, found: dict[str, list[Any]]) -> None:
    for name, topic in _STREAMS.items():
        found.setdefault(topic, []).append(streams.last_id(client, name))
    found[ALERTS] = [alerts.open_alerts(client)]
    found[INCIDENTS] = [(one.id, one.version) for one in IncidentStore(client).open_incidents()]
    # A state is rewritten with every beat; only this much of it says how the agent is.
    states = read_states(client)
    found[FLEET] += [(name, one.get("state"), one.get("since")) for name, one in sorted(states.items())]
    found[FLEET].append(breakers.stored(client))


def _stamp(path: Any) -> tuple[int, int] | None:
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_mtime_ns, info.st_size


@blueprint.get("/events")
def events() -> Response:
    """Tell the page which topics change, as long as it listens."""
    if request.method == "HEAD":
        # Nobody would read the stream, so nobody would end it either.
        return Response(content_type="text/event-stream")
    stream = feed().listen()
    if stream is None:
        g.retry_after_s = 5
        abort(503, "as many windows as can be served listen already; this page asks by itself")
    return Response(stream, content_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


def feed() -> Feed:
    """Return the application's feed."""
    found: Feed = current_app.extensions["backup-worker-feed"]
    return found


def mount(app: Flask, live: Live) -> Feed:
    """Add the stream of events to `app`."""
    made = app.extensions["backup-worker-feed"] = Feed(live)
    app.register_blueprint(blueprint)
    return made
