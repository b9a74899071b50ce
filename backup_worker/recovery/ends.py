"""How an attempt ends: the next one, or a recovery, or a human.

An end is recorded, and told, before it is written: a worker killed in between says it twice, never not at all.
"""

from __future__ import annotations

from dataclasses import replace

from backup_worker.recovery import breakers, notice
from backup_worker.recovery.incident import ESCALATED, FENCE, RECOVERED, Incident
from backup_worker.recovery.ledger import Escalation, Ledger
from em_bridge.errors import AgentBackupError


class Ends(Ledger):
    """What is done when a phase did not work, or was the last."""

    def _retry(self, incident: Incident, why: str, phase: str, *, state_failed: bool = True) -> Incident:
        """Go on with `phase`, or give up after the configured number of attempts.

        A state that failed is not chosen again. With approved changes put back over it, it may have been these: it gets
        another try without them. A critical agent calls a human at the first failure.
        """
        attempts = incident.attempts + 1
        state_failed = state_failed and not incident.reapplied
        tried = (*incident.tried, *incident.chosen[:1]) if state_failed else incident.tried
        missed = (*incident.missed, *incident.reapplied)
        incident = replace(incident, attempts=attempts, tried=tried, chosen=(), deadline=None)
        incident = replace(incident, missed=missed, reapply=False, reapplied=())
        if attempts >= self.config.agents[incident.agent].recovery.attempts:
            if phase == FENCE:
                incident = self._left_stopped(incident)
            return self._give_up(incident, f"{attempts} attempts failed; the last one: {why}")
        if self.config.agents[incident.agent].critical:
            # Nobody waits for the other attempts to be told; they may still bring it back.
            incident = self.escalate(incident, Escalation(f"attempt {attempts} failed: {why}", final=False))
        return self._enter(incident, phase)

    def _left_stopped(self, incident: Incident) -> Incident:
        """End what was started last: a human finds an agent that stands still, not one that is half alive."""
        try:
            grace_s = self.config.agents[incident.agent].recovery.stop_within
            ended = self.adapter_of(incident.agent).stop(term_grace_s=grace_s)
        except AgentBackupError as error:
            return self._noted(incident, FENCE, False, str(error))
        detail = f"ended {', '.join(map(str, ended))}; it is left stopped"
        return self._noted(incident, FENCE, True, detail) if ended else incident

    def _recovered(self, incident: Incident) -> Incident:
        notice.send(self.client, incident, notice.text(incident, self.config.schedule.timezone), self.now())
        detail = f"recovered from {', '.join(incident.chosen)}"
        return self._closed(replace(incident, attempts=incident.attempts + 1), RECOVERED, detail)

    def _give_up(self, incident: Incident, reason: str) -> Incident:
        # The evidence is written first: an incident must not say “escalated” with nothing for the human to read.
        return self._closed(self.escalate(incident, Escalation(reason)), ESCALATED, reason)

    def _closed(self, incident: Incident, state: str, detail: str) -> Incident:
        closed = incident.closed(state, self.now(), self._last_beat())
        self.record(closed, state, state == RECOVERED, detail)
        if state == RECOVERED and not (closed.by_hand and not closed.attempts):
            breakers.count(self.client, closed)
        return self.store.save(closed, wake_at=None)
