"""Heartbeats in, agent states out: a pure failure detector.

Promise: an agent is DEAD only after `limit` seconds of silence during which this detector was watching all the time, by
one clock (the server's). After any gap (no tick for a while, a clock that jumped, `grace`) everyone starts with a fresh
limit. A heartbeat of an incarnation that was replaced never counts again. It does no input or output and cannot fail.

    from      to         when
    any       ALIVE      a heartbeat with status “ok” (or none), younger than half the limit
    ALIVE     DEGRADED   silent for half the limit, or a status other than “ok”
    any       DEAD       silent for the limit
    DEAD      stays      until a heartbeat of an incarnation that was not replaced
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from em_bridge.events import ALIVE, DEAD, DEGRADED

MAX_GAP_S: Final = 2.0
"""A longer pause between two ticks means that nobody was watching."""
RETIRED: Final = 16
"""Replaced incarnations remembered per agent."""


@dataclass(frozen=True, slots=True)
class Transition:
    """An agent's change of state, at `at` by the server's clock."""

    agent: str
    before: str | None
    state: str
    reason: str
    at: float
    incarnation: str | None


@dataclass(slots=True)
class Sight:
    """What the detector knows of one agent; times in Unix seconds of the server's clock."""

    state: str | None = None
    since: float = 0.0
    reason: str = ""
    incarnation: str | None = None
    last_beat: float | None = None
    last_entry: str | None = None
    status: str = ""
    pid: int | None = None
    retired: deque[str] = field(default_factory=lambda: deque(maxlen=RETIRED))
    watched_from: float = 0.0
    fresh: bool = False


class Detector:
    """Judges agents by their heartbeats; `limits(agent)` is the silence in seconds after which it is DEAD.

    A limit may be infinite: then silence says nothing about the agent.
    """

    def __init__(self, limits: Callable[[str], float], *, max_gap_s: float = MAX_GAP_S) -> None:
        self._limits = limits
        self.max_gap_s = max_gap_s
        self._agents: dict[str, Sight] = {}
        self._last_tick: float | None = None

    def __contains__(self, agent: str) -> bool:
        return agent in self._agents

    def sight(self, agent: str) -> Sight | None:
        """Return what is known of `agent`."""
        return self._agents.get(agent)

    def agents(self) -> list[str]:
        """Return the agents that are judged."""
        return list(self._agents)

    def watch(
        self,
        agent: str,
        now: float,
        *,
        state: str | None = None,
        since: float = 0.0,
        reason: str = "",
        incarnation: str | None = None,
        last_beat: float | None = None,
        last_entry: str | None = None,
        retired: Iterable[str] = (),
    ) -> None:
        """Begin to judge `agent` from what is remembered of it, with a fresh limit from `now`."""
        sight = Sight(state, since or now, reason, incarnation, last_beat, last_entry)
        sight.retired.extend(retired)
        sight.watched_from = now
        self._agents[agent] = sight

    def forget(self, agent: str) -> None:
        """Stop judging `agent`."""
        self._agents.pop(agent, None)

    def observe(
        self,
        agent: str,
        incarnation: str,
        at: float,
        *,
        status: str = "",
        entry: str | None = None,
        pid: int | None = None,
    ) -> bool:
        """Take one heartbeat, which the server got at `at`; False if it is from a replaced incarnation."""
        sight = self._agents.get(agent)
        if sight is None:
            self.watch(agent, at)
            sight = self._agents[agent]
        if incarnation in sight.retired:
            return False
        if sight.incarnation is not None and incarnation != sight.incarnation:
            sight.retired.append(sight.incarnation)
        sight.incarnation = incarnation
        sight.last_beat = at
        sight.last_entry = entry
        sight.status = status
        sight.pid = pid
        sight.fresh = True
        return True

    def grace(self, now: float) -> None:
        """Give everyone a fresh limit from `now`: nobody could be watched before."""
        for sight in self._agents.values():
            sight.watched_from = now
            # A beat “in the future” (the clock was set back) would hide a death until the clock is there again.
            if sight.last_beat is not None:
                sight.last_beat = min(sight.last_beat, now)

    def tick(self, now: float) -> list[Transition]:
        """Judge everyone at `now`; return what changed, in the agents' order of appearance."""
        if self._last_tick is None or not 0 <= now - self._last_tick <= self.max_gap_s:
            self.grace(now)
        self._last_tick = now
        changes = (self._judge(agent, sight, now) for agent, sight in self._agents.items())
        return [change for change in changes if change is not None]

    def _judge(self, agent: str, sight: Sight, now: float) -> Transition | None:
        state, reason = self._verdict(agent, sight, now)
        sight.fresh = False
        if state is None or state == sight.state:
            return None
        change = Transition(agent, sight.state, state, reason, now, sight.incarnation)
        sight.state, sight.since, sight.reason = state, now, reason
        return change

    def _verdict(self, agent: str, sight: Sight, now: float) -> tuple[str | None, str]:
        limit = self._limits(agent)
        silent = now - max(sight.watched_from, sight.last_beat or 0.0)
        if silent >= limit:
            return DEAD, f"no heartbeat for {_seconds(now - (sight.last_beat or sight.watched_from))}"
        if sight.state == DEAD and not sight.fresh:
            # A fresh limit is no sign of life.
            return DEAD, sight.reason
        if sight.last_beat is None:
            return None, ""
        if sight.status not in ("", "ok"):
            return DEGRADED, f"says “{sight.status[:200]}”"
        if silent >= limit / 2:
            return DEGRADED, f"no heartbeat for {_seconds(silent)}"
        if sight.fresh or sight.state is None:
            return ALIVE, "first heartbeat" if sight.state is None else "heartbeats again"
        return sight.state, sight.reason


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"
