"""One agent's recovery, as data: the phases, what may follow what, and where it is kept.

    phase          what is done in it                                   next, if it worked   if it failed
    fence          end the old process, prove it gone                   select               escalate
    select         find the newest state that can be trusted            restore, or depend   escalate
    restore        keep evidence, stage, verify, swap                   depend               select (older state)
    depend         wait until what the agent needs is verified          start                escalate (deadline)
    start          start the new process                                prove                retry
    prove          wait for beats of the new incarnation                recovered            retry (exit, deadline)

`retry` is `fence` (or `select`) again with the next older state, as often as `recovery.attempts` says, then
escalation. An incident is open in exactly one phase; entering a phase is written to Redis before its work begins,
under a version that grows by one, so that of two workers on the same incident only one can go on (`Stale` for the
other). All of a phase's work may be done twice without harm, so a worker killed anywhere is resumed by running the
phase again.

At most one incident of an agent is open: opening a second returns the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgpack

from em_bridge.errors import AgentBackupError, NotFound

if TYPE_CHECKING:
    from redis import Redis

FENCE, SELECT, RESTORE, DEPEND, START, PROVE = "fence", "select", "restore", "depend", "start", "prove"
PHASES = (FENCE, SELECT, RESTORE, DEPEND, START, PROVE)
WAITING = frozenset({DEPEND, PROVE})
"""The phases in which nothing is done until a heartbeat or a deadline comes."""

NEXT: dict[str, frozenset[str]] = {
    FENCE: frozenset({SELECT}),
    SELECT: frozenset({RESTORE, DEPEND}),
    RESTORE: frozenset({DEPEND, SELECT}),
    DEPEND: frozenset({START}),
    START: frozenset({PROVE, FENCE}),
    PROVE: frozenset({FENCE}),
}
"""What may follow a phase; an incident may be closed from every phase."""

OPEN, RECOVERED, ESCALATED = "open", "recovered", "escalated"
CURRENT = "current"
"""The name of the state that is on disk, where a snapshot's id would stand."""

_INCIDENT = "backup:incident:"
_ALL = "backup:incidents"
_OPEN = "backup:incidents:open"
DEADLINES = "backup:deadlines"

_OPEN_SCRIPT = """
local open = redis.call('HGET', KEYS[1], ARGV[1])
if open then return {0, open} end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('HSET', KEYS[2], 'version', 1, 'data', ARGV[3])
redis.call('ZADD', KEYS[3], ARGV[4], ARGV[2])
redis.call('ZADD', KEYS[4], ARGV[4], ARGV[2])
return {1, ARGV[2]}
"""

_SAVE_SCRIPT = """
if redis.call('HGET', KEYS[1], 'version') ~= ARGV[1] then return 0 end
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
class Incident:
    """The recovery of one agent. Times are Unix seconds; `version` grows with every write."""

    id: str
    agent: str
    opened_at: float
    reason: str = ""
    state: str = OPEN
    phase: str = FENCE
    closed_at: float | None = None
    attempts: int = 0
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
    pid: int | None = None
    old_incarnations: tuple[str, ...] = ()

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
        return replace(self, phase=phase, **changes)

    def closed(self, state: str, now: float) -> Incident:
        """Return the incident closed as `state` (RECOVERED or ESCALATED)."""
        return replace(self, state=state, closed_at=now, deadline=None)

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
        }


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _pack(incident: Incident) -> bytes:
    return bytes(msgpack.packb(asdict(incident)))


def _unpack(data: Any) -> Incident:
    raw = msgpack.unpackb(data)
    raw["steps"] = tuple(Step(**step) for step in raw["steps"])
    for name in ("chosen", "tried", "evidence", "old_incarnations"):
        raw[name] = tuple(raw[name])
    return Incident(**raw)


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
        self, agent: str, *, token: str, now: float, reason: str, beat_mark: str
    ) -> tuple[Incident, bool]:
        """Return the open incident of `agent` and whether it is new; `token` makes a new one's id unique."""
        incident = Incident(f"{agent}-{token}", agent, now, reason=reason, beat_mark=beat_mark)
        keys = [_OPEN, _INCIDENT + incident.id, _ALL, DEADLINES]
        fresh, incident_id = self._run(_OPEN_SCRIPT, keys, [agent, incident.id, _pack(incident), now])
        return self.get(incident_id.decode()), bool(fresh)

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
        newer = replace(incident, version=incident.version + 1)
        keys = [_INCIDENT + incident.id, _OPEN, DEADLINES]
        wake = "" if not incident.is_open or wake_at is None else repr(wake_at)
        if not self._run(
            _SAVE_SCRIPT, keys, [incident.version, _pack(newer), wake, incident.id, incident.agent]
        ):
            raise Stale(f"incident “{incident.id}” was advanced by somebody else")
        return newer

    def open_ids(self) -> dict[str, str]:
        """Return the open incidents: agent -> incident id."""
        return {_text(agent): _text(incident) for agent, incident in self.client.hgetall(_OPEN).items()}

    def all(self) -> Iterator[Incident]:
        """Yield every incident, the newest first."""
        for incident_id in self.client.zrevrange(_ALL, 0, -1):
            data = self.client.hget(_INCIDENT + _text(incident_id), "data")
            if data is not None:
                yield _unpack(data)
