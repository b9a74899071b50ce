"""Which streams are not read for now, because the queue that their events go to is full.

Promise: the jobs that wait are bounded, whatever the workers do; what is not read stays on its stream, safe, and shows
as lag. The limit is soft by what dispatchers have just read (a batch each).

A stream whose events go to one queue is held at the limit. One whose events go to several is held at `WIDE` times the
limit of a queue that is not its main one: recoveries must not wait for a backlog of backups, but memory has an end too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from backup_worker.queueing import due, queues
from em_bridge import streams

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import Pipeline

WIDE = 10
HELD_AT: Mapping[str, Mapping[str, int]] = {
    streams.CONFIG_CHANGE: {queues.BACKUP: 1},
    streams.AGENT_STATE: {queues.RECOVERY: 1, queues.MAINTENANCE: WIDE},
    due.STREAM: {queues.RECOVERY: WIDE, queues.BACKUP: WIDE, queues.MAINTENANCE: WIDE},
}
"""Stream -> kind of queue -> at how many times the limit of jobs the stream is held."""

_PREFIX = "rq:queue:"


def names(client: Redis) -> list[str]:
    """Return the names of the queues whose lengths count: ours, those of single hosts included. Reads only."""
    known: Any = client.smembers("rq:queues")
    found = (
        raw.decode(errors="replace").removeprefix(_PREFIX) for raw in known if raw.startswith(b"rq:queue:")
    )
    return sorted({*queues.QUEUES, *(name for name in found if queues.kind(name) in queues.QUEUES)})


def ask(pipeline: Pipeline, of: Sequence[str]) -> None:
    """Add the question for the lengths of the queues `of` to `pipeline`; see `told`."""
    for name in of:
        pipeline.llen(_PREFIX + name)


def told(of: Sequence[str], answers: Sequence[Any]) -> dict[str, int]:
    """Return how many jobs wait in each queue, from the answers to `ask`. Raises what is wrong with the server."""
    for answer in answers:
        # What is no list is not RQ's.
        if isinstance(answer, Exception) and "WRONGTYPE" not in str(answer):
            raise answer
    counted = zip(of, answers, strict=True)
    return dict.fromkeys(queues.QUEUES, 0) | {
        name: count for name, count in counted if isinstance(count, int)
    }


def lengths(client: Redis, of: Sequence[str] | None = None) -> dict[str, int]:
    """Return how many jobs wait in each queue (of those in `of`, if given). Reads only."""
    asked = names(client) if of is None else of
    with client.pipeline(transaction=False) as pipeline:
        ask(pipeline, asked)
        return told(asked, pipeline.execute(raise_on_error=False))


def held(waiting: Mapping[str, int], limit: int) -> dict[str, str]:
    """Return stream -> the kind of queue that holds it, when so many jobs wait in each queue. Pure."""
    by_kind = dict.fromkeys(queues.QUEUES, 0)
    for name, count in waiting.items():
        by_kind[queues.kind(name)] += count
    return {
        stream: kind
        for stream, limits in HELD_AT.items()
        for kind in [next((kind for kind, times in limits.items() if by_kind[kind] > limit * times), None)]
        if kind is not None
    }
