"""Which streams are not read for now, because the queue that their events go to is full.

Promise: the jobs that wait are bounded, whatever the workers do; what is not read stays on its stream, safe, and shows
as lag. The limit is soft by what dispatchers have just read (a batch each).

A stream whose events go to one queue is held at the limit. One whose events go to several is held at `WIDE` times the
limit of a queue that is not its main one: recoveries must not wait for a backlog of backups, but memory has an end too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from backup_worker import due, queues
from em_bridge import streams
from em_bridge.scripts import Script

if TYPE_CHECKING:
    from redis import Redis

WIDE = 10
HELD_AT: Mapping[str, Mapping[str, int]] = {
    streams.CONFIG_CHANGE: {queues.BACKUP: 1},
    streams.AGENT_STATE: {queues.RECOVERY: 1, queues.MAINTENANCE: WIDE},
    due.STREAM: {queues.RECOVERY: WIDE, queues.BACKUP: WIDE, queues.MAINTENANCE: WIDE},
}
"""Stream -> kind of queue -> at how many times the limit of jobs the stream is held."""

# The queues of all hosts count together. A name that is no queue of ours is somebody else's.
_LENGTHS = Script("""
local found = {}
for _, key in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local name = string.match(key, '^rq:queue:(.+)$')
  if name and redis.call('TYPE', key).ok == 'list' then
    found[#found + 1] = name
    found[#found + 1] = redis.call('LLEN', key)
  end
end
return found
""")


def lengths(client: Redis) -> dict[str, int]:
    """Return how many jobs wait in each queue, those of single hosts included."""
    flat = _LENGTHS(client, ("rq:queues",))
    found = {
        bytes(name).decode(errors="replace"): int(n) for name, n in zip(flat[::2], flat[1::2], strict=True)
    }
    return dict.fromkeys(queues.QUEUES, 0) | {
        name: count for name, count in sorted(found.items()) if queues.kind(name) in queues.QUEUES
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
