"""Receiving: an agent's inbox, read as a consumer group, without a message handed out twice or out of order.

Promise: messages are returned in the inbox's order; what an earlier process received and did not acknowledge comes
first; what the agent has dealt with (`last_seen` in its outbox file) is dropped. `ack` writes `last_seen` before it
tells the server, so that a crash between the two repeats nothing. While Redis is away `receive` waits and returns None.

The agent's `last_seen` is also published, in the hash `em:last-seen:<agent>`: a replay reads it to know what the agent
has, also after its files were restored from a backup.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import replace
from typing import Any, Final, cast

import redis

from em_bridge import clock, streams
from em_bridge.connection import MAX_BLOCK_S
from em_bridge.errors import InvalidEvent
from em_bridge.events import Message, decode, encode
from em_bridge.outbox import Outbox
from em_bridge.reach import Reach
from em_bridge.streams import INBOX_GROUP, Fields

log = logging.getLogger(__name__)

BATCH: Final = 100
PAUSE_S: Final = 0.2
DECLARED: Final = "-"
"""A key of `em:last-seen:<agent>` that is no agent id: the agent says what it has, even if that is nothing."""


def last_seen_key(agent: str) -> str:
    """Return the hash in which an agent publishes, per sender, the number it has dealt with."""
    return f"em:last-seen:{agent}"


def opened(client: redis.Redis, stream: str, entry: str, fields: Fields) -> Message | None:
    """Return the message that stands in an inbox as `entry`; of what is none make a dead letter, and return None.

    Only a foreign writer can have put that there: the router checks.
    """
    try:
        event = decode(fields, stream=stream)
    except InvalidEvent as problem:
        letter = streams.dead_letter(stream, entry, problem.message, fields, clock.now())
        log.warning("%s: %s is a dead letter: %s", stream, entry, problem.message)
        pipe = client.pipeline(transaction=True)
        pipe.xadd(letter.stream, cast(Any, encode(letter)))
        pipe.xack(stream, INBOX_GROUP, entry)
        pipe.execute()
        return None
    assert isinstance(event, Message)
    return replace(event, entry=entry)


class Inbox:
    """The inbox of `agent`; `outbox` keeps what it has seen."""

    def __init__(self, client: redis.Redis, agent: str, outbox: Outbox) -> None:
        self._client = client
        self._agent = agent
        self._stream = streams.inbox(agent)
        self._outbox = outbox
        self._seen = outbox.all_last_seen()
        self._handed: dict[str, int] = {}
        self._fetched: deque[Message] = deque()
        self._known: set[str] = set()
        # By sender: number and entry of what was handed out, or came twice, and is not acknowledged.
        self._open: dict[str, list[tuple[int, str]]] = {}
        self._to_ack: list[str] = []
        self._ready = False
        self._pending_from = "0"
        self._lock = threading.RLock()
        self._reach = Reach(f"inbox of {agent}")

    def prepare(self) -> None:
        """Make the inbox, and publish what this agent has; done once a connection. May raise what redis-py raises."""
        with self._lock:
            if not self._ready:
                streams.ensure_group(self._client, self._stream, INBOX_GROUP)
                self._publish_seen()
                self._ready = True

    def receive(self, timeout_s: float) -> Message | None:
        """Return the next message, or None after `timeout_s`."""
        deadline = clock.monotonic() + timeout_s
        while True:
            message = self._next_fetched()
            if message is not None:
                return message
            left_s = deadline - clock.monotonic()
            try:
                found = self._fetch(max(0.0, left_s))
                self._reach.back()
            except (redis.RedisError, OSError) as error:
                self._interrupted(error)
                found = 0
                if left_s > 0:
                    clock.sleep(min(PAUSE_S, left_s))
            if not found and clock.monotonic() >= deadline:
                return None

    def ack(self, message: Message) -> None:
        """Note that `message`, and those before it from its sender, are dealt with."""
        self._outbox.note_seen(message.sender, message.seq)
        with self._lock:
            seen = self._seen[message.sender] = max(message.seq, self._seen.get(message.sender, 0))
            mine = self._open.pop(message.sender, [])
            self._to_ack += [entry for seq, entry in mine if seq <= seen]
            if left := [(seq, entry) for seq, entry in mine if seq > seen]:
                self._open[message.sender] = left
        try:
            self._tell()
        except (redis.RedisError, OSError) as error:
            self._interrupted(error)

    def close(self) -> None:
        """Tell the server what it does not know yet, if it is there."""
        if self._to_ack and not self._reach.away:
            try:
                self._tell()
            except (redis.RedisError, OSError) as error:
                self._interrupted(error)

    def _interrupted(self, error: Exception) -> None:
        self._reach.lost(error, self._client)
        with self._lock:
            # The lost reply may have held messages: they are pending now, and are read from there.
            self._ready = False
            self._pending_from = "0"

    def _next_fetched(self) -> Message | None:
        """Return the next message that this agent has neither dealt with nor been handed in this process."""
        with self._lock:
            while self._fetched:
                message = self._fetched.popleft()
                assert message.entry is not None
                if message.seq <= self._seen.get(message.sender, 0):
                    self._to_ack.append(message.entry)
                    continue
                self._open.setdefault(message.sender, []).append((message.seq, message.entry))
                if message.seq > self._handed.get(message.sender, 0):
                    self._handed[message.sender] = message.seq
                    return message
        return None

    def _fetch(self, timeout_s: float) -> int:
        """Fetch messages, pending ones first; return how many entries were looked at."""
        self.prepare()
        self._tell()
        if self._pending_from:
            rows = self._read(self._pending_from, None)
            self._pending_from = rows[-1][0] if rows else ""
            return self._take(rows) or 1
        block_ms = int(min(timeout_s, MAX_BLOCK_S) * 1000)
        return self._take(self._read(">", block_ms or None))

    def _read(self, start: str, block_ms: int | None) -> list[tuple[str, Fields | None]]:
        try:
            answer = cast(Any, self._client).xreadgroup(
                INBOX_GROUP, self._agent, {self._stream: start}, count=BATCH, block=block_ms
            )
        except redis.ResponseError as error:
            if "NOGROUP" in str(error):
                # The server came back without its data.
                self._ready = False
                return []
            raise
        return [(raw_id.decode(), fields or None) for raw_id, fields in answer[0][1]] if answer else []

    def _take(self, rows: list[tuple[str, Fields | None]]) -> int:
        with self._lock:
            for entry, fields in rows:
                if entry not in self._known:
                    self._take_one(entry, fields)
        return len(rows)

    def _take_one(self, entry: str, fields: Fields | None) -> None:
        if fields is None:
            log.warning("inbox of %s: the message %s was deleted before it was received", self._agent, entry)
            self._to_ack.append(entry)
            return
        message = opened(self._client, self._stream, entry, fields)
        if message is not None:
            self._known.add(entry)
            self._fetched.append(message)

    def _tell(self) -> None:
        """Acknowledge to the server what is dealt with."""
        with self._lock:
            entries, self._to_ack = self._to_ack, []
            seen = dict(self._seen)
        if not entries:
            return
        try:
            pipe = self._client.pipeline(transaction=True)
            if seen:
                pipe.hset(last_seen_key(self._agent), mapping=cast(Any, seen))
            pipe.xack(self._stream, INBOX_GROUP, *entries)
            pipe.execute()
        except BaseException:
            with self._lock:
                self._to_ack = entries + self._to_ack
            raise
        with self._lock:
            self._known.difference_update(entries)

    def _publish_seen(self) -> None:
        """Replace what the server thinks this agent has by what it has: its files may come from a backup."""
        pipe = self._client.pipeline(transaction=True)
        pipe.delete(last_seen_key(self._agent))
        pipe.hset(last_seen_key(self._agent), mapping=cast(Any, {DECLARED: 0, **self._seen}))
        pipe.execute()
