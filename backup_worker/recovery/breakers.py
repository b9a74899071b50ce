"""When recovery must stop by itself: too many recoveries of one agent, too many in the fleet, or a human's word.

The promise: an agent that dies again and again is given to a human instead of being restored for ever; a fleet that
does so is paused as a whole, loudly, until somebody resumes. A pause is kept in Redis and survives what Redis survives.
It holds an incident before it fences, never in the middle: a recovery that has begun to act goes on, since half a
recovery is worse than a whole or none. Recoveries that a human opens pass the breakers, but wait for a pause.

Only recoveries that succeeded are counted: what fails is escalated anyway. For the fleet, what was before the last
resume is forgiven.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import msgpack

from backup_worker.units import counted

if TYPE_CHECKING:
    from redis import Redis

    from backup_worker.config import Config
    from backup_worker.recovery.incident import Incident

_PAUSE = "backup:recovery:paused"
_DONE = "backup:recovery:done"
"""Sorted set of the incidents that ended well, by their end; with `:` and an agent, those of that agent."""
_FORGIVEN = "backup:recovery:forgiven"
"""When recovery was resumed last: what was done before is not counted for the fleet."""

KEPT_S = 7 * 24 * 3600.0
"""How long recoveries are remembered: the longest period that the configuration allows."""

AT_LEAST = 10
"""A fleet's limit if none is configured: this many, or two for every agent if that is more."""

BREAKER = "breaker"
"""Who paused, if no human did; and the step of a breaker that tripped."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Recovery stands still since `since` (Unix seconds), until `until` if that is given, else until a resume."""

    since: float
    by: str
    reason: str = ""
    until: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the pause as the commands print it."""
        return asdict(self)


def pause(client: Redis, wanted: Pause) -> Pause:
    """Pause recovery, and return the pause; one that is there already is replaced, but keeps its beginning."""
    known = stored(client)
    if known is not None:
        wanted = Pause(known.since, wanted.by, wanted.reason, wanted.until)
    client.set(_PAUSE, bytes(msgpack.packb(asdict(wanted))))
    return wanted


def resume(client: Redis, now: float) -> Pause | None:
    """End the pause and return it; None if there was none."""
    known = stored(client)
    with client.pipeline(transaction=True) as pipeline:
        pipeline.delete(_PAUSE)
        pipeline.set(_FORGIVEN, repr(now))
        pipeline.execute()
    return known


def end_in_time(client: Redis, now: float) -> Pause | None:
    """End the pause if its time is over at `now`, and return it; one that comes meanwhile stays."""

    def attempt(pipe: Any) -> Pause | None:
        known = stored(pipe)
        is_over = known is not None and known.until is not None and known.until <= now
        pipe.multi()
        if is_over:
            pipe.delete(_PAUSE)
            pipe.set(_FORGIVEN, repr(now))
        return known if is_over else None

    return cast("Pause | None", cast(Any, client).transaction(attempt, _PAUSE, value_from_callable=True))


def stored(client: Redis) -> Pause | None:
    """Return the pause, also one whose time is over and that nobody has ended yet."""
    data: Any = client.get(_PAUSE)
    return Pause(**msgpack.unpackb(data)) if data is not None else None


def paused(client: Redis, now: float) -> Pause | None:
    """Return the pause that holds at `now`."""
    known = stored(client)
    return known if known is not None and (known.until is None or now < known.until) else None


def count(client: Redis, incident: Incident) -> None:
    """Count a recovery that ended well; once, however often it is told.

    One that came back by itself, or that a human had started, says nothing about the fleet.
    """
    ended = incident.closed_at or 0.0
    mine = f"{_DONE}:{incident.agent}"
    with client.pipeline(transaction=True) as pipeline:
        for key in (_DONE, mine) if incident.attempts and not incident.by_hand else (mine,):
            pipeline.zadd(key, {incident.id: ended})
            pipeline.zremrangebyscore(key, "-inf", ended - KEPT_S)
        pipeline.execute()


def agent_tripped(client: Redis, config: Config, agent: str, now: float) -> str | None:
    """Return why `agent` must not be recovered once more, or None."""
    limits = config.agents[agent].recovery
    done = _since(client, f"{_DONE}:{agent}", now - limits.max_recoveries_within)
    if done < limits.max_recoveries:
        return None
    return (
        f"it was recovered {counted(done, 'time')} within {limits.max_recoveries_within:g} s and died again; "
        "its limit is recovery.max_recoveries"
    )


def fleet_tripped(client: Redis, config: Config, now: float) -> str | None:
    """Return why nobody must be recovered now, or None."""
    limits = config.schedule.limits
    most = limits.fleet_recoveries or max(AT_LEAST, 2 * len(config.agents))
    period_s = limits.fleet_recoveries_minutes * 60
    forgiven: Any = client.get(_FORGIVEN)
    done = _since(client, _DONE, max(now - period_s, float(forgiven or 0.0)))
    if done < most:
        return None
    return f"{done} recoveries within {limits.fleet_recoveries_minutes:g} minutes; the limit is {most}"


def _since(client: Redis, key: str, at: float) -> int:
    found: Any = client.zcount(key, f"({at!r}", "+inf")
    return int(found)
