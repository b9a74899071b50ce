"""Scheduled slots whose backup failed for good, and when each is tried again.

Promise: such a slot is tried again after growing pauses, a bounded number of times, until it is made or the next slot
of its tier is due; the record and the alert of the failure stand meanwhile. Each try is announced once, whatever number
of schedulers run; that the slot is made once is the engine's promise. A server that lost its data has the slot
announced anew from the start.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgpack

from backup_worker.queueing.due import BackupDue
from backup_worker.schedule import Due
from em_bridge import streams

if TYPE_CHECKING:
    from redis import Redis

PAUSES_S = (300.0, 600.0, 1200.0, 2400.0, 4800.0, 9600.0)
"""How long after its first, second… failure a slot is tried again; behind the last, the next slot is waited for."""

FAILED = "backup:slots:failed"
"""Hash: `tier/slot/agent` -> msgpack map `{"attempt": of the next try, "again_at": Unix seconds}`."""


def failed(client: Redis, tier: str, slot: str, agent: str, *, attempt: int, now: float) -> float | None:
    """Note that try number `attempt` (the first is 0) failed; return in how many seconds the next comes, if any."""
    if attempt >= len(PAUSES_S):
        made(client, tier, slot, agent)
        return None
    pause_s = PAUSES_S[attempt]
    note = {"attempt": attempt + 1, "again_at": now + pause_s}
    client.hset(FAILED, _name(tier, slot, agent), msgpack.packb(note))
    return pause_s


def made(client: Redis, tier: str, slot: str, agent: str) -> None:
    """Forget the slot's failures: it is there now."""
    client.hdel(FAILED, _name(tier, slot, agent))


def waiting(client: Redis) -> dict[str, dict[str, Any]]:
    """Return what waits for its next try, by `tier/slot/agent`."""
    rows: Any = client.hgetall(FAILED)
    return {name.decode(): msgpack.unpackb(note) for name, note in rows.items()}


def announce(client: Redis, current: Collection[Due], now: float, *, ttl_s: float) -> list[str]:
    """Put what is to be tried again now on the stream, and drop what is not in a `current` slot; return the former."""
    newest = {_name(due.tier, due.slot, due.agent): due for due in current}
    announced = []
    for name, note in waiting(client).items():
        due = newest.get(name)
        if due is None:
            client.hdel(FAILED, name)
        elif note["again_at"] <= now:
            first = BackupDue(due.tier, due.slot, due.agent, due.fire_at)
            event = replace(first, attempt=note["attempt"])
            streams.append_once(client, event, once=f"slot/{name}/{event.attempt}", ttl_s=ttl_s)
            announced.append(name)
    return announced


def _name(tier: str, slot: str, agent: str) -> str:
    return f"{tier}/{slot}/{agent}"
