"""The message log out of Redis into files (see `logfile`).

Promise: a commit holds the log up to an entry together with the senders' numbers as of that very entry, so that after
an import no sender repeats a message or leaves one out. The live log is only read: files that were restored from a
backup are continued from where they end. What redis-py raises, and `OSError` for a full disk, pass through; then
nothing is committed, and the next `step` of a new `Exporter` goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast

import redis

from em_bridge import clock, logfile, streams
from em_bridge.errors import InvalidEvent
from em_bridge.events import Message, decode
from em_bridge.inbox import DECLARED, last_seen_key
from em_bridge.logfile import Entry, Known, LogFiles
from em_bridge.messages import sender_key
from em_bridge.replay import routed_up_to, text, unacknowledged
from em_bridge.router import delivered_key, known_agents
from em_bridge.streams import MESSAGES

log = logging.getLogger(__name__)

BATCH: Final = 1000
AGENTS_S: Final = 5.0
"""How often it is looked up what the agents have dealt with."""


class Exporter:
    """Continues the export in `folder`; `step` brings it up to date. `retention_s` is how old its entries may get."""

    def __init__(
        self,
        client: redis.Redis,
        folder: Path,
        *,
        retention_s: float | None = None,
        limit_bytes: int = logfile.LIMIT_BYTES,
    ) -> None:
        self._client = client
        self._retention_s = retention_s
        self._files = LogFiles(folder, limit_bytes=limit_bytes)
        self._agents_at: float | None = None
        self._lost = False

    def step(self) -> int:
        """Export what is new; return how many messages."""
        view = _View(self._client, self._files.position, set(self._files.known.senders))
        now = clock.monotonic()
        if self._server_lost_messages():
            # Its router and agents start from nothing, which must not replace what they had: it is for the import.
            view.keep(self._files.known)
        elif self._agents_at is None or now - self._agents_at >= AGENTS_S:
            view.look_at_agents()
            self._agents_at = now
        count = 0
        try:
            for batch in view.batches():
                self._files.append(batch)
                count += len(batch)
            oldest = "0-0"
            if self._retention_s is not None:
                oldest = streams.id_at(streams.server_time(self._client) - self._retention_s)
            self._files.commit(*view.finish(), older_than=oldest)
        except BaseException:
            # What was written without a commit must not stand before the next batch.
            self._files.close()
            raise
        return count

    def _server_lost_messages(self) -> bool:
        """Say whether the server knows of less than was exported; said once in the log."""
        known = self._files.known.senders
        with self._client.pipeline(transaction=False) as pipe:
            for name in known:
                pipe.hget(sender_key(name), "last")
            answers = pipe.execute()
        lost = any(
            int(answer or 0) < fields.get("last", 0)
            for answer, fields in zip(answers, known.values(), strict=True)
        )
        if lost and not self._lost:
            log.error("redis has lost messages that the export holds; `em-bridge import` brings them back")
        self._lost = lost
        return lost

    def close(self) -> None:
        """Let others continue the export."""
        self._files.close()


def export_file(client: redis.Redis, path: Path) -> int:
    """Write the whole log into the file `path`, which appears at once; return how many messages."""
    view = _View(client, "0-0", set())
    view.look_at_agents()
    count = 0

    def counted() -> Iterator[list[Entry]]:
        nonlocal count
        for batch in view.batches():
            count += len(batch)
            yield batch

    logfile.write_file(path, counted(), view.finish)
    return count


class _View:
    """The log behind `position`, with the senders' numbers as of its last entry, and what each agent has."""

    def __init__(self, client: redis.Redis, position: str, senders: set[str]) -> None:
        self._client = client
        self._position = position
        self._names = senders
        self._known = Known(routed=routed_up_to(client) or "0-0")

    def keep(self, known: Known) -> None:
        """Leave it at what was known of agents and router."""
        self._known.routed = known.routed

    def look_at_agents(self) -> None:
        """Note what each agent has; before the log is read, as no agent may have what the log does not hold yet."""
        self._known.agents = _what_agents_have(self._client)

    def batches(self) -> Iterator[list[Entry]]:
        """Yield the entries; afterwards `finish` is about the last of them."""
        while streams.id_order(streams.last_id(self._client, MESSAGES)) > streams.id_order(self._position):
            self._known.senders, last = self._look()
            before = set(self._names)
            yield from self._read(last)
            self._position = last
            if before == self._names:
                return
            # A sender we had not heard of: look again, or its number would be of another moment.
            self._known.senders, last = self._look()
            if last == self._position:
                return

    def finish(self) -> tuple[str, Known]:
        """Return up to where the log was read, and what was known then."""
        return self._position, self._known

    def _look(self) -> tuple[dict[str, dict[str, int]], str]:
        """Read the senders' numbers and the end of the log in one moment."""
        names = sorted(self._names)
        with self._client.pipeline(transaction=True) as pipe:
            for name in names:
                pipe.hgetall(sender_key(name))
            pipe.xrevrange(MESSAGES, count=1)
            *hashes, newest = pipe.execute()
        numbers = {
            name: {text(key): int(value) for key, value in fields.items()}
            for name, fields in zip(names, hashes, strict=True)
            if fields
        }
        return numbers, text(newest[0][0]) if newest else self._position

    def _read(self, last: str) -> Iterator[list[Entry]]:
        batch: list[Entry] = []
        size = 0
        for entry, fields in streams.read_range(self._client, MESSAGES, f"({self._position}", last):
            message = _message(fields)
            if message is None:
                continue
            self._names.add(message.sender)
            batch.append(Entry(entry, fields[b"type"], fields[b"body"]))
            size += len(fields[b"body"])
            if len(batch) >= BATCH or size >= logfile.BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


def _what_agents_have(client: redis.Redis) -> dict[str, dict[str, Any]]:
    names = sorted(known_agents(client))
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.hgetall(last_seen_key(name))
            pipe.hgetall(delivered_key(name))
        answers = cast(list[dict[bytes, bytes]], pipe.execute())
    found: dict[str, dict[str, Any]] = {}
    for name, published, delivered in zip(names, answers[::2], answers[1::2], strict=True):
        if published:
            has = {text(key): int(value) for key, value in published.items() if text(key) != DECLARED}
        else:
            # It does not say what it has: what was delivered and does not wait in its inbox.
            has = {text(sender): int(value.split(b" ")[0]) for sender, value in delivered.items()}
            for message in unacknowledged(client, streams.inbox(name)):
                has[message.sender] = min(has.get(message.sender, message.seq), message.seq - 1)
        found[name] = {"declared": bool(published), "has": has}
    return found


def _message(fields: streams.Fields) -> Message | None:
    try:
        event = decode(fields, stream=MESSAGES)
    except InvalidEvent:
        # It is, or becomes, a dead letter, with its fields.
        return None
    assert isinstance(event, Message)
    return event
