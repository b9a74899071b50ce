"""Which streams are not read for now, because the queue that their events go to is full.

Promise: the jobs that wait are bounded, whatever the workers do; what is not read stays on its stream, safe, and shows
as lag. The limit is soft by what dispatchers have just read (a batch each).

A stream whose events go to one queue is held at the limit. One whose events go to several is held at `WIDE` times the
limit of a queue that is not its main one: recoveries must not wait for a backlog of backups, but memory has an end too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from backup_worker import due, queues
from em_bridge import streams

if TYPE_CHECKING:
    from redis import Redis

WIDE = 10
HELD_AT: Mapping[str, Mapping[str, int]] = {
    streams.CONFIG_CHANGE: {queues.BACKUP: 1},
    streams.AGENT_STATE: {queues.RECOVERY: 1, queues.MAINTENANCE: WIDE},
    due.STREAM: {queues.RECOVERY: WIDE, queues.BACKUP: WIDE, queues.MAINTENANCE: WIDE},
}
"""Stream -> kind of queue -> at how many times the limit of jobs the stream is held."""

_PREFIX = "rq:queue:"


def lengths(client: Redis) -> dict[str, int]:
    """Return how many jobs wait in each queue, those of single hosts included. Reads only."""
    known: Any = client.smembers("rq:queues")
    names = [
        raw.decode(errors="replace").removeprefix(_PREFIX) for raw in known if raw.startswith(b"rq:queue:")
    ]
    ours = sorted({*queues.QUEUES, *(name for name in names if queues.kind(name) in queues.QUEUES)})
    with client.pipeline(transaction=False) as pipeline:
        for name in ours:
            pipeline.llen(_PREFIX + name)
        found = dict(zip(ours, pipeline.execute(raise_on_error=False), strict=True))
    for answer in found.values():
        # What is no list is not RQ's; anything else is wrong with the server.
        if isinstance(answer, Exception) and "WRONGTYPE" not in str(answer):
            raise answer
    return dict.fromkeys(queues.QUEUES, 0) | {
        name: count for name, count in found.items() if isinstance(count, int)
    }


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
