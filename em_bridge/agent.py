"""An agent's side of the bus: beat, send, receive.

Promise: what `send` has returned a number for reaches the log exactly once and in order, through crashes of this
process and of Redis, as long as the outbox file survives. What `receive` returns is handed out again after a crash
until it is acknowledged, and never after. While Redis is away all of it works except that nothing arrives; reconnecting
is automatic, nothing spins, and the log has one line a change of state.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from types import TracebackType
from typing import Final, Self

import redis

from em_bridge import clock
from em_bridge.connection import connect
from em_bridge.errors import AgentBackupError
from em_bridge.events import Message
from em_bridge.inbox import Inbox
from em_bridge.messages import append_batch, check_message
from em_bridge.outbox import DEFAULT_LIMIT_BYTES, KEEP_S, Outbox, Outgoing
from em_bridge.pulse import Pulse
from em_bridge.reach import Reach

log = logging.getLogger(__name__)

FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 2.0
DRAIN_S: Final = 2.0
"""How long `close` waits for what was sent last, if Redis is there; the rest leaves with the next start."""
CLOSE_S: Final = 10.0


class Agent:
    """The agent `name` on the bus at `url` (default `$REDIS_URL`), with its durable queue in the file `outbox`.

    A context manager. `send` may be called from any thread; `receive` and `ack` from one thread at a time. Opening
    works with Redis away. Raises `UsageError` for a wrong url, `InvalidEvent` for a wrong name, and
    `AgentBackupError` if the outbox is in use, belongs to another agent or is damaged.
    """

    def __init__(
        self,
        name: str,
        url: str | None = None,
        *,
        outbox: str | os.PathLike[str],
        heartbeat_s: float = 1.0,
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
    ) -> None:
        self.name = name
        self._client = connect(url, retrying=False)
        # Beats must not wait behind a large batch or a blocking read, so they have a client of their own.
        self._beat_client = connect(url, retrying=False)
        self._pulse = Pulse(self._beat_client, name, interval_s=heartbeat_s)
        self._outbox_path = outbox
        self._limit_bytes = limit_bytes
        self._outbox: Outbox | None = None
        self._inbox: Inbox | None = None
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._sender = threading.Thread(target=self._send_all, name=f"sender-{name}", daemon=True)

    @property
    def incarnation(self) -> str:
        """The unique name of this process start, as in its heartbeats."""
        return self._pulse.incarnation

    @property
    def status(self) -> str:
        """What the next heartbeats say; anything but `ok` makes the agent DEGRADED."""
        return self._pulse.status

    @status.setter
    def status(self, status: str) -> None:
        self._pulse.status = status

    def open(self) -> None:
        """Take the outbox and begin to beat and to send; `with` does this."""
        self._outbox = Outbox(self._outbox_path, self.name, limit_bytes=self._limit_bytes)
        self._inbox = Inbox(self._client, self.name, self._outbox)
        self._pulse.start()
        self._sender.start()

    def send(self, to: str, payload: bytes) -> int:
        """Store one message for `to` and return its number; it leaves in the background.

        The number is this outbox's: should the server prove to be ahead (the outbox is new, or restored from a
        backup), the message leaves under a higher one. Raises `InvalidEvent` (wrong recipient, payload not bytes or
        too large) and `OutboxFull`; then nothing was stored.
        """
        check_message(self.name, to, payload)
        seq = self._opened().put(to, bytes(payload))
        self._wake.set()
        return seq

    def receive(self, timeout_s: float = 0.0) -> Message | None:
        """Return the next message, or None if none came within `timeout_s`, also while Redis is away."""
        self._opened()
        assert self._inbox is not None
        return self._inbox.receive(timeout_s)

    def ack(self, message: Message) -> None:
        """Note, durably, that `message` and those before it from the same sender are dealt with.

        Works while Redis is away: this agent will not be handed the message again.
        """
        self._opened()
        assert self._inbox is not None
        self._inbox.ack(message)

    def last_seen(self, sender: str) -> int:
        """Return the number of the last message from `sender` that was acknowledged; 0 if there was none."""
        return self._opened().last_seen(sender)

    def waiting(self) -> int:
        """Return how many messages still wait to be sent."""
        return self._opened().waiting()

    def close(self) -> None:
        """Stop beating and sending; what could not be sent stays in the outbox."""
        if self._outbox is None:
            return
        self._stop.set()
        self._wake.set()
        self._sender.join(CLOSE_S)
        self._pulse.stop()
        assert self._inbox is not None
        self._inbox.close()
        self._outbox.close()
        self._outbox = None
        for client in (self._client, self._beat_client):
            with contextlib.suppress(redis.RedisError, OSError):
                client.close()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _opened(self) -> Outbox:
        if self._outbox is None:
            raise AgentBackupError(
                f"the agent “{self.name}” is not open", hint="use it as `with Agent(…) as me:`"
            )
        return self._outbox

    def _send_all(self) -> None:
        outbox = self._opened()
        assert self._inbox is not None
        inbox = self._inbox
        drain = _Drain(self._client, self.name, outbox)
        reach = Reach(f"messages of {self.name}", "they are kept in the outbox")
        pause_s = FIRST_PAUSE_S
        stop_at: float | None = None
        prepared = False
        while True:
            self._wake.clear()
            if self._stop.is_set():
                stop_at = stop_at or clock.monotonic() + DRAIN_S
                if reach.away or clock.monotonic() > stop_at:
                    return
            try:
                if not prepared:
                    # Also for an agent that only sends: a replay must know what it has.
                    inbox.prepare()
                    prepared = True
                more = drain.step()
                reach.back()
                pause_s = FIRST_PAUSE_S
                if more:
                    continue
                if self._stop.is_set():
                    return
                self._wake.wait(KEEP_S if outbox.forget_old() else None)
            except (redis.RedisError, OSError, AgentBackupError) as error:
                reach.lost(error, self._client)
                drain.interrupted()
                self._stop.wait(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


class _Drain:
    """Moves one batch after the other from the outbox to the log."""

    def __init__(self, client: redis.Redis, name: str, outbox: Outbox) -> None:
        self._client = client
        self._name = name
        self._outbox = outbox
        self._confirmed: dict[str, int] = {}
        self._repeat_kept = True

    def interrupted(self) -> None:
        """Note that the server may have been restarted, and may have lost its last second."""
        self._repeat_kept = True

    def step(self) -> bool:
        """Send one batch; True if there was something to do, and may be more."""
        if self._repeat_kept:
            self._outbox.send_again()
            self._repeat_kept = False
        batch = self._outbox.batch()
        if not batch:
            return False
        # The server may also have been restarted without any call noticing: then it has less than it confirmed.
        confirmed = self._confirmed | self._outbox.confirmed()
        answer = append_batch(self._client, self._name, batch, confirmed)
        if answer.word == "lost":
            self._lost(answer.line, answer.last)
            return True
        sent = batch[: answer.done]
        self._outbox.acknowledge(sent)
        self._note(sent)
        if answer.word == "behind":
            log.warning(
                "messages of %s: number %d was used before; what waits is numbered anew above %d",
                self._name,
                batch[answer.done].seq,
                answer.last,
            )
            self._outbox.renumber(batch[answer.done].seq, answer.last)
        self._outbox.forget_old()
        return True

    def _note(self, sent: list[Outgoing]) -> None:
        # Only this process's own line is remembered beyond the outbox's keeping.
        own = [item.seq for item in sent if item.line == self._outbox.line]
        if own:
            self._confirmed[self._outbox.line] = own[-1]

    def _lost(self, line: str, last: int) -> None:
        """The server has lost what it had confirmed after number `last` of `line`: repeat what is kept."""
        again = self._outbox.send_again()
        missing = self._confirmed.pop(line, last) - last - again
        log.warning(
            "messages of %s: the server lost some after number %d; %d are sent again", self._name, last, again
        )
        if missing > 0:
            log.error(
                "messages of %s: up to %d of them left the outbox long ago, and are lost", self._name, missing
            )
