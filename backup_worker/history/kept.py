"""Lines that wait for the disk, in Redis: a record that cannot be written never stops what it is about.

Promise: lines are written in the order in which they were kept, behind everything that was written before them, by one
process at a time. While some wait, new ones queue up behind them. At most `MOST` wait; how many were dropped beyond
that is a line of its own (`history-lost`). A writer killed between writing and forgetting writes its batch twice:
better than not at all.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from backup_worker.history.line import checked
from backup_worker.history.record import History, HistoryUnwritable
from em_bridge.scripts import Script

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger(__name__)

UNWRITTEN = "backup:history:unwritten"
"""List: lines that wait, oldest first, as JSON."""

DROPPED = "backup:history:dropped"
"""How many lines found no room there."""

MOST = 20_000
LOST = "history-lost"

_WRITER = "backup:history:writer"
_WRITER_TTL_MS = 60_000
_BATCH = 200

# Only for the one writer: another that has taken over meanwhile forgets what it has written itself.
_FORGET = Script("""
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
redis.call('LTRIM', KEYS[1], ARGV[2], -1)
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return 1
""")


def keep(client: Redis, kind: str, now: float, facts: Mapping[str, Any]) -> None:
    """Keep a line until it can be written. Raises `UsageError` for one that never could."""
    line = json.dumps({"kind": kind, "now": now, "facts": checked(kind, facts)})
    length: Any = client.llen(UNWRITTEN)
    if length >= MOST:
        client.incr(DROPPED)
        return
    client.rpush(UNWRITTEN, line)


def waiting(client: Redis) -> int:
    """Return how many lines wait."""
    length: Any = client.llen(UNWRITTEN)
    return int(length)


def write(client: Redis, history: History, now: float) -> int:
    """Write what waits, unless another process is at it; return how many lines that was. The disk may stay full."""
    token = secrets.token_hex(8)
    if not client.set(_WRITER, token, nx=True, px=_WRITER_TTL_MS):
        return 0
    written = 0
    try:
        while rows := _next(client):
            lines = [line for line in map(_line, rows) if line is not None]
            history.extend(lines)
            written += len(lines)
            if not _FORGET(client, (UNWRITTEN, _WRITER), (token, len(rows), _WRITER_TTL_MS)):
                # The disk took longer than the claim lasts.
                return written
        dropped: Any = client.get(DROPPED)
        if dropped is not None:
            history.append(LOST, now=now, lines=int(dropped))
            client.delete(DROPPED)
    except HistoryUnwritable as error:
        # That it cannot be written was said when the first line had to wait.
        log.debug("%d lines wait for the record: %s", waiting(client), error.message)
    finally:
        if client.get(_WRITER) == token.encode():
            client.delete(_WRITER)
    return written


def _next(client: Redis) -> list[bytes]:
    rows: Any = client.lrange(UNWRITTEN, 0, _BATCH - 1)
    return list(rows)


def _line(row: bytes) -> tuple[str, float, dict[str, Any]] | None:
    try:
        line = json.loads(row)
        return str(line["kind"]), float(line["now"]), checked(str(line["kind"]), dict(line["facts"]))
    except (ValueError, KeyError, TypeError) as error:
        # Nobody but us writes there; what is not a line must not keep the others from being written.
        log.error("what waits for the record is no line, and is dropped: %s", error)
        return None
