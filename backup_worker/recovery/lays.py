"""Which files the agent gets: the phases `select` and `restore`.

The newest good state that was not tried decides, as of the death. If the host, or all that ran on it, was started anew
since the agent was heard, it did not die of its files: it is first started on them, if they are sane.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from backup_worker.approval import approvals, changes
from backup_worker.recovery import notice, witnesses
from backup_worker.recovery.evidence import keep_log
from backup_worker.recovery.incident import CURRENT, DEPEND, RESTORE, SELECT, Incident, Missed
from backup_worker.recovery.waits import Waits
from backup_worker.snapshots.errors import printable
from backup_worker.units import counted, size
from em_bridge.errors import NotFound

if TYPE_CHECKING:
    from backup_worker.config import AgentConfig
    from backup_worker.recovery.loss import Loss
    from backup_worker.snapshots import RestorePlan

REAPPLY = "reapply"
"""The step of approved changes that were put back over the restored state."""


class Lays(Waits):
    """The phases that choose a state and lay it down."""

    def _select(self, incident: Incident, agent: AgentConfig) -> Incident:
        why = self._why_current(incident, agent)
        if why:
            problems = self.states.problems_on_disk(incident.agent)
            if not problems:
                detail = f"the state on disk is sane: starting on it first{why}"
                chosen = self._noted(incident, SELECT, True, detail)
                return self._enter(
                    chosen, DEPEND, chosen=(CURRENT,), deadline=self.now() + self._patience_s(agent)
                )
            insane = "the state on disk is not sane: " + "; ".join(problems)
            incident = self._keep(self._noted(incident, SELECT, False, insane))
        # As of the death: what was stored of the dead agent since is no state to go back to.
        try:
            plan = self.states.choose(incident.agent, as_of=incident.known_until, exclude=incident.tried)
        except NotFound:
            if incident.attempts > incident.inherited or not incident.inherited:
                raise
            # It lived on that state for a while, and there is no other one.
            incident = replace(incident, tried=())
            plan = self.states.choose(incident.agent, as_of=incident.known_until, exclude=())
        chosen = self._noted(incident, SELECT, True, "state of " + ", ".join(plan.sources))
        return self._enter(chosen, RESTORE, chosen=plan.sources)

    def _why_current(self, incident: Incident, agent: AgentConfig) -> str:
        """Return why the state on disk gets the first start, empty if it does not."""
        if incident.tried or (incident.by_hand and incident.reapply):
            return ""
        heard_at = witnesses.last_heard(self.client, incident.agent)
        if not incident.by_hand and heard_at is not None and self.now() - heard_at > witnesses.up_s():
            return ", since the host was started after it was heard last"
        return ", as recovery.first_try says" if agent.recovery.first_try == CURRENT else ""

    def _restore(self, incident: Incident, agent: AgentConfig) -> Incident:
        stood, tree = agent.root.is_dir(), self._next_tree(incident)
        keep_log(tree, self.adapter_of(incident.agent).log_lines())
        result, plan = self.states.restore(
            incident.agent,
            as_of=incident.known_until,
            exclude=incident.tried,
            evidence=tree,
        )
        evidence = (*incident.evidence, str(result.evidence)) if result.evidence else incident.evidence
        detail = f"{counted(result.files, 'file')}, {size(result.bytes)}, verified and swapped in"
        if result.evidence:
            detail += f"; what stood there is in {result.evidence}"
        else:
            detail += "; it stood there already" if stood else "; there was no root any more"
        incident, loss = self._with_loss(replace(incident, evidence=evidence), plan, stood=stood)
        done = self._noted(incident, RESTORE, True, f"{detail}; {loss}")
        if done.reapply:
            done = self._put_back(done)
        # The state is chosen anew for the restore, so what was restored is what counts.
        return self._enter(done, DEPEND, chosen=result.sources, deadline=self.now() + self._patience_s(agent))

    def _next_tree(self, incident: Incident) -> Path:
        return self.evidence_folder(incident) / f"tree-{len(incident.evidence) + 1}"

    def _with_loss(self, incident: Incident, plan: RestorePlan, *, stood: bool) -> tuple[Incident, Loss]:
        # Against what stood there at the death: later trees are those of states that were tried.
        kept = Path(incident.evidence[0]) if incident.evidence else None
        known = changes.all_changes(self.client, approvals.rules(self.config))
        loss = self.states.loss(plan, kept, known, stood=stood, until=incident.known_until)
        lost = tuple(map(printable, (loss.lost or ())[: notice.SHOWN]))
        count = None if loss.lost is None else len(loss.lost)
        # What was left out before, by this incident or the one that it follows, is in no older state either.
        wanted = [one for one in incident.missed if one not in loss.missed]
        missed = (*wanted, *loss.missed)
        return replace(incident, state_at=loss.state_at, lost=lost, lost_count=count, missed=missed), loss

    def _put_back(self, incident: Incident) -> Incident:
        """Lay the content of approved changes over the restored state; what cannot be put back stays missed."""
        done: list[Missed] = []
        kept: list[Missed] = []
        for change in incident.missed:
            problem = self.states.put_back(incident.agent, change, evidence=self._next_tree(incident))
            (kept if problem else done).append(change)
            detail = f"{change}: " + (problem or f"put back from {change.snapshot}")
            incident = self._noted(incident, REAPPLY, not problem, detail)
        return replace(incident, missed=tuple(kept), reapplied=tuple(done))
