"""What is sent to the execution manager itself, where no program of its own reads that.

Promise: each message is said in the log before it is acknowledged, so that none waits for ever, and one that came while
this process was killed is said again by the next. What is no message becomes a dead letter. What redis-py raises passes
through; the next `step` goes on.
"""

from __future__ import annotations

import logging
from typing import Any, Final, cast

import redis

from em_bridge import streams
from em_bridge.inbox import opened
from em_bridge.streams import INBOX_GROUP

log = logging.getLogger(__name__)

BATCH: Final = 100
SHOWN: Final = 200
"""How many characters of a message are shown; the log of messages has it all."""


class Letterbox:
    """The inbox of `name`, to be looked into now and then by one process at a time."""

    def __init__(self, client: redis.Redis, name: str) -> None:
        self._client = client
        self._name = name
        self._stream = streams.inbox(name)
        self._position = ""

    def step(self) -> int:
        """Say and acknowledge what is there, at most `BATCH` messages; return how many entries that were."""
        try:
            if not self._position:
                streams.ensure_group(self._client, self._stream, INBOX_GROUP)
                # First what a process before this one had read.
                self._position = "0"
            answer = cast(Any, self._client).xreadgroup(
                INBOX_GROUP, self._name, {self._stream: self._position}, count=BATCH
            )
        except redis.ResponseError as error:
            # The server came back without its data, or somebody has put another key there: the router says so.
            if "NOGROUP" not in str(error) and "WRONGTYPE" not in str(error):
                raise
            self._position = ""
            return 0
        rows = answer[0][1] if answer else []
        if not rows:
            self._position = ">"
            return 0
        for raw_id, fields in rows:
            # One that was deleted meanwhile has none.
            if fields:
                self._say(raw_id.decode(), fields)
        self._client.xack(self._stream, INBOX_GROUP, *(raw_id for raw_id, _ in rows))
        return len(rows)

    def _say(self, entry: str, fields: streams.Fields) -> None:
        message = opened(self._client, self._stream, entry, fields)
        if message is not None:
            text = message.payload.decode(errors="replace")
            shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
            log.info("message %d from %s: %r", message.seq, message.sender, shown)
