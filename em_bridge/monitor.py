"""The EM's eye: heartbeats from the bus into agent states on the bus.

Promise: each change of state is published once, under the EM's lease, together with the record in `em:states`; a
monitor that has lost its lease publishes nothing (`LeaseLost`). Agents that never beat are not judged. Time is the
server's: an agent's clock does not matter, and while the bus is away nobody dies (see `detector`). What redis-py raises
passes through; the next `step` goes on, and repeats what may not have arrived without doubling it.
"""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import msgpack
import redis

from em_bridge import clock, streams
from em_bridge.detector import Detector, Sight, Transition
from em_bridge.errors import InvalidEvent
from em_bridge.events import AgentState, Heartbeat, decode, encode
from em_bridge.lease import epoch_key
from em_bridge.scripts import Arg, Script
from em_bridge.streams import AGENT_STATE, FLEET, HEARTBEATS, SEEN, STATES

log = logging.getLogger(__name__)

DEFAULT_DEAD_AFTER_S: Final = 60.0
TICK_S: Final = 0.25
"""The pause between two steps."""
REFRESH_S: Final = 1.0
"""How often the fleet's limits are read, and the records of those that beat are written."""
CLOCK_STEP_S: Final = 1.0
"""How far the server's clock and ours may disagree about the time between two steps."""
SAME_REASON_S: Final = 60.0
BATCH: Final = 1000
_MARKER_MS: Final = 3600 * 1000

# KEYS: epoch, state stream, states, marker. ARGV: epoch, marker's life in ms, how many records, (agent, record) of
# each, then the bodies of the events. The marker makes a repetition after a lost reply harmless.
_PUBLISH = Script(
    """
local at = 4 + 2 * tonumber(ARGV[3])
for i = 4, at - 1, 2 do redis.call('HSET', KEYS[3], ARGV[i], ARGV[i + 1]) end
if #ARGV >= at and redis.call('SET', KEYS[4], 1, 'NX', 'PX', ARGV[2]) then
  for i = at, #ARGV do redis.call('XADD', KEYS[2], '*', 'type', 'agent.state', 'body', ARGV[i]) end
end
return 1
""",
    fenced=True,
    kept=True,
)


@dataclass(slots=True)
class _Outgoing:
    """Changes whose publication is not confirmed, with the name of their marker."""

    marker: str
    changes: list[Transition]


class Monitor:
    """Watches all agents but `me` while `epoch` is the newest of the lease `me`.

    Judged are the agents of `em:fleet` that ever beat; with an empty fleet, all that ever beat.
    """

    def __init__(self, client: redis.Redis, *, epoch: int, me: str = "em") -> None:
        self._client = client
        self._epoch = epoch
        self._me = me
        self._limits: dict[str, float] = {}
        self._has_fleet = False
        self.detector = Detector(self._limit)
        self._position: str | None = None
        self._refreshed_at: float | None = None
        self._last_step: tuple[float, float] | None = None
        self._waiting: list[_Outgoing] = []
        self._beaten: set[str] = set()
        self._buried: dict[str, float] = {}

    def _limit(self, agent: str) -> float:
        return self._limits.get(agent, math.inf if self._has_fleet else DEFAULT_DEAD_AFTER_S)

    def step(self) -> list[Transition]:
        """Read what came, judge, publish; return the changes. To be called every `TICK_S`."""
        try:
            return self._step()
        except BaseException:
            # While a call failed, agents may have been unable to beat: nobody can be judged by that time.
            self._last_step = None
            raise

    def _step(self) -> list[Transition]:
        if self._position is None:
            self._begin(streams.server_time(self._client))
        refresh = self._refreshed_at is None or clock.monotonic() - self._refreshed_at >= REFRESH_S
        if refresh:
            self._read_fleet()
            self._refreshed_at = clock.monotonic()
        now = self._read_beats()
        self._notice_gap(now)
        changes = [change for change in self.detector.tick(now) if self._concerns(change.agent)]
        for change in changes:
            log.info("%s is %s: %s", change.agent, change.state, change.reason)
        if changes:
            self._waiting.append(_Outgoing(uuid.uuid4().hex, changes))
        self._publish(renew=refresh)
        return changes

    def _begin(self, now: float) -> None:
        """Start at the stream's end, with what the EM before us knew, and a fresh limit for everyone."""
        position = streams.last_id(self._client, HEARTBEATS)
        records = cast(dict[bytes, bytes], self._client.hgetall(STATES))
        for name in cast(set[bytes], self._client.smembers(SEEN)):
            agent = name.decode("utf-8", "replace")
            if agent != self._me:
                self.detector.watch(agent, now, **read_record(records.get(name)))
        self._position = position

    def _read_fleet(self) -> None:
        fleet = cast(dict[bytes, bytes], self._client.hgetall(FLEET))
        self._has_fleet = bool(fleet)
        self._limits = {
            name.decode("utf-8", "replace"): _positive(_unpacked(raw).get("dead_after"))
            for name, raw in fleet.items()
        }

    def _concerns(self, agent: str) -> bool:
        return not self._has_fleet or agent in self._limits

    def _read_beats(self) -> float:
        """Read until there is nothing new: judging with unread heartbeats would find the living dead.

        Return the server's time of before.
        """
        begun = clock.monotonic()
        now, rows = self._look()
        while rows:
            # What came while we read is newer than `now`: to take it for older would shorten its silence.
            self._take(rows, now + clock.monotonic() - begun)
            if len(rows) < BATCH:
                break
            rows = self._look()[1]
        return now

    def _look(self) -> tuple[float, list[tuple[bytes, streams.Fields]]]:
        """Return the server's time and the next heartbeats, in one round trip."""
        asking: Any = self._client.pipeline(transaction=False)
        asking.time()
        asking.xread({HEARTBEATS: self._position}, count=BATCH)
        (seconds, micros), answer = asking.execute()
        return seconds + micros / 1e6, answer[0][1] if answer else []

    def _take(self, rows: list[tuple[bytes, streams.Fields]], now: float) -> None:
        newcomers: set[str] = set()
        for raw_id, fields in rows:
            entry = raw_id.decode()
            self._position = entry
            try:
                beat = decode(fields, stream=HEARTBEATS)
                assert isinstance(beat, Heartbeat)
            except InvalidEvent as problem:
                self._bury(entry, problem.message, fields, now)
                continue
            if beat.agent == self._me:
                continue
            if beat.agent not in self.detector:
                newcomers.add(beat.agent)
            # Ids do not go back when the server's clock does: they would lie in the future for as long.
            at = min(streams.entry_time(entry), now)
            if self.detector.observe(
                beat.agent, beat.incarnation, at, status=beat.status, entry=entry, pid=beat.pid
            ):
                self._beaten.add(beat.agent)
        if newcomers:
            self._client.sadd(SEEN, *newcomers)

    def _bury(self, entry: str, reason: str, fields: streams.Fields, now: float) -> None:
        """Make a dead letter of an invalid heartbeat: of those with one reason, one in `SAME_REASON_S`."""
        recent = {why: at for why, at in self._buried.items() if 0 <= now - at < SAME_REASON_S}
        if reason not in recent:
            # A broken agent beats every second: one letter says as much as sixty.
            log.warning("heartbeat %s is a dead letter: %s", entry, reason)
            streams.append(self._client, streams.dead_letter(HEARTBEATS, entry, reason, fields, now))
            recent[reason] = now
        self._buried = recent

    def _notice_gap(self, now: float) -> None:
        """Give everyone a fresh limit when nobody watched, or when the server's clock was set.

        The detector sees gaps of the server's clock; this sees the monotonic clock of this process as well.
        """
        mono = clock.monotonic()
        if self._last_step is None:
            self.detector.grace(now)
        else:
            elapsed, by_server = mono - self._last_step[0], now - self._last_step[1]
            if elapsed > self.detector.max_gap_s or abs(elapsed - by_server) > CLOCK_STEP_S:
                log.warning(
                    "%.1f s passed unwatched (%.1f s by redis): fresh limits for all", elapsed, by_server
                )
                self.detector.grace(now)
        self._last_step = (mono, now)

    def _publish(self, *, renew: bool) -> None:
        """Publish what waits, and renew the records of those that beat."""
        while self._waiting:
            group = self._waiting[0]
            bodies = [encode(_event(change))[b"body"] for change in group.changes]
            self._write(group.marker, {change.agent for change in group.changes}, bodies)
            self._waiting.pop(0)
        if self._beaten and renew:
            self._write(uuid.uuid4().hex, self._beaten, [])
            self._beaten = set()

    def _write(self, marker: str, agents: set[str], bodies: list[bytes]) -> None:
        args: list[Arg] = [self._epoch, _MARKER_MS, len(agents)]
        for agent in sorted(agents):
            sight = self.detector.sight(agent)
            args += (agent, write_record(sight or Sight()))
        keys = (epoch_key(self._me), AGENT_STATE, STATES, f"em:once:{marker}")
        _PUBLISH(self._client, keys, [*args, *bodies])


def write_record(sight: Sight) -> bytes:
    """Return the record of `em:states` for an agent."""
    record: bytes = msgpack.packb(
        {
            "state": sight.state,
            "since": sight.since,
            "reason": sight.reason,
            "incarnation": sight.incarnation,
            "last_beat": sight.last_beat,
            "last_entry": sight.last_entry,
            "status": sight.status,
            "pid": sight.pid,
            "retired": list(sight.retired),
        }
    )
    return record


def read_record(raw: bytes | None) -> dict[str, Any]:
    """Return what `Detector.watch` remembers from a record; nothing of one that cannot be read."""
    record = _unpacked(raw or b"\x80")
    shapes = {
        "state": str,
        "since": float,
        "reason": str,
        "incarnation": str,
        "last_beat": float,
        "last_entry": str,
        "retired": list,
    }
    return {key: record[key] for key, shape in shapes.items() if isinstance(record.get(key), shape)}


def read_states(client: redis.Redis) -> dict[str, dict[str, Any]]:
    """Return the record of each agent, as `read_record` does, by its id in lower case."""
    stored = cast(dict[bytes, bytes], client.hgetall(STATES))
    return {name.decode("utf-8", "replace").lower(): read_record(raw) for name, raw in stored.items()}


def _unpacked(raw: bytes) -> Mapping[Any, Any]:
    try:
        found = msgpack.unpackb(raw, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException):
        return {}
    return found if isinstance(found, dict) else {}


def _positive(value: object) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and value > 0 else DEFAULT_DEAD_AFTER_S  # type: ignore[arg-type,operator]  # checked


def _event(change: Transition) -> AgentState:
    return AgentState(change.agent, change.state, change.reason, change.at, change.incarnation)


__all__ = ["Monitor", "read_record", "read_states", "write_record"]
