"""The EM's side of the bus: publish agent states and config changes.

Promise: when a call returns, its event stands on its stream exactly once, also if the reply to an attempt was lost,
and behind Sentinel also if another server is the primary by then (see `replicas`). While Redis is away the call tries
again, with growing pauses, for `patience_s`; then it raises `RedisUnavailable`, and whether the last attempt arrived is
unknown. A refusal (wrong password, missing right) is raised at once.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Final, Self

import redis

from em_bridge import clock, streams
from em_bridge.connection import as_client, patiently, translate_errors
from em_bridge.errors import InvalidEvent
from em_bridge.events import AgentState, ConfigApplied, ConfigApproved, ConfigProposed, ConfigRejected, Event

BATCH: Final = 1000
BATCH_BYTES: Final = 4 * 1024 * 1024


class Publisher:
    """Publishes events through `url_or_client` (default `$REDIS_URL`); `patience_s` is how long a call keeps trying.

    Safe for several threads. Each method returns the id of the stream entry and raises `InvalidEvent` if an argument
    breaks the contract, `RedisUnavailable` after `patience_s`, `RedisRefused` at once.
    """

    def __init__(self, url_or_client: str | redis.Redis | None = None, *, patience_s: float = 30.0) -> None:
        self._owned = url_or_client is None or isinstance(url_or_client, str)
        self._client = as_client(url_or_client, retrying=False)
        self._patience_s = patience_s
        # The marker must outlive the last attempt of a call by far; afterwards nobody asks for it.
        self._ttl_s = max(60.0, 4 * patience_s)

    def agent_state(
        self,
        agent: str,
        state: str,
        *,
        reason: str = "",
        at: float | None = None,
        incarnation: str | None = None,
    ) -> str:
        """Say that `agent` is `ALIVE`, `DEGRADED` or `DEAD`."""
        return self.publish(AgentState(agent, state, reason, _or_now(at), incarnation))

    def config_proposed(
        self,
        change: str,
        agent: str,
        paths: Sequence[str],
        by: str,
        *,
        reason: str = "",
        at: float | None = None,
        proposed: Mapping[str, bytes] | None = None,
    ) -> str:
        """Ask for a change of `agent`'s files; `proposed` maps a path to its new content."""
        return self.publish(ConfigProposed(change, agent, _listed(paths), by, reason, _or_now(at), proposed))

    def config_approved(
        self,
        change: str,
        by: str,
        *,
        reason: str = "",
        at: float | None = None,
        signature: str | bytes | None = None,
    ) -> str:
        """Say that `by` approves `change`."""
        return self.publish(ConfigApproved(change, by, reason, _or_now(at), signature))

    def config_rejected(
        self,
        change: str,
        by: str,
        *,
        reason: str = "",
        at: float | None = None,
        signature: str | bytes | None = None,
    ) -> str:
        """Say that `by` rejects `change`."""
        return self.publish(ConfigRejected(change, by, reason, _or_now(at), signature))

    def config_applied(
        self,
        change: str,
        agent: str,
        paths: Sequence[str],
        by: str = "",
        approved_by: str | None = None,
        *,
        reason: str = "",
        at: float | None = None,
    ) -> str:
        """Say that `change` now stands in `agent`'s files."""
        return self.publish(
            ConfigApplied(change, agent, _listed(paths), by, approved_by, reason, _or_now(at))
        )

    def publish(self, event: Event) -> str:
        """Append `event` to its stream, once; return the entry id."""
        once = uuid.uuid4().hex

        def attempt() -> str:
            with translate_errors(self._client):
                return streams.append_once(self._client, event, once=once, ttl_s=self._ttl_s)

        return patiently(attempt, self._patience_s)

    def publish_many(self, events: Iterable[Event]) -> list[str]:
        """Append `events` to their streams, in order and each once; return the entry ids.

        They go in batches, each all or none: if the call fails, the first ones may stand there.
        """
        found: list[str] = []
        every = iter(events)
        while batch := _batch(every):
            found += self._append(batch)
        return found

    def _append(self, events: Sequence[Event]) -> list[str]:
        once = uuid.uuid4().hex

        def attempt() -> list[str]:
            with translate_errors(self._client):
                return streams.append_all_once(self._client, events, once=once, ttl_s=self._ttl_s)

        return patiently(attempt, self._patience_s)

    def close(self) -> None:
        """Close the connections, if they are our own."""
        if self._owned:
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _listed(paths: Sequence[str]) -> tuple[str, ...]:
    if isinstance(paths, str):
        # Text is a sequence too, of its letters.
        raise InvalidEvent(
            f"“paths” is the text “{paths}”, not a list of paths", hint="write it as a list: [path]"
        )
    return tuple(paths)


def _or_now(at: float | None) -> float:
    return clock.now() if at is None else at


def _batch(events: Iterator[Event]) -> list[Event]:
    """Take the next events, bounded in number and, as the largest are a mebibyte each, in size."""
    batch: list[Event] = []
    size = 0
    for event in events:
        batch.append(event)
        size += _large(event)
        if len(batch) >= BATCH or size >= BATCH_BYTES:
            break
    return batch


def _large(event: Event) -> int:
    proposed = getattr(event, "proposed", None) or {}
    return len(getattr(event, "payload", b"")) + sum(len(content) for content in proposed.values())
