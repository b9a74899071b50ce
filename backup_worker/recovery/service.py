"""Opens incidents and advances them, with the record, the alerts and the evidence that belong to it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from backup_worker.recovery import evidence, heartbeats, processes
from backup_worker.recovery.incident import RECOVERED, Incident, IncidentStore
from backup_worker.recovery.machine import Escalation, Recovery
from backup_worker.recovery.states import States
from backup_worker.runtime import Runtime
from em_bridge import clock, streams
from em_bridge.events import DEAD

BEATS_IN_REPORT = 20
BEATS_WINDOW_S = 3600.0


@dataclass(slots=True)
class RecoveryService:
    """Recovery as the rest of the program sees it."""

    runtime: Runtime

    @property
    def store(self) -> IncidentStore:
        """The incidents."""
        return IncidentStore(self.runtime.redis)

    def on_state(self, agent: str, state: str, reason: str, at: float) -> str | None:
        """Record that `agent` is in `state` since `at`; return the id of the incident of a DEAD one.

        Word of a death from before the end of the agent's last recovery is old news, and opens nothing.
        """
        self.runtime.config.agent(agent)
        if state != DEAD:
            self.runtime.record("agent-state", agent=agent, state=state, reason=reason)
            return None
        last = next((incident for incident in self.store.all() if incident.agent == agent), None)
        if last is not None and last.closed_at is not None and at <= last.closed_at:
            self.runtime.record(
                "agent-state", agent=agent, state=state, reason=f"{reason} (before {last.id} ended)"
            )
            return None
        opened = self.open(agent, reason)
        self.advance(opened.id)
        return opened.id

    def open(self, agent: str, reason: str) -> Incident:
        """Return the open incident of `agent`, a new one if there is none; raises NotFound for an unknown agent."""
        self.runtime.config.agent(agent)
        now = clock.now()
        token = f"{datetime.fromtimestamp(now, UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"
        mark = streams.last_id(self.runtime.redis, streams.HEARTBEATS)
        incident, is_new = self.store.open(agent, token=token, now=now, reason=reason, beat_mark=mark)
        if is_new:
            self.runtime.record(
                "recovery", agent=agent, incident=incident.id, step="open", ok=True, detail=reason
            )
            title = f"{agent} is dead; recovering it"
            self.runtime.alert(f"recovery/{agent}", "warning", title, f"{incident.id}: {reason}", agent=agent)
        return incident

    def advance(self, incident_id: str) -> Incident:
        """Advance an incident as far as it goes now; raises NotFound."""
        return self._machine().advance(incident_id)

    def _machine(self) -> Recovery:
        runtime = self.runtime
        states = States(runtime.config, runtime.repository)
        return Recovery(
            runtime.redis, runtime.config, states, runtime.redis_url, self._record, self._escalate
        )

    def _record(self, incident: Incident, step: str, ok: bool, detail: str) -> None:
        self.runtime.record(
            "recovery", agent=incident.agent, incident=incident.id, step=step, ok=ok, detail=detail
        )
        if step == RECOVERED:
            self.runtime.resolve(f"recovery/{incident.agent}")
            self.runtime.resolve(f"escalation/{incident.agent}")

    def _escalate(self, incident: Incident, escalation: Escalation) -> Incident:
        machine = self._machine()
        folder = machine.evidence_folder(incident)
        has_config = incident.agent in self.runtime.config.agents
        log_lines = processes.last_log_lines(machine.process_of(incident.agent)) if has_config else []
        report = evidence.write(
            folder,
            incident,
            reason=escalation.reason,
            log_lines=log_lines,
            beats=self._recent_beats(incident.agent),
            repository=self.runtime.config.schedule.repository,
            now=clock.now(),
        )
        title = f"{incident.agent} could not be recovered"
        body = f"{escalation.reason}. Everything that is known: {report}"
        self.runtime.alert(f"escalation/{incident.agent}", "critical", title, body, agent=incident.agent)
        self.runtime.resolve(f"recovery/{incident.agent}")
        return replace(incident, evidence=(*incident.evidence, str(folder)))

    def _recent_beats(self, agent: str) -> list[tuple[str, str]]:
        client = self.runtime.redis
        since = streams.id_at(max(0.0, streams.server_time(client) - BEATS_WINDOW_S))
        beats = heartbeats.read(client, heartbeats.Beats(cursor=since))
        return list(beats.by_agent.get(agent.lower(), ()))[-BEATS_IN_REPORT:]
