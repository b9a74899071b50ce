"""Copying messages of the log into a stream of one's own: a test bed, an audit, another consumer.

Promise: each message stands there once, with the id it has in the log and that id as its `log`, however often the
command is repeated. The bus's own streams are refused. Raises `AgentBackupError` if the stream holds later entries
than the ones to be added: a stream only grows at its end.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, Final, cast

import redis

from em_bridge import streams
from em_bridge.errors import AgentBackupError, UsageError
from em_bridge.events import encode
from em_bridge.replay import messages

BATCH: Final = 500
RESERVED: Final = ("em:", "rq:", "backup:")


def copy_into(
    client: redis.Redis,
    stream: str,
    start: str = "-",
    end: str = "+",
    *,
    recipient: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Copy the log from `start` to `end` into `stream`; return the counts `messages`, `copied`, `already_there`."""
    if stream.startswith(RESERVED) or not stream:
        raise UsageError(
            f"“{stream}” is a stream of the bus",
            hint=f"choose a name that does not begin with {', '.join(RESERVED)}",
        )
    count = copied = 0
    wanted = (
        (entry, replace(message, log=entry))
        for entry, message in messages(client, start, end)
        if recipient is None or message.to == recipient
    )
    while batch := list(itertools.islice(wanted, BATCH)):
        there = {entry for entry, _ in streams.read_range(client, stream, batch[0][0], batch[-1][0])}
        new = [(entry, message) for entry, message in batch if entry not in there]
        count += len(batch)
        copied += len(new)
        if new and streams.id_order(streams.last_id(client, stream)) >= streams.id_order(new[0][0]):
            raise AgentBackupError(
                f"“{stream}” holds later entries than {new[0][0]}, which is not there",
                hint="copy into another stream, or delete this one first",
            )
        if not dry_run and new:
            with client.pipeline(transaction=True) as pipe:
                for entry, message in new:
                    pipe.xadd(stream, cast(Any, encode(message)), id=entry)
                pipe.execute()
    return {
        "into": stream,
        "messages": count,
        "copied": copied,
        "already_there": count - copied,
        "dry_run": dry_run,
    }
