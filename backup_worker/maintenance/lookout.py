"""The regular look at what nobody else notices: no good backup for too long, a Redis nearly full, waiting messages.

It also closes what the part that opened it cannot close: alerts about backups that a later one has made good, and
about jobs of which nothing is left. Looking changes nothing but alerts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import ResponseError

from backup_worker import alerts, schedule
from backup_worker.config import Config
from backup_worker.queueing import due
from backup_worker.runtime import Runtime
from backup_worker.snapshots import Head, newest
from backup_worker.units import size
from em_bridge import streams

if TYPE_CHECKING:
    from redis import Redis

MESSAGES_WAIT_S: Final = 60.0
"""For how long a message may wait to be routed."""

MEMORY_FULL: Final = 0.9
"""The share of Redis's memory limit from which on it alerts."""

MEMORY_CALM: Final = 0.8
"""Below which it is well again: an alert that comes and goes is soon ignored."""

JOB_FORGOTTEN_S: Final = 7 * 86400.0
"""After how long the alert about a failed job ends by itself: as long as RQ keeps the job."""


def look(runtime: Runtime, heads: Sequence[Head], now: float) -> dict[str, Any]:
    """Open and close the alerts of this module; return what was found."""
    stale = _tell_of_stale(runtime, heads, now)
    _let_go(runtime, heads, now)
    return {"stale": stale, "memory": _tell_of_memory(runtime), "stuck_s": _tell_of_stuck(runtime, now)}


def missing_backups(
    runtime: Runtime, now: float, heads: Sequence[Head] | None = None
) -> dict[tuple[str, str], schedule.Due]:
    """Return (tier, agent) -> the newest slot that should be filled for longer than the limit, and is not.

    A snapshot made by hand since the slot was due fills it too. A slot that was announced late (everything was down,
    or the agent is new) has its time from the announcement; so has one that was never announced, because a newer one
    was announced in its place.
    """
    grace_s = runtime.config.schedule.limits.overdue_minutes * 60
    last = newest(runtime.repository.snapshots() if heads is None else heads)
    due_by_now = schedule.due(runtime.config, (), now - grace_s)
    missing = [
        late
        for late in due_by_now
        if (head := last.get((late.tier, late.agent))) is None or head.created_at < late.fire_at
    ]
    announced: list[Any] = [None] * len(missing)
    if runtime.client is not None and missing:
        newer = {(one.tier, one.agent): one for one in schedule.due(runtime.config, (), now)}
        own = _announcements(runtime, missing)
        instead = _announcements(runtime, [newer[late.tier, late.agent] for late in missing])
        announced = [entry or other for entry, other in zip(own, instead, strict=True)]
    return {
        (late.tier, late.agent): late
        for late, entry in zip(missing, announced, strict=True)
        if entry is None or streams.entry_time(entry.decode()) <= now - grace_s
    }


def _announcements(runtime: Runtime, slots: Sequence[schedule.Due]) -> list[Any]:
    """Return the id of the entry with which each slot was announced, None where it was not."""
    return list(runtime.redis.mget([streams.once_key(slot_announcement(one)) for one in slots]))


def slot_announcement(late: schedule.Due) -> str:
    """Return the name under which the scheduler announces a slot once."""
    return f"slot/{late.tier}/{late.slot}/{late.agent}"


def stale_backups(config: Config, heads: Sequence[Head], now: float) -> dict[tuple[str, str], float | None]:
    """Return (tier, agent) -> when its newest good snapshot was made (None: never), where that is too long ago. Pure.

    Too long is before the last run but one of the tier: two runs were made, or missed, without a good one. An agent
    has its time from its first snapshot in the tier; one without any is missing, not stale.
    """
    grace_s = config.schedule.limits.overdue_minutes * 60
    zone = config.schedule.timezone
    first: dict[tuple[str, str], float] = {}
    good: dict[tuple[str, str], float] = {}
    for head in heads:
        place = head.tier, head.agent
        first[place] = min(first.get(place, head.created_at), head.created_at)
        if head.is_good:
            good[place] = max(good.get(place, head.created_at), head.created_at)
    found: dict[tuple[str, str], float | None] = {}
    for name, tier in config.schedule.tiers.items():
        if tier.cron is None:
            continue
        last = schedule.previous_run(tier, zone, now - grace_s)
        limit = schedule.previous_run(tier, zone, last - 1)
        for agent in config.agents:
            place = name, agent
            if place in first and good.get(place, 0.0) < limit and first[place] < limit:
                found[place] = good.get(place)
    return found


def oldest_in_group(client: Redis, stream: str, group: str, now: float) -> float:
    """Return for how many seconds the oldest entry of `stream` has waited for `group` to be done with it."""
    groups: Any = client.xinfo_groups(stream) if client.exists(stream) else []
    ours = next((one for one in groups if one["name"] == group.encode()), None)
    # Without a group nobody was ever there, and everything waits for the first one.
    start = f"({ours['last-delivered-id'].decode()}" if ours else "-"
    behind: Any = client.xrange(stream, start, "+", count=1)
    waiting = [entry_id.decode() for entry_id, _ in behind]
    if ours and ours["pending"]:
        pending: Any = client.xpending(stream, group)
        waiting += [pending["min"].decode()] if pending["pending"] else []
    return max([0.0, *(now - streams.entry_time(entry_id) for entry_id in waiting)])


def oldest_waiting(runtime: Runtime, now: float) -> float:
    """Return for how many seconds the oldest event has waited to be handed off."""
    return max(
        oldest_in_group(runtime.redis, stream, streams.DISPATCHER_GROUP, now)
        for stream in (streams.AGENT_STATE, streams.CONFIG_CHANGE, due.STREAM)
    )


def _tell_of_stale(runtime: Runtime, heads: Sequence[Head], now: float) -> list[str]:
    stale = stale_backups(runtime.config, heads, now)
    for (tier, agent), made_at in stale.items():
        since = (
            "there is no good one" if made_at is None else f"the newest is {(now - made_at) / 3600:.0f} h old"
        )
        title = f"{agent} has no recent good {tier} snapshot"
        body = f"{since}, and two runs have passed since: it would be restored from that, or not at all"
        runtime.alert(f"stale/{tier}/{agent}", "critical", title, body, agent=agent)
    places = [f"{tier}/{agent}" for tier, agent in stale]
    for one in alerts.open_alerts(runtime.redis):
        kind, _, place = one.key.partition("/")
        if kind == "stale" and place not in places:
            runtime.resolve(one.key)
    return places


def _tell_of_memory(runtime: Runtime) -> float | None:
    """Alert a Redis that is nearly full, while it still takes the alert; return how full it is, None if unknown."""
    try:
        info: Mapping[str, Any] = runtime.redis.info("memory")
    except ResponseError:
        # We may not ask.
        return None
    used, limit = int(info["used_memory"]), int(info.get("maxmemory", 0))
    share = used / limit if limit else 0.0
    if share >= MEMORY_FULL:
        body = (
            f"{size(used)} of {size(limit)} are used ({share:.0%}); when it is full, no event, message or job is "
            "taken: raise maxmemory, or lower limits.log_days"
        )
        runtime.alert("memory", "critical", "Redis is nearly out of memory", body)
    elif share < MEMORY_CALM:
        runtime.resolve("memory")
    return share if limit else None


def _tell_of_stuck(runtime: Runtime, now: float) -> float:
    waiting_s = oldest_in_group(runtime.redis, streams.MESSAGES, streams.ROUTER_GROUP, now)
    if waiting_s > MESSAGES_WAIT_S:
        body = f"the oldest has waited for {waiting_s:.0f} s: is the EM running?"
        runtime.alert("stuck", "critical", "messages wait and the EM does not route them", body)
    else:
        runtime.resolve("stuck")
    return waiting_s


def _let_go(runtime: Runtime, heads: Sequence[Head], now: float) -> None:
    """Close what a later snapshot has made good (one made by hand knows nothing of alerts), and what is forgotten."""
    last = newest(heads)
    config = runtime.config
    for one in alerts.open_alerts(runtime.redis):
        kind, _, place = one.key.partition("/")
        if kind in ("failed", "suspect"):
            tier, _, agent = place.partition("/")
            head = last.get((tier, agent))
            later = head is not None and head.created_at > one.last_at and (kind == "failed" or head.is_good)
            if later or agent not in config.agents or tier not in config.schedule.tiers:
                runtime.resolve(one.key)
        elif kind == "job" and now - one.last_at > JOB_FORGOTTEN_S:
            runtime.resolve(one.key)
