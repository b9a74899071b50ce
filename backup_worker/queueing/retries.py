"""When a failed job runs again: which faults pass, how long to wait, how often.

Promise: a passing fault (Redis away, a busy file, a full table of processes) is tried again after growing pauses, a
killed worker's job at once, each a bounded number of times; a lasting one is not tried again. A job that waits is in
RQ's registry of scheduled jobs, where the dashboard shows it and may cancel it; but not RQ's scheduler moves it (its
lock can be stuck for minutes): `wake` does, in one script, called by every dispatcher. Of many callers one moves it,
and a crash leaves it either waiting or in its queue.
"""

from __future__ import annotations

import errno
import sqlite3
from typing import TYPE_CHECKING

import redis.exceptions
from rq.exceptions import AbandonedJobError

from em_bridge import connection
from em_bridge.errors import AgentBackupError
from em_bridge.scripts import Script

if TYPE_CHECKING:
    from redis import Redis

PAUSES_S = (1.0, 5.0, 20.0, 60.0, 300.0)
"""How long a job waits after its first, second… failure by a passing fault; behind the last it fails for good."""

RUNS_OF_KILLED = 3
"""How often a job whose worker was killed is run again: fewer, because it may be what kills its workers."""

_PASSING_ERRNO = frozenset(
    {
        errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ETXTBSY, errno.ESTALE, errno.ETIMEDOUT,
        errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EDEADLK, errno.ENOLCK,
    }
)  # fmt: skip
"""What another try may find mended by itself. Not a full disk: writing again would only keep it full."""

_PASSING_SQLITE = ("SQLITE_BUSY", "SQLITE_LOCKED")


def is_passing(error: BaseException) -> bool:
    """Return whether the same job may succeed when it is run again with nothing changed by anybody."""
    if isinstance(error, redis.exceptions.RedisError):
        error = connection.translate(error) or error
    match error:
        case AgentBackupError():
            # Errors of ours may stand for one of the system, and say so by their cause.
            cause = error.__cause__
            return error.retryable or (isinstance(cause, OSError | sqlite3.Error) and is_passing(cause))
        case OSError():
            return error.errno in _PASSING_ERRNO
        case sqlite3.OperationalError():
            return str(getattr(error, "sqlite_errorname", "")).startswith(_PASSING_SQLITE)
    return isinstance(error, AbandonedJobError)


def pause_before_next(error: BaseException, tries_left: int) -> float | None:
    """Return after how many seconds a job that failed by `error` runs again, None for never. Pure.

    `tries_left` is what is left of the `len(PAUSES_S)` that a job gets.
    """
    used = len(PAUSES_S) - min(tries_left, len(PAUSES_S))
    if tries_left <= 0 or not is_passing(error):
        return None
    if isinstance(error, AbandonedJobError):
        return 0.0 if used < RUNS_OF_KILLED else None
    return PAUSES_S[used]


# Only what still says that it waits: it may have been cancelled, or be gone.
_WAKE = Script("""
local moved = 0
for _, name in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local queue = string.match(name, '^rq:queue:(.+)$')
  if queue then
    local waiting = 'rq:scheduled:' .. queue
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', waiting, '-inf', ARGV[1], 'LIMIT', 0, 100)) do
      redis.call('ZREM', waiting, id)
      if redis.call('HGET', 'rq:job:' .. id, 'status') == 'scheduled' then
        redis.call('HSET', 'rq:job:' .. id, 'status', 'queued')
        redis.call('RPUSH', name, id)
        moved = moved + 1
      end
    end
  end
end
return moved
""")


def wake(client: Redis, now: float) -> int:
    """Put the jobs whose pause has ended by `now` (Unix seconds) back into their queues; return how many."""
    return int(_WAKE(client, ("rq:queues",), (repr(now),)))
