"""Wakes incidents: at their deadlines, and when the heartbeat they wait for has come.

Waiting holds no worker: an incident that waits is only an entry in a sorted set of deadlines. The pacemaker moves what
is due onto the stream `em:due`, from where it takes the way of every event; moving is one script, so of many
pacemakers only one does it. What was moved stays in the set with a later deadline, so that a lost job is made up for.
An incident whose heartbeat has come is woken once a version: while no worker takes the job, nothing piles up.
Every dispatcher runs one; it keeps nothing that it cannot read again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from backup_worker.queueing.due import STREAM, IncidentDue
from backup_worker.recovery import heartbeats, watching
from backup_worker.recovery.incident import (
    CONFIRM,
    DEADLINES,
    DEPEND,
    ESCALATED,
    PROVE,
    QUEUED_AGAIN_S,
    Incident,
    IncidentStore,
)
from em_bridge import streams
from em_bridge.events import encode

if TYPE_CHECKING:
    from redis import Redis

    from backup_worker.config import Config

BUSY_TICK_S, IDLE_TICK_S = 0.1, 1.0

_MOVE = """
local due = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not due or tonumber(due) ~= tonumber(ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[1], ARGV[3], ARGV[1])
redis.call('XADD', KEYS[2], '*', unpack(ARGV, 4))
return 1
"""


class Pacemaker:
    """One look at deadlines and heartbeats is `tick`; it returns in how many seconds the next one is wanted."""

    def __init__(self, client: Redis) -> None:
        self.client = client
        self.store = IncidentStore(client)
        self.beats = heartbeats.Beats()
        self._woken: dict[str, int] = {}
        self._move = client.register_script(_MOVE)

    def tick(self, config: Config, now: float) -> float:
        """Wake what is due at `now` (Unix seconds)."""
        waiting = self.store.open_incidents()
        if not waiting:
            # Nobody waits, so nothing of the stream is needed: the next incident starts from its own mark.
            self.beats = heartbeats.Beats()
            self._woken.clear()
            return IDLE_TICK_S
        if not self.beats.by_agent:
            self.beats.cursor = heartbeats.earliest(incident.beat_mark for incident in waiting)
        heartbeats.read(self.client, self.beats)
        if watching.note(self.client, now):
            # Every deadline is now further away than anybody wanted.
            self.client.zadd(DEADLINES, {incident.id: now for incident in waiting}, xx=True, lt=True)
        for incident in waiting:
            if self._woken.get(incident.id) == incident.version:
                continue
            if self._has_what_it_waits_for(incident, config, now):
                self._woken[incident.id] = incident.version
                self.store.look_by(incident.id, now)
        self._move_due(now)
        return BUSY_TICK_S

    def _has_what_it_waits_for(self, incident: Incident, config: Config, now: float) -> bool:
        agent = config.agents.get(incident.agent)
        if agent is None:
            return False
        if incident.phase == CONFIRM:
            beat = agent.heartbeat
            since = now - beat.dead_after
            return self.beats.is_steady(incident.agent, incident.beat_mark, beat.stable_beats, since)
        if incident.phase == PROVE:
            _, count = self.beats.streak(incident.agent, incident.start_mark, incident.old_incarnations)
            return count >= agent.heartbeat.stable_beats and not incident.unwell
        if incident.phase == DEPEND:
            latest = self.store.latest(agent.depends_on)
            return not missing_dependencies(incident, agent.depends_on, latest, self.beats)
        return False

    def _move_due(self, now: float) -> None:
        late: Any = self.client.zrangebyscore(DEADLINES, "-inf", now, withscores=True)
        for member, score in late:
            incident_id = member.decode()
            entry = [part for pair in encode(IncidentDue(incident_id)).items() for part in pair]
            self._move(
                keys=[DEADLINES, STREAM], args=[incident_id, repr(score), now + QUEUED_AGAIN_S, *entry]
            )


def missing_dependencies(
    incident: Incident, depends_on: Iterable[str], latest: Mapping[str, Incident], beats: heartbeats.Beats
) -> list[str]:
    """Return which of `depends_on` are not yet proven alive; `latest` is the newest incident of each.

    An agent counts as alive if no incident of it is open and it has beaten since `incident` was opened: the last
    known state would not do, because an agent that died in the same instant still looks alive for a while. One that
    was given up since has to beat again.
    """
    missing = []
    for agent in depends_on:
        last = latest.get(agent)
        mark = incident.beat_mark
        if last is not None and last.state == ESCALATED:
            mark = max(mark, last.end_mark or mark, key=streams.id_order)
        if (last is not None and last.is_open) or not beats.lived_after(agent, mark):
            missing.append(agent)
    return missing
