"""Advances one incident, phase by phase, until it waits or is closed.

`advance` may be called at any time, by any number of workers on the agent's host, for any reason: a kernel lock an
agent lets one of them act, and the incident's version keeps one that lost the lock from writing. A phase is written
down before its work begins, and its work may be done twice. What fails is an outcome, recorded as a step: only Redis
being away, and programming errors, leave this module as exceptions; the incident's deadline then brings it back, and
what comes back too often without getting anywhere is escalated. An end is recorded, and told, before it is written: a
worker killed in between says it twice, never not at all. Times are the server's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from backup_worker import changes
from backup_worker.recovery import breakers, heartbeats, notice
from backup_worker.recovery.checkup import Checkup, examine
from backup_worker.recovery.incident import (
    CURRENT,
    DEPEND,
    ESCALATED,
    FENCE,
    MAX_RESUMES,
    PROVE,
    RECOVERED,
    RESTORE,
    SELECT,
    START,
    Incident,
    Stale,
)
from backup_worker.recovery.ledger import Escalation, Ledger
from backup_worker.recovery.locks import acting_on
from backup_worker.recovery.pacemaker import missing_dependencies
from backup_worker.snapshots import NoSpace
from backup_worker.snapshots.errors import printable
from em_bridge.errors import AgentBackupError, RedisUnavailable

if TYPE_CHECKING:
    from backup_worker.config import AgentConfig
    from backup_worker.snapshots import RestorePlan

HEALTH = "health"
"""The step of an examination that an agent did not pass."""

HELD = "paused"
"""The step of an incident that waits because recovery is paused."""

HELD_LOOK_S = 10.0
"""A resume wakes what was held; this is for one that is lost."""

NOTICE = "notice"
"""The step of a notice that could not be left for the agent."""

OPENED = "open"
"""The first step of every incident."""

LOOK_AGAIN_S = 2.0
"""While an agent has to prove that it lives, its process is looked at this often: one that exits fails at once."""

SURVIVOR_WINDOW_S = 300.0
"""How far back in the heartbeats incarnations are looked up that must not count as new."""


class Recovery(Ledger):
    """The executor: one method for each phase."""

    def advance(self, incident_id: str) -> Incident:
        """Run the incident's phases until it waits or is closed, and return it; raises NotFound for an unknown id."""
        agent = self.store.get(incident_id).agent
        with acting_on(agent, self.config.schedule.state) as held, contextlib.suppress(Stale):
            incident = self._taken_up(self.store.get(incident_id)) if held else None
            while incident is not None and incident.is_open:
                incident = self._run_phase(incident)
        return self.store.get(incident_id)

    def _taken_up(self, incident: Incident) -> Incident:
        """Note that the phase is begun once more; one that has killed every worker so far goes to a human."""
        if not incident.is_open:
            return incident
        if not incident.steps:
            incident = self._noted(incident, OPENED, True, incident.reason)
        if incident.resumes >= MAX_RESUMES:
            return self._give_up(
                incident, f"{incident.phase} was begun {incident.resumes} times and never came to an end"
            )
        return self._keep(replace(incident, resumes=incident.resumes + 1))

    # ── phases ────────────────────────────────────────────────────────────────────────────────────────────────

    def _run_phase(self, incident: Incident) -> Incident | None:
        """Return the incident in its next phase, or None if it waits."""
        agent = self.config.agents.get(incident.agent)
        if agent is None:
            return self._give_up(incident, f"agent “{incident.agent}” is no longer in agents.json")
        phases: dict[str, Callable[[Incident, AgentConfig], Incident | None]] = {
            FENCE: self._fence,
            SELECT: self._select,
            RESTORE: self._restore,
            DEPEND: self._depend,
            START: self._start,
            PROVE: self._prove,
        }
        try:
            return phases[incident.phase](incident, agent)
        except (Stale, RedisUnavailable):
            raise
        except (AgentBackupError, OSError) as error:
            return self._phase_failed(incident, error)

    def _phase_failed(self, incident: Incident, error: AgentBackupError | OSError) -> Incident:
        hint = (getattr(error, "hint", None) or "").strip()
        detail = str(error) + (f" ({hint})" if hint else "")
        # A phase may have written the incident before it failed.
        latest = self.store.get(incident.id)
        if latest.phase != incident.phase or not latest.is_open:
            raise Stale(f"incident “{incident.id}” was advanced by somebody else")
        failed = self._noted(latest, latest.phase, False, detail)
        if latest.phase == RESTORE and not isinstance(error, NoSpace):
            # Nothing is wrong with the state that was chosen, unless it is damaged: then it is not chosen again.
            return self._retry(failed, detail, SELECT, state_failed=False)
        if latest.phase in (START, PROVE):
            return self._retry(failed, detail, FENCE)
        return self._give_up(failed, detail)

    def _fence(self, incident: Incident, agent: AgentConfig) -> Incident | None:
        pause = breakers.paused(self.client, self.now())
        if pause is None and not (incident.by_hand or incident.attempts):
            tripped = breakers.agent_tripped(self.client, self.config, incident.agent, self.now())
            if tripped is not None:
                return self._give_up(self._noted(incident, breakers.BREAKER, False, tripped), tripped)
            tripped = breakers.fleet_tripped(self.client, self.config, self.now())
            pause = self.trip(tripped) if tripped is not None else None
        if pause is not None:
            return self._hold(incident, pause)
        if _was_held(incident) and self._came_back(incident, agent):
            detail = "it came back while recovery was paused, and beats; nothing was changed"
            return self._closed(self._noted(incident, FENCE, True, detail), RECOVERED, detail)
        return self._fence_now(incident, agent)

    def _hold(self, incident: Incident, pause: breakers.Pause) -> Incident | None:
        now = self.now()
        if not _was_held(incident):
            detail = f"recovery is paused by {pause.by}: {pause.reason or 'no reason given'}"
            incident = self._noted(incident, HELD, True, detail)
        return self._sleep(incident, min(now + HELD_LOOK_S, pause.until or now + HELD_LOOK_S))

    def _came_back(self, incident: Incident, agent: AgentConfig) -> bool:
        """Tell whether the agent lives after all: a human has started it meanwhile, and must not lose what it did."""
        if incident.by_hand or incident.attempts:
            return False
        beats, since = self._beats(incident.beat_mark), self.now() - agent.heartbeat.dead_after
        steady = beats.is_steady(incident.agent, incident.beat_mark, agent.heartbeat.stable_beats, since)
        return steady and bool(self.adapter_of(incident.agent).running())

    def _fence_now(self, incident: Incident, agent: AgentConfig) -> Incident:
        ended = self.adapter_of(incident.agent).stop(term_grace_s=agent.recovery.stop_within)
        detail = "ended " + ", ".join(map(str, ended)) if ended else "no process was left"
        return self._enter(self._noted(incident, FENCE, True, detail), SELECT)

    def _select(self, incident: Incident, agent: AgentConfig) -> Incident:
        if agent.recovery.first_try == CURRENT and not incident.tried:
            problems = self.states.problems_on_disk(incident.agent)
            if not problems:
                chosen = self._noted(
                    incident, SELECT, True, "the state on disk is sane: starting on it first"
                )
                return self._enter(chosen, DEPEND, chosen=(CURRENT,), deadline=self._patience(agent))
            insane = "the state on disk is not sane: " + "; ".join(problems)
            incident = self._keep(self._noted(incident, SELECT, False, insane))
        # As of the death: what was stored of the dead agent since is no state to go back to.
        plan = self.states.choose(incident.agent, as_of=incident.opened_at, exclude=incident.tried)
        chosen = self._noted(incident, SELECT, True, "state of " + ", ".join(plan.sources))
        return self._enter(chosen, RESTORE, chosen=plan.sources)

    def _restore(self, incident: Incident, agent: AgentConfig) -> Incident:
        kept = self.evidence_folder(incident) / f"tree-{len(incident.evidence) + 1}"
        result, plan = self.states.restore(
            incident.agent, as_of=incident.opened_at, exclude=incident.tried, evidence=kept
        )
        evidence = (*incident.evidence, str(result.evidence)) if result.evidence else incident.evidence
        detail = f"{result.files} files, {result.bytes} bytes, verified and swapped in"
        detail += (
            f"; what stood there is in {result.evidence}" if result.evidence else "; it stood there already"
        )
        done = self._noted(replace(incident, evidence=evidence), RESTORE, True, detail)
        done = self._with_loss(done, plan)
        # The state is chosen anew for the restore, so what was restored is what counts.
        return self._enter(done, DEPEND, chosen=result.sources, deadline=self._patience(agent))

    def _with_loss(self, incident: Incident, plan: RestorePlan) -> Incident:
        # Against what stood there at the death: later trees are those of states that were tried.
        kept = Path(incident.evidence[0]) if incident.evidence else None
        loss = self.states.loss(plan, kept, changes.all_changes(self.client), until=incident.opened_at)
        lost = tuple(map(printable, (loss.lost or ())[: notice.SHOWN]))
        count = None if loss.lost is None else len(loss.lost)
        return replace(incident, state_at=loss.state_at, lost=lost, lost_count=count, missed=loss.missed)

    def _patience(self, agent: AgentConfig) -> float:
        """Return until when the agent waits for those that it needs: the death of one of them may yet be noticed."""
        needed = (self.config.agents.get(name) for name in agent.depends_on)
        notice_s = max((one.heartbeat.dead_after for one in needed if one is not None), default=0.0)
        return self.now() + agent.heartbeat.verify_within + notice_s

    def _depend(self, incident: Incident, agent: AgentConfig) -> Incident | None:
        if agent.depends_on:
            beats = self._beats(incident.beat_mark)
            latest = self.store.latest(agent.depends_on)
            missing = missing_dependencies(incident, agent.depends_on, latest, beats)
            if missing:
                return self._wait_for(incident, missing, latest)
        detail = f"{', '.join(agent.depends_on)} alive" if agent.depends_on else "depends on nobody"
        return self._enter(self._noted(incident, DEPEND, True, detail), START)

    def _wait_for(
        self, incident: Incident, missing: list[str], latest: Mapping[str, Incident]
    ) -> Incident | None:
        last = {agent: latest[agent] for agent in missing if agent in latest}
        fallen = [agent for agent, one in last.items() if _escalated_since(one, incident.opened_at)]
        if fallen:
            return self._give_up(
                self._noted(incident, DEPEND, False, f"{', '.join(fallen)} could not be recovered"),
                f"it needs {', '.join(fallen)}, which could not be recovered",
            )
        now = self.now()
        if incident.deadline is not None and now >= incident.deadline:
            # An open recovery of a dependency has deadlines of its own; only one that nobody works on is given up.
            idle = [agent for agent in missing if agent not in last or not last[agent].is_open]
            if idle:
                return self._give_up(
                    self._noted(incident, DEPEND, False, f"no beat of {', '.join(idle)}"),
                    f"it needs {', '.join(idle)}, of which nothing was heard",
                )
        if not incident.steps or incident.steps[-1].step != "wait":
            incident = self._noted(incident, "wait", True, f"for {', '.join(missing)}")
        return self._sleep(incident, now + LOOK_AGAIN_S)

    def _start(self, incident: Incident, agent: AgentConfig) -> Incident:
        adapter = self.adapter_of(incident.agent)
        # A worker that was killed right here may have started it already: that one would be a second incarnation.
        adapter.stop(term_grace_s=agent.recovery.stop_within)
        mark = self._last_beat()
        # None of those that have beaten of late is the process that is started next.
        recent = heartbeats.survivors(self.client, incident.agent, mark, SURVIVOR_WINDOW_S)
        old = tuple(sorted({*incident.old_incarnations, *recent}))
        incident = self._keep(replace(incident, start_mark=mark, old_incarnations=old))
        incident = self._with_notice(incident, agent)
        pid = adapter.start(redis_url=self.redis_url)
        detail = f"pid {pid}: {adapter.describe()}" if pid else adapter.describe()
        started = self._noted(replace(incident, pid=pid), START, True, detail)
        return self._enter(started, PROVE, deadline=self.now() + agent.heartbeat.verify_within)

    def _with_notice(self, incident: Incident, agent: AgentConfig) -> Incident:
        """Leave the notice before the start, for the agent to find it; a root that takes none is no reason to fail."""
        try:
            if notice.leave(agent.root, notice.text(incident, self.config.schedule.timezone)):
                return incident
            problem = f"“{notice.FILE}” in its root is not ours, and is left as it is"
        except OSError as error:
            problem = f"“{notice.FILE}” cannot be written: {error}"
        return self._noted(incident, NOTICE, False, problem)

    def _prove(self, incident: Incident, agent: AgentConfig) -> Incident | None:
        adapter = self.adapter_of(incident.agent)
        running = adapter.running()
        strangers = adapter.strangers(running)
        if strangers:
            # Its beats cannot be told from ours, and two of them would ruin the files: both end, and it begins anew.
            detail = f"somebody else started the agent too: {', '.join(map(str, strangers))}"
            return self._retry(self._noted(incident, PROVE, False, detail), detail, FENCE, state_failed=False)
        if not running:
            # Also if it had beaten often enough: what has ended does not live.
            raise AgentBackupError("the new process has ended: " + self._last_words(incident.agent))
        beats = self._beats(incident.start_mark)
        incarnation, count = beats.streak(incident.agent, incident.start_mark, incident.old_incarnations)
        now = self.now()
        if count >= agent.heartbeat.stable_beats:
            proof = f"{count} beats in a row of incarnation {incarnation}"
            verdict = self._examined(incident, agent, now)
            if verdict is None or verdict.is_well:
                # It may have ended while it was examined.
                if verdict is not None and not adapter.running():
                    raise AgentBackupError("the new process has ended: " + self._last_words(incident.agent))
                detail = f"{proof}; {verdict.detail}" if verdict else proof
                return self._recovered(self._noted(incident, PROVE, True, detail))
            if verdict.detail != incident.unwell:
                incident = self._noted(
                    replace(incident, unwell=verdict.detail), HEALTH, False, verdict.detail
                )
            now = self.now()
        if incident.deadline is not None and now >= incident.deadline:
            what = f"{count} of {agent.heartbeat.stable_beats} beats"
            raise AgentBackupError(
                f"{what} within {agent.heartbeat.verify_within:g} s: "
                + (incident.unwell or self._last_words(incident.agent))
            )
        return self._sleep(incident, min(now + LOOK_AGAIN_S, incident.deadline or now + LOOK_AGAIN_S))

    def _examined(self, incident: Incident, agent: AgentConfig, now: float) -> Checkup | None:
        """Return what the agent's `health` command says; None if it has none."""
        if agent.health is None:
            return None
        left_s = max(1.0, (incident.deadline or now) - now)
        limit_s = min(agent.heartbeat.health_within, left_s)
        return examine(incident.agent, agent.root, agent.health, redis_url=self.redis_url, limit_s=limit_s)

    # ── ends ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _retry(self, incident: Incident, why: str, phase: str, *, state_failed: bool = True) -> Incident:
        """Go on with `phase`, or give up after the configured number of attempts.

        A state that failed is not chosen again. A critical agent calls a human at the first failure.
        """
        attempts = incident.attempts + 1
        tried = (*incident.tried, *incident.chosen[:1]) if state_failed else incident.tried
        incident = replace(incident, attempts=attempts, tried=tried, chosen=(), deadline=None)
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
        if state == RECOVERED and closed.attempts:
            breakers.count(self.client, closed)
        closed = self.store.save(closed, wake_at=None)
        self.store.wake(DEPEND, self.now())
        return closed


def _was_held(incident: Incident) -> bool:
    return bool(incident.steps) and incident.steps[-1].step == HELD


def _escalated_since(incident: Incident, since: float) -> bool:
    return incident.state == ESCALATED and (incident.closed_at or 0.0) >= since
