"""An inbox whose agent does not come back must not grow for ever.

Promise: a message that has waited in an inbox for longer than the log is kept becomes a dead letter, which says so and
holds it; the move is one script, and does nothing if the agent has dealt with the message meanwhile. So each stream of
the bus is bounded by time. What redis-py raises passes through.
"""

from __future__ import annotations

import itertools
import logging
from typing import Final

import redis

from em_bridge import streams
from em_bridge.events import encode
from em_bridge.replay import unacknowledged
from em_bridge.scripts import Arg, Script
from em_bridge.streams import DEAD_LETTER, INBOX_GROUP

log = logging.getLogger(__name__)

AT_ONCE: Final = 100

# KEYS: inbox, dead letters. ARGV: group, then (entry, body of its dead letter)…
_EXPIRE = Script("""
local delivered = '0-0'
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local info = {}
  for i = 1, #group, 2 do info[group[i]] = group[i + 1] end
  if info['name'] == ARGV[1] then delivered = info['last-delivered-id'] end
end
local moved = 0
for at = 2, #ARGV, 2 do
  local id = ARGV[at]
  local unread = #redis.call('XRANGE', KEYS[1], '(' .. delivered, id, 'COUNT', 1) > 0
  if #redis.call('XRANGE', KEYS[1], id, id) > 0
      and (unread or #redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1) > 0) then
    redis.call('XADD', KEYS[2], '*', 'type', 'dead-letter', 'body', ARGV[at + 1])
    redis.call('XACK', KEYS[1], ARGV[1], id)
    redis.call('XDEL', KEYS[1], id)
    moved = moved + 1
  end
end
return moved
""")


def expire(client: redis.Redis, agent: str, *, older_than_s: float) -> int:
    """Make dead letters of what has waited for `agent` for more than `older_than_s`; return how many."""
    now = streams.server_time(client)
    stream = streams.inbox(agent)
    oldest = itertools.takewhile(
        lambda message: streams.entry_time(message.entry or "") < now - older_than_s,
        unacknowledged(client, stream),
    )
    moved = 0
    while batch := list(itertools.islice(oldest, AT_ONCE)):
        args: list[Arg] = [INBOX_GROUP]
        for message in batch:
            assert message.entry is not None
            reason = (
                f"“{agent}” has not received it for {(now - streams.entry_time(message.entry)) / 3600:.1f} h"
            )
            letter = streams.dead_letter(stream, message.entry, reason, encode(message), now)
            args += (message.entry, encode(letter)[b"body"])
        moved += int(_EXPIRE(client, (stream, DEAD_LETTER), args))
        if len(batch) < AT_ONCE:
            break
    if moved:
        log.warning("%d messages waited too long for %s, and are dead letters", moved, agent)
    return moved
