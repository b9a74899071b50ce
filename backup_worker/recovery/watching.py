"""Since when the deadlines of recoveries are watched without a gap, by the server's clock: what was before is no proof.

The pacemakers note every look. Two looks further apart than `em_bridge.detector.MAX_GAP_S`, or a later look with an
earlier time, mean that nobody watched meanwhile, or that the clock was set; from then on whatever waits has a fresh
limit. So neither a Redis, nor a dispatcher, nor a clock that was away costs an agent an attempt, or its life.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from em_bridge.detector import MAX_GAP_S

if TYPE_CHECKING:
    from redis import Redis

WATCHED = "backup:recovery:watched"
"""A hash: `since`, and the `last` look; Unix seconds of the server's clock."""

CLOCK_STEP_S = 1.0
"""A clock that goes back by more than this was set; by less, two pacemakers have overtaken each other."""

_NOTE = """
local gap = ARGV[1] - (redis.call('HGET', KEYS[1], 'last') or '-inf')
if gap > tonumber(ARGV[2]) or gap < -tonumber(ARGV[3]) then redis.call('HSET', KEYS[1], 'since', ARGV[1]) end
redis.call('HSET', KEYS[1], 'last', ARGV[1])
if gap < -tonumber(ARGV[3]) then return 1 end
return 0
"""


def note(client: Redis, now: float) -> bool:
    """Note a look at `now`; tell whether the clock was set back since the last one."""
    return bool(client.eval(_NOTE, 1, WATCHED, repr(now), str(MAX_GAP_S), str(CLOCK_STEP_S)))


def not_before(client: Redis, at: float, now: float) -> float:
    """Return the time `at`, or when somebody began to watch if that was later; nothing begins later than `now`.

    What seems to be in the future was written before the clock was set back.
    """
    found: Any = client.hmget(WATCHED, "since", "last")
    if None in found:
        # Nobody has looked so far.
        return min(at, now)
    since, last = map(float, found)
    is_watched = -CLOCK_STEP_S <= now - last <= MAX_GAP_S
    begun = min(since, now) if is_watched else now
    return begun if at > now + CLOCK_STEP_S else min(max(at, begun), now)
