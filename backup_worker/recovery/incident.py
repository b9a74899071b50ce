"""One agent's recovery, as data, and where it is kept; what may follow what stands in `phases`.

Entering a phase is written to Redis before its work begins, under a version that grows by one, so that of two workers
on the same incident only one can go on (`Stale` for the other). All of a phase's work may be done twice without harm,
so a worker killed anywhere is resumed by running the phase again; one whose worker dies `MAX_RESUMES` times in a row is
given to a human instead.

A failed attempt is `fence` again with the next older state, as often as `recovery.attempts` says, then escalation. A
state that could not be laid down was not tried: `select` proves anew, and passes over what turned out to be damaged.

At most one incident of an agent is open: opening a second returns the first. The newest `KEPT` are kept, and for a
time; the last one of an agent stays. What is let go of is in the record, and in the evidence as long as that is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgpack

from backup_worker.recovery.phases import (
    CONFIRM,
    DEPEND,
    ESCALATED,
    FENCE,
    NEXT,
    OPEN,
    PHASES,
    PROVE,
    RECOVERED,
    RESTORE,
    SELECT,
    START,
)
from em_bridge.errors import AgentBackupError, NotFound

if TYPE_CHECKING:
    from redis import Redis

CURRENT = "current"
"""The name of the state that is on disk, where a snapshot's id would stand."""

__all__ = [
    "AGAIN_AFTER_S", "CONFIRM", "CURRENT", "DEADLINES", "DEPEND", "ESCALATED", "FENCE", "KEPT", "MAX_RESUMES",
    "NEXT", "OPEN", "PHASES", "PROVE", "QUEUED_AGAIN_S", "RECOVERED", "RESTORE", "SELECT", "START",
    "Incident", "IncidentStore", "Missed", "Stale", "Step", "after", "attempted_before",
]  # fmt: skip

_INCIDENT = "backup:incident:"
_ALL = "backup:incidents"
_OPEN = "backup:incidents:open"
_LATEST = "backup:incidents:latest"
DEADLINES = "backup:deadlines"

AGAIN_AFTER_S = 5.0
"""An incident whose worker says nothing any more is looked at again after this time."""

QUEUED_AGAIN_S = 30.0
"""One whose job has not even begun gets another one after this time: a long queue must not grow longer by itself."""

KEPT = 1000
"""How many incidents are kept."""

MAX_RESUMES = 5
"""How often a phase is begun again without having come to an end: what kills every worker must reach a human."""

# An index entry without its incident (a server that lost its last second) must not keep a new one from opening.
_OPEN_SCRIPT = """
local open = redis.call('HGET', KEYS[1], ARGV[1])
if open and redis.call('EXISTS', ARGV[6] .. open) == 1 then return open end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('HSET', KEYS[2], 'version', 1, 'data', ARGV[3])
redis.call('ZADD', KEYS[3], ARGV[4], ARGV[2])
redis.call('ZADD', KEYS[4], ARGV[5], ARGV[2])
redis.call('HSET', KEYS[5], ARGV[1], ARGV[2])
return ARGV[2]
"""

# The client repeats a command whose reply was lost, so writing the same thing over itself is a success.
_SAVE_SCRIPT = """
local version = redis.call('HGET', KEYS[1], 'version')
if version == tostring(ARGV[1] + 1) and redis.call('HGET', KEYS[1], 'data') == ARGV[2] then return 1 end
if version ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'version', ARGV[1] + 1, 'data', ARGV[2])
if ARGV[3] ~= '' then
  redis.call('ZADD', KEYS[3], ARGV[3], ARGV[4])
else
  redis.call('ZREM', KEYS[3], ARGV[4])
  if redis.call('HGET', KEYS[2], ARGV[5]) == ARGV[4] then redis.call('HDEL', KEYS[2], ARGV[5]) end
end
return 1
"""


class Stale(AgentBackupError):
    """Somebody else has advanced the incident meanwhile; what was about to be written is out of date."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that was done: its name, when (Unix seconds), whether it worked, and what there is to say."""

    step: str
    at: float
    ok: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Missed:
    """An approved change that a state does not hold; `snapshot` is the one that was made of it, if it is known."""

    text: str
    change: str = ""
    snapshot: str = ""
    paths: tuple[str, ...] = ()
    approved_by: str = ""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Incident:
    """The recovery of one agent. Times are Unix seconds; `version` grows with every write."""

    id: str
    agent: str
    opened_at: float
    as_of: float | None = None
    """Snapshots that were made later are never chosen; older incidents have it not, and mean the opening."""
    reason: str = ""
    state: str = OPEN
    phase: str = FENCE
    closed_at: float | None = None
    attempts: int = 0
    inherited: int = 0
    """How many of the attempts were the previous incident's, within whose stability period the agent died again."""
    version: int = 1
    steps: tuple[Step, ...] = ()
    beat_mark: str = "0-0"
    """Entry id in the heartbeat stream at the opening: a beat behind it proves that its sender lived later."""
    start_mark: str = ""
    """Entry id in the heartbeat stream just before the start; only beats behind it count."""
    deadline: float | None = None
    """When the present phase has taken too long."""
    chosen: tuple[str, ...] = ()
    """The snapshots whose composition is tried now, or (`current`,)."""
    tried: tuple[str, ...] = ()
    """The newest snapshot of every state that was tried and did not live, and `current`."""
    evidence: tuple[str, ...] = ()
    state_at: float | None = None
    """When the newest part of the restored state was stored."""
    lost: tuple[str, ...] = ()
    """The first paths whose content at the death is in no backup, only in the evidence."""
    lost_count: int | None = 0
    """How many there are; None if it could not be found out."""
    missed: tuple[Missed, ...] = ()
    """Approved changes that the restored state does not hold."""
    reapply: bool = False
    """Whether these are put back over the restored state, as a human has asked for; not after a failed attempt."""
    reapplied: tuple[Missed, ...] = ()
    """What was put back."""
    pid: int | None = None
    old_incarnations: tuple[str, ...] = ()
    end_mark: str = ""
    """Entry id in the heartbeat stream at the closing: a beat behind it proves life after an escalation."""
    by_hand: bool = False
    """Opened by a human, whom no breaker stops."""
    unwell: str = ""
    """What the agent's `health` command said last, if it beats but is not well: its beats alone wake nobody then."""
    resumes: int = 0
    """How often the present phase was begun without having come to an end."""

    @property
    def known_until(self) -> float:
        """What was stored, or changed, later is no part of the agent's life before its death."""
        return self.opened_at if self.as_of is None else self.as_of

    @property
    def is_open(self) -> bool:
        """Whether the recovery still goes on."""
        return self.state == OPEN

    def noted(self, step: str, now: float, ok: bool, detail: str = "") -> Incident:
        """Return the incident with one more step on its record."""
        return replace(self, steps=(*self.steps, Step(step, now, ok, detail)))

    def entering(self, phase: str, **changes: Any) -> Incident:
        """Return the incident in `phase`; raises ValueError if the table does not allow that transition."""
        if phase not in NEXT[self.phase]:
            raise ValueError(f"an incident in {self.phase} cannot enter {phase}")
        return replace(self, phase=phase, resumes=0, unwell="", **changes)

    def closed(self, state: str, now: float, end_mark: str) -> Incident:
        """Return the incident closed as `state` (RECOVERED or ESCALATED)."""
        return replace(self, state=state, closed_at=now, deadline=None, end_mark=end_mark)

    def summary(self) -> dict[str, Any]:
        """Return the incident as `backup-worker incidents --json` prints it."""
        return {
            "id": self.id,
            "agent": self.agent,
            "state": self.state,
            "opened_at": self.opened_at,
            "closed_at": self.closed_at,
            "attempts": self.attempts,
            "steps": [asdict(step) for step in self.steps],
            "reason": self.reason,
            "phase": self.phase if self.is_open else None,
            "evidence": list(self.evidence),
            "from": list(self.chosen),
            "state_at": self.state_at,
            "lost": list(self.lost),
            "lost_count": self.lost_count,
            "missed_changes": list(map(str, self.missed)),
            "reapplied": list(map(str, self.reapplied)),
        }


def attempted_before(last: Incident | None, died_at: float, stable_for: float) -> Incident | None:
    """Return `last` if the agent, which died at `died_at`, had not lived for `stable_for` seconds after it. Pure."""
    if last is None or last.state != RECOVERED or not last.chosen or last.closed_at is None:
        return None
    # Where the time of the death is only estimated, it may come out before the recovery's end.
    return last if max(0.0, died_at - last.closed_at) < stable_for else None


def after(last: Incident | None) -> dict[str, object]:
    """Return what a new incident takes over from the one that it follows: what was tried, and how often."""
    if last is None:
        return {}
    return {
        "tried": (*last.tried, *last.chosen[:1]),
        "attempts": last.attempts,
        "inherited": last.attempts,
    }


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _pack(incident: Incident) -> bytes:
    return bytes(msgpack.packb(asdict(incident)))


def _unpack(data: Any) -> Incident:
    raw = msgpack.unpackb(data)
    raw["steps"] = tuple(Step(**step) for step in raw["steps"])
    for name in ("chosen", "tried", "evidence", "lost", "old_incarnations"):
        raw[name] = tuple(raw[name])
    for name in ("missed", "reapplied"):
        raw[name] = tuple(map(_missed, raw.get(name, ())))
    return Incident(**raw)


def _missed(raw: Any) -> Missed:
    # An incident of an older version has only the text.
    return Missed(**raw | {"paths": tuple(raw["paths"])}) if isinstance(raw, dict) else Missed(raw)


@dataclass(slots=True)
class IncidentStore:
    """The incidents in Redis."""

    client: Redis
    _scripts: dict[str, Any] = field(default_factory=dict)

    def _run(self, script: str, keys: list[str], args: list[Any]) -> Any:
        if script not in self._scripts:
            self._scripts[script] = self.client.register_script(script)
        return self._scripts[script](keys=keys, args=args)

    def open(
        self, agent: str, *, token: str, now: float, reason: str, beat_mark: str, **facts: Any
    ) -> tuple[Incident, bool]:
        """Return the open incident of `agent` and whether it is new; `token` makes a new one's id unique.

        `facts` are further fields of a new one. The caller wakes it; if it does not live to do so, the incident is
        looked at after `AGAIN_AFTER_S`.
        """
        incident = Incident(f"{agent}-{token}", agent, now, reason=reason, beat_mark=beat_mark, **facts)
        keys = [_OPEN, _INCIDENT + incident.id, _ALL, DEADLINES, _LATEST]
        args = [agent, incident.id, _pack(incident), now, now + AGAIN_AFTER_S, _INCIDENT]
        opened = self.get(_text(self._run(_OPEN_SCRIPT, keys, args)))
        return opened, opened.id == incident.id

    def get(self, incident_id: str) -> Incident:
        """Return an incident; raises NotFound."""
        data = self.client.hget(_INCIDENT + incident_id, "data")
        if data is None:
            raise NotFound(f"there is no incident “{incident_id}”", hint="see `backup-worker incidents`")
        return _unpack(data)

    def save(self, incident: Incident, *, wake_at: float | None) -> Incident:
        """Write `incident` over the version it was made from, and return it with its new version.

        `wake_at` is when somebody has to look at it again (Unix seconds); an incident that is closed needs nobody.
        Raises Stale if it has been changed meanwhile.
        """
        if incident.is_open and wake_at is None:
            raise ValueError(f"nobody would ever look at the open incident {incident.id} again")
        newer = replace(incident, version=incident.version + 1)
        keys = [_INCIDENT + incident.id, _OPEN, DEADLINES]
        wake = repr(wake_at) if incident.is_open else ""
        if not self._run(
            _SAVE_SCRIPT, keys, [incident.version, _pack(newer), wake, incident.id, incident.agent]
        ):
            raise Stale(f"incident “{incident.id}” was advanced by somebody else")
        return newer

    def open_ids(self) -> dict[str, str]:
        """Return the open incidents: agent -> incident id."""
        return {_text(agent): _text(incident) for agent, incident in self.client.hgetall(_OPEN).items()}

    def open_incidents(self) -> list[Incident]:
        """Return the open incidents."""
        return self._read(self.client.hvals(_OPEN))

    def latest(self, agents: Iterable[str]) -> dict[str, Incident]:
        """Return the newest incident, open or closed, of each of `agents` that ever had one."""
        names = list(agents)
        found = self.client.hmget(_LATEST, names) if names else []
        return {one.agent: one for one in self._read(found)}

    def wake(self, phase: str, now: float) -> None:
        """Have the open incidents in `phase` looked at now."""
        for incident in self.open_incidents():
            if incident.phase == phase:
                self.look_by(incident.id, now)

    def look_by(self, incident_id: str, at: float) -> None:
        """Have an open incident looked at no later than `at`."""
        self.client.zadd(DEADLINES, {incident_id: at}, xx=True, lt=True)

    def _read(self, incident_ids: Iterable[Any]) -> list[Incident]:
        with self.client.pipeline(transaction=False) as pipeline:
            for incident_id in incident_ids:
                if incident_id is not None:
                    pipeline.hget(_INCIDENT + _text(incident_id), "data")
            return [_unpack(data) for data in pipeline.execute() if data is not None]

    def forget(self, now: float, *, max_age_s: float, keep: int = KEPT) -> int:
        """Let go of closed incidents that are too old or too many; return of how many.

        The last one of each agent stays: what is told of that agent is judged by it.
        """
        held = {_text(one) for one in (*self.client.hvals(_OPEN), *self.client.hvals(_LATEST))}
        old = self.client.zrangebyscore(_ALL, "-inf", now - max_age_s)
        many = self.client.zrange(_ALL, 0, -keep - 1)
        gone = {_text(one) for one in (*old, *many)} - held
        if gone:
            with self.client.pipeline(transaction=True) as pipeline:
                pipeline.delete(*(_INCIDENT + one for one in gone))
                pipeline.zrem(_ALL, *gone)
                pipeline.execute()
        return len(gone)

    def all(self) -> Iterator[Incident]:
        """Yield every incident, the newest first."""
        ids = self.client.zrevrange(_ALL, 0, -1)
        for start in range(0, len(ids), 100):
            yield from self._read(ids[start : start + 100])
