"""Opens incidents and advances them, with the record, the alerts and the evidence that belong to it."""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from backup_worker.alerts import Severity
from backup_worker.queueing.due import IncidentDue
from backup_worker.recovery import breakers, evidence, heartbeats, reapplied
from backup_worker.recovery.breakers import Pause
from backup_worker.recovery.incident import (
    CONFIRM,
    ESCALATED,
    FENCE,
    RECOVERED,
    Incident,
    IncidentStore,
    Missed,
    Stale,
    after,
    attempted_before,
)
from backup_worker.recovery.ledger import Escalation
from backup_worker.recovery.machine import OPENED, Recovery
from backup_worker.recovery.states import States
from backup_worker.recovery.witnesses import last_heard
from backup_worker.runtime import Runtime
from em_bridge import streams
from em_bridge.errors import AgentBackupError
from em_bridge.events import DEAD

log = logging.getLogger(__name__)

PAUSED_ALERT = "recovery-paused"
MASS_ALERT = "mass-silence"
BEATS_IN_REPORT = 20
BEATS_WINDOW_S = 3600.0
"""How far back its last heartbeats are looked for, if the EM has not noted when it was heard."""
BEATS_BEFORE_S = 60.0


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
        last = self.store.latest([agent]).get(agent)
        if last is not None and (last.closed_at or 0.0) > streams.server_time(self.runtime.redis):
            # The clock was set back since: nothing can be said of what was first.
            last = None
        if last is not None and last.closed_at is not None and at <= last.closed_at:
            self.runtime.record(
                "agent-state", agent=agent, state=state, reason=f"{reason} (before {last.id} ended)"
            )
            return None
        opened, _ = self._open(agent, reason, phase=CONFIRM, **self._continuing(agent, last, at))
        self.advance(opened.id)
        return opened.id

    def open(self, agent: str, reason: str, *, reapply: bool = False) -> Incident:
        """Return the open incident of `agent`, a new one if there is none; a worker takes it up at once.

        With `reapply`, the approved changes that the last recovery has left out, or that the chosen state does not
        hold, are put back over it.

        Raises NotFound for an unknown agent.
        """
        missed = self.left_out(agent) if reapply else ()
        incident, is_new = self._open(agent, reason, by_hand=True, reapply=reapply, missed=missed)
        if is_new:
            streams.append_once(
                self.runtime.redis, IncidentDue(incident.id), once=f"incident/{incident.id}/opened"
            )
        elif incident.phase == CONFIRM and not incident.by_hand:
            # It need not wait any longer for a second witness: a human is one.
            with contextlib.suppress(Stale):
                now = streams.server_time(self.runtime.redis)
                incident = self.store.save(replace(incident, by_hand=True), wake_at=now)
        return incident

    def left_out(self, agent: str) -> tuple[Missed, ...]:
        """Return the approved changes that the agent's last recovery has left out."""
        last = self.store.latest([agent]).get(agent)
        return last.missed if last is not None and last.state == RECOVERED else ()

    def _open(self, agent: str, reason: str, **facts: Any) -> tuple[Incident, bool]:
        self.runtime.config.agent(agent)
        now = streams.server_time(self.runtime.redis)
        token = f"{datetime.fromtimestamp(now, UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"
        mark = streams.last_id(self.runtime.redis, streams.HEARTBEATS)
        as_of = max(now, self._newest_snapshot_at(agent))
        return self.store.open(
            agent, token=token, now=now, reason=reason, beat_mark=mark, as_of=as_of, **facts
        )

    def _newest_snapshot_at(self, agent: str) -> float:
        """Return when the newest snapshot was made: the future, if the clock was set back since."""
        try:
            return max((head.created_at for head in self.runtime.repository.snapshots(agent)), default=0.0)
        except (AgentBackupError, OSError) as error:
            log.error("the snapshots of %s cannot be listed: %s", agent, error)
            return 0.0

    def _continuing(self, agent: str, last: Incident | None, at: float) -> dict[str, Any]:
        """Return what the incident of a death told at `at` takes over from the agent's last one."""
        limits = self.runtime.config.agent(agent)
        # A death is told when the silence has lasted: the last beat says when it was.
        heard_at = last_heard(self.runtime.redis, agent)
        died_at = heard_at if heard_at is not None else at - limits.heartbeat.dead_after
        return after(attempted_before(last, died_at, limits.recovery.stable_for))

    def advance(self, incident_id: str) -> Incident:
        """Advance an incident as far as it goes now; raises NotFound."""
        self.end_pause_in_time()
        return self._machine().advance(incident_id)

    def pause(self, by: str, reason: str, *, until: float | None = None) -> Pause:
        """Hold every recovery that has not begun to act, until `until` (Unix seconds) or a resume; say so loudly."""
        now = streams.server_time(self.runtime.redis)
        pause = breakers.pause(self.runtime.redis, Pause(now, by, reason, until))
        self.runtime.record("recovery-paused", by=by, reason=reason, until=until)
        why = f"by {by}: {reason or 'no reason given'}"
        body = f"{why}. Dead agents stay dead. Go on with `backup-worker resume-recovery`"
        severity: Severity = "critical" if by == breakers.BREAKER else "warning"
        self.runtime.alert(PAUSED_ALERT, severity, "recovery is paused", body)
        return pause

    def resume(self, by: str) -> Pause | None:
        """Let recovery go on, what was held first; return the pause that is over, None if there was none."""
        now = streams.server_time(self.runtime.redis)
        ended = breakers.resume(self.runtime.redis, now)
        self._go_on(ended, by, now)
        return ended

    def _go_on(self, ended: Pause | None, by: str, now: float) -> None:
        # Also without a pause: whoever ended it may have died before this.
        self.store.wake(FENCE, now)
        self.runtime.resolve(PAUSED_ALERT)
        if ended is not None:
            self.runtime.record("recovery-resumed", by=by, since=ended.since, reason=ended.reason)

    def end_pause_in_time(self) -> None:
        """Resume if the time of the pause is over."""
        known = breakers.stored(self.runtime.redis)
        if known is not None and known.until is not None:
            now = streams.server_time(self.runtime.redis)
            ended = breakers.end_in_time(self.runtime.redis, now)
            if ended is not None:
                self._go_on(ended, "its time was over", now)

    def _trip(self, reason: str) -> Pause:
        return self.pause(breakers.BREAKER, reason)

    def _machine(self) -> Recovery:
        runtime = self.runtime
        states = States(runtime.config, runtime.repository)
        return Recovery(
            runtime.redis, runtime.config, states, runtime.redis_url,
            self._record, self._escalate, self._trip, self._mass,
        )  # fmt: skip

    def _mass(self, agents: Sequence[str], problems: Sequence[str]) -> None:
        found = "; ".join(problems) if problems else "the bus and this host are well"
        doing = "nobody is recovered before that is mended" if problems else "who has ended is recovered"
        body = (
            f"{', '.join(agents)}. {found}: {doing}. Who still runs is left alone until it beats or ends, or you say "
            "`backup-worker recover AGENT`"
        )
        title = f"{len(agents)} of {len(self.runtime.config.agents)} agents fell silent at once"
        self.runtime.alert(MASS_ALERT, "critical", title, body)

    def _record(self, incident: Incident, step: str, ok: bool, detail: str) -> None:
        self.runtime.record(
            "recovery", agent=incident.agent, incident=incident.id, step=step, ok=ok, detail=detail
        )
        if step == OPENED:
            title = f"{incident.agent} is dead; recovering it"
            body = f"{incident.id}: {incident.reason}"
            self.runtime.alert(f"recovery/{incident.agent}", "warning", title, body, agent=incident.agent)
        if step == RECOVERED:
            self.runtime.resolve(f"recovery/{incident.agent}")
            self.runtime.resolve(f"escalation/{incident.agent}")
            self.runtime.resolve(f"attempt/{incident.agent}")
        if step in (RECOVERED, ESCALATED) and not self.store.open_ids().keys() - {incident.agent}:
            self.runtime.resolve(MASS_ALERT)
        if step == RECOVERED and incident.reapplied:
            reapplied.store(self.runtime, incident, streams.server_time(self.runtime.redis))

    def _escalate(self, incident: Incident, escalation: Escalation) -> Incident:
        folder = self._machine().evidence_folder(incident)
        report = evidence.write(folder, self._facts(incident, escalation))
        body = f"{escalation.reason}. {report}"
        if not escalation.final:
            title = f"{incident.agent} did not come back; its recovery goes on"
            self.runtime.alert(f"attempt/{incident.agent}", "critical", title, body, agent=incident.agent)
            return incident
        title = f"{incident.agent} could not be recovered"
        self.runtime.alert(f"escalation/{incident.agent}", "critical", title, body, agent=incident.agent)
        self.runtime.resolve(f"recovery/{incident.agent}")
        self.runtime.resolve(f"attempt/{incident.agent}")
        return replace(incident, evidence=(*incident.evidence, str(folder)))

    def _facts(self, incident: Incident, escalation: Escalation) -> evidence.Facts:
        schedule = self.runtime.config.schedule
        log_lines, running, ended = self._of_the_process(incident.agent)
        try:
            heads = self.runtime.repository.snapshots(incident.agent)
            snapshots = sorted(heads, key=lambda head: head.created_at, reverse=True)
        except (AgentBackupError, OSError) as error:
            log.error("the snapshots of %s cannot be listed: %s", incident.agent, error)
            snapshots = None
        return evidence.Facts(
            incident=incident,
            reason=escalation.reason,
            now=streams.server_time(self.runtime.redis),
            zone=schedule.timezone,
            beats=self._recent_beats(incident.agent),
            log_lines=log_lines,
            snapshots=snapshots,
            running=running,
            ended=ended,
            config=self.runtime.config.directory,
            dependents=self._waiting_for(incident.agent),
            repository=schedule.repository,
            final=escalation.final,
        )

    def _waiting_for(self, agent: str) -> list[str]:
        """Return the agents that are dead too, and wait for this one."""
        agents = self.runtime.config.agents
        return sorted(
            one for one in self.store.open_ids() if one in agents and agent in agents[one].depends_on
        )

    def _of_the_process(self, agent: str) -> tuple[list[str], list[str] | None, str]:
        """Return the agent's last log lines, its processes (None if nobody can say), and how the last one ended."""
        if agent not in self.runtime.config.agents:
            return [], [], ""
        try:
            adapter = self._machine().adapter_of(agent)
            return adapter.log_lines(), [str(one) for one in adapter.running()], adapter.last_end()
        except (AgentBackupError, OSError) as error:
            log.error("the process of %s cannot be looked at: %s", agent, error)
            return [], None, ""

    def _recent_beats(self, agent: str) -> list[tuple[str, str]]:
        client = self.runtime.redis
        heard_at = last_heard(client, agent) or streams.server_time(client) - BEATS_WINDOW_S
        since = streams.id_at(max(0.0, heard_at - BEATS_BEFORE_S))
        beats = heartbeats.read(client, heartbeats.Beats(cursor=since), only=[agent])
        return list(beats.by_agent.get(agent.lower(), ()))[-BEATS_IN_REPORT:]
