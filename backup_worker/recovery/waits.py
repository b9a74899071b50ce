"""What a recovery waits for before it acts: the second witness of a death, and the agents that it depends on.

Waiting ends this run; heartbeats and deadlines bring the incident back. What is held because something is wrong with
the bus, the host or a dependency stays held until that is mended, or a human decides: it is never acted on for want of
patience.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from backup_worker.recovery import breakers, watching, witnesses
from backup_worker.recovery.ends import Ends
from backup_worker.recovery.incident import CONFIRM, DEPEND, ESCALATED, FENCE, RECOVERED, START, Incident
from backup_worker.recovery.pacemaker import missing_dependencies
from em_bridge.errors import AgentBackupError

if TYPE_CHECKING:
    from backup_worker.config import AgentConfig

LOOK_AGAIN_S = 2.0
"""While an agent has to prove that it lives, its process is looked at this often: one that exits fails at once."""

HELD_LOOK_S = 10.0
"""What is held is woken by what it waits for; this is for what nobody tells."""

HOLD = "hold"
"""The step of an incident that is held: much of the fleet is silent, or a dependency could not be recovered."""


class Waits(Ends):
    """The two phases before something is done: `confirm` before the old process is ended, `depend` before a start."""

    def _confirm(self, incident: Incident, agent: AgentConfig) -> Incident | None:
        if incident.by_hand or agent.start is None:
            # A human's word is witness enough; without a `start` nobody can be asked, and nothing will be ended.
            return self._enter(incident, FENCE)
        now = self.now()
        together = witnesses.silent_together(self.client, self.config, incident.agent, incident.opened_at)
        verdict = self._verdict(incident, agent, now, mass=bool(together))
        if verdict.finding == witnesses.ALIVE:
            return self._back(incident, verdict.detail)
        if together:
            problems = witnesses.unwell(
                self.client, self.config.schedule.state, up_for_s=agent.heartbeat.dead_after
            )
            self.mass(together, problems)
            if problems or not verdict.is_dead:
                why = "; ".join([*problems, verdict.detail])
                return self._hold(incident, f"{len(together)} agents fell silent together: {why}", now)
        if not verdict.is_dead:
            return self._sleep(incident, now + min(LOOK_AGAIN_S, agent.heartbeat.dead_after))
        return self._enter(self._noted(incident, CONFIRM, True, verdict.detail), FENCE)

    def _verdict(
        self, incident: Incident, agent: AgentConfig, now: float, *, mass: bool
    ) -> witnesses.Verdict:
        try:
            running = self.adapter_of(incident.agent).running()
        except (AgentBackupError, OSError):
            # Unknown never kills. The fence asks again, and says what is wrong.
            running = None
        beats = self._beats(incident.beat_mark, incident.agent)
        fresh_since = now - agent.heartbeat.dead_after
        steady = beats.is_steady(
            incident.agent, incident.beat_mark, agent.heartbeat.stable_beats, fresh_since
        )
        heard_at = beats.last_at(incident.agent) or incident.opened_at
        silent_s = now - watching.not_before(self.client, heard_at, now)
        return witnesses.judge(
            running, steady=steady, silent_s=silent_s, limit_s=agent.heartbeat.dead_after, mass=mass
        )

    def _with_watched_deadline(self, incident: Incident, limit_s: float, now: float) -> Incident:
        """Return the incident with a deadline before which `limit_s` seconds were watched without a gap."""
        if incident.deadline is None:
            return incident
        begun = watching.not_before(self.client, incident.deadline - limit_s, now)
        return replace(incident, deadline=begun + limit_s)

    def _back(self, incident: Incident, detail: str) -> Incident:
        """Close the incident of an agent that lives; one that does this all the time is given to a human."""
        tripped = breakers.agent_tripped(self.client, self.config, incident.agent, self.now())
        if tripped is not None:
            return self._give_up(self._noted(incident, breakers.BREAKER, False, tripped), tripped)
        return self._closed(self._noted(incident, CONFIRM, True, detail), RECOVERED, detail)

    def _hold(self, incident: Incident, detail: str, now: float) -> Incident | None:
        if not incident.steps or incident.steps[-1].step != HOLD:
            incident = self._noted(incident, HOLD, True, detail)
        return self._sleep(incident, now + HELD_LOOK_S)

    def _patience_s(self, agent: AgentConfig) -> float:
        """Return for how long the agent waits for those that it needs: the death of one of them may yet be noticed."""
        needed = (self.config.agents.get(name) for name in agent.depends_on)
        notice_s = max((one.heartbeat.dead_after for one in needed if one is not None), default=0.0)
        return agent.heartbeat.verify_within + notice_s

    def _depend(self, incident: Incident, agent: AgentConfig) -> Incident | None:
        if agent.depends_on:
            beats = self._beats(incident.beat_mark, *agent.depends_on)
            latest = self.store.latest(agent.depends_on)
            missing = missing_dependencies(incident, agent.depends_on, latest, beats)
            if missing:
                return self._wait_for(incident, agent, missing, latest)
        detail = f"{', '.join(agent.depends_on)} alive" if agent.depends_on else "depends on nobody"
        return self._enter(self._noted(incident, DEPEND, True, detail), START)

    def _wait_for(
        self, incident: Incident, agent: AgentConfig, missing: list[str], latest: Mapping[str, Incident]
    ) -> Incident | None:
        now = self.now()
        incident = self._with_watched_deadline(incident, self._patience_s(agent), now)
        last = {name: latest[name] for name in missing if name in latest}
        is_late = incident.deadline is not None and now >= incident.deadline
        since = 0.0 if is_late else incident.opened_at
        fallen = [name for name, one in last.items() if _escalated_since(one, since)]
        # An open recovery of a dependency has deadlines of its own; only one that nobody works on is given up.
        idle = [
            name
            for name in missing
            if is_late and name not in fallen and not (name in last and last[name].is_open)
        ]
        if fallen or idle:
            what = [f"{', '.join(fallen)} could not be recovered"] if fallen else []
            what += [f"nothing was heard of {', '.join(idle)}"] if idle else []
            if agent.recovery.without_dependencies == "start" and len(fallen) + len(idle) == len(missing):
                detail = f"{' and '.join(what)}; it is started without, as recovery.without_dependencies says"
                return self._enter(self._noted(incident, DEPEND, False, detail), START)
            if idle:
                # Nobody else has called a human about these.
                reason = f"no beat of {', '.join(idle)}, which it needs"
                return self._give_up(self._noted(incident, DEPEND, False, reason), reason)
            names = ", ".join(fallen)
            why = f"it needs {names}, which could not be recovered: it starts when {names} lives"
            return self._hold(incident, why, now)
        if not incident.steps or incident.steps[-1].step != "wait":
            incident = self._noted(incident, "wait", True, f"for {', '.join(missing)}")
        return self._sleep(incident, now + LOOK_AGAIN_S)


def _escalated_since(incident: Incident, since: float) -> bool:
    return incident.state == ESCALATED and (incident.closed_at or 0.0) >= since
