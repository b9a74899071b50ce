"""What waits where: each stream with its consumer groups, each inbox, and the server's memory.

Promise: nothing is changed, and the numbers are of one moment to within the time of the reading. An entry waits for a
group as long as the group has not acknowledged it. What redis-py raises passes through; a number that the server does
not tell (the rights are missing, or entries were deleted by hand) is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import redis
from redis import exceptions

from em_bridge import streams
from em_bridge.events import INBOX_PREFIX
from em_bridge.replay import text
from em_bridge.streams import INBOX_GROUP

KNOWN: Final = (
    streams.AGENT_STATE,
    streams.CONFIG_CHANGE,
    streams.MESSAGES,
    streams.HEARTBEATS,
    streams.DEAD_LETTER,
)
_AT_ONCE: Final = 500


def measure(client: redis.Redis) -> dict[str, Any]:
    """Return `{"at", "memory", "streams", "inboxes"}`, as the command line prints it; times in seconds."""
    names = {text(key) for key in client.scan_iter(match="em:*", count=1000, _type="stream")} | {*KNOWN}
    inboxes = sorted(name for name in names if name.startswith(INBOX_PREFIX))
    others = sorted(names.difference(inboxes))
    now = streams.server_time(client)
    measured = {row["stream"]: row for row in _measured(client, [*others, *inboxes], now)}
    return {
        "at": now,
        "memory": _memory(client),
        "streams": [measured[name] for name in others],
        "inboxes": [_inbox(measured[name]) for name in inboxes],
    }


def _measured(client: redis.Redis, names: Sequence[str], now: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for first in range(0, len(names), _AT_ONCE):
        some = names[first : first + _AT_ONCE]
        with client.pipeline(transaction=False) as pipe:
            for name in some:
                pipe.xlen(name)
                pipe.xrange(name, count=1)
                pipe.xinfo_groups(name)
                pipe.memory_usage(name)
            answers = pipe.execute(raise_on_error=False)
        for place, name in enumerate(some):
            length, oldest, groups, size = answers[4 * place : 4 * place + 4]
            if isinstance(length, Exception):
                raise length
            rows.append(
                {
                    "stream": name,
                    "length": length,
                    "bytes": None if isinstance(size, Exception) else size or 0,
                    "oldest_s": _age(text(oldest[0][0]), now) if oldest else None,
                    # A stream that does not exist has no groups, and XINFO says so by an error.
                    "groups": [] if isinstance(groups, Exception) else groups,
                }
            )
    _look_into_groups(client, rows, now)
    return rows


def _look_into_groups(client: redis.Redis, rows: list[dict[str, Any]], now: float) -> None:
    """Replace each group as the server tells it by ours."""
    places = [(row, group) for row in rows for group in row["groups"]]
    with client.pipeline(transaction=False) as pipe:
        for row, group in places:
            pipe.xpending(row["stream"], group["name"])
            pipe.xrange(row["stream"], f"({text(group['last-delivered-id'])}", count=1)
        answers = pipe.execute(raise_on_error=False)
    for row in rows:
        row["groups"] = []
    for number, (row, group) in enumerate(places):
        pending, unread = answers[2 * number : 2 * number + 2]
        if isinstance(pending, exceptions.ResponseError) or isinstance(unread, exceptions.ResponseError):
            # Deleted since it was listed.
            continue
        waiting = [text(unread[0][0])] if unread else []
        if pending["pending"]:
            waiting.append(text(pending["min"]))
        lag = group.get("lag")
        row["groups"].append(
            {
                "group": text(group["name"]),
                "consumers": group["consumers"],
                "pending": pending["pending"],
                "unread": 0 if not unread else lag,
                "oldest_waiting_s": max((_age(entry, now) for entry in waiting), default=0.0),
            }
        )


def _inbox(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row of an inbox: what waits for its agent."""
    mine = next((group for group in row["groups"] if group["group"] == INBOX_GROUP), None)
    pending, unread = (mine["pending"], mine["unread"]) if mine else (0, row["length"])
    return {
        "agent": row["stream"].removeprefix(INBOX_PREFIX),
        "length": row["length"],
        "bytes": row["bytes"],
        "pending": pending,
        "unread": unread,
        "waiting": None if unread is None else pending + unread,
        "oldest_waiting_s": mine["oldest_waiting_s"] if mine else row["oldest_s"] or 0.0,
    }


def _memory(client: redis.Redis) -> dict[str, int] | None:
    try:
        info: dict[str, Any] = client.info("memory")
    except exceptions.NoPermissionError:
        return None
    return {"used_bytes": int(info["used_memory"]), "limit_bytes": int(info.get("maxmemory", 0))}


def _age(entry: str, now: float) -> float:
    return round(max(0.0, now - streams.entry_time(entry)), 3)
