"""Advances one incident, phase by phase, until it waits or is closed; the phases themselves: fence, start and prove.

`advance` may be called at any time, by any number of workers on the agent's host, for any reason: a kernel lock an
agent lets one of them act, and the incident's version keeps one that lost the lock from writing. A phase is written
down before its work begins, and its work may be done twice. What fails is an outcome, recorded as a step: only Redis
being away, and programming errors, leave this module as exceptions; the incident's deadline then brings it back, and
what comes back too often without getting anywhere is escalated. An end is recorded, and told, before it is written: a
worker killed in between says it twice, never not at all. Times are the server's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from backup_worker.recovery import breakers, heartbeats, notice
from backup_worker.recovery.address import redis_url_of
from backup_worker.recovery.incident import (
    AGAIN_AFTER_S,
    CONFIRM,
    DEPEND,
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
from backup_worker.recovery.lays import Lays
from backup_worker.recovery.locks import acting_on
from backup_worker.recovery.waits import HELD_LOOK_S, LOOK_AGAIN_S
from backup_worker.restoring.health_command import Health, run_health
from backup_worker.snapshots import NoSpace
from backup_worker.units import counted
from em_bridge.errors import AgentBackupError, RedisUnavailable

if TYPE_CHECKING:
    from backup_worker.config import AgentConfig

HEALTH = "health"
"""The step of an examination that an agent did not pass."""

HELD = "paused"
"""The step of an incident that waits because recovery is paused."""

NOTICE = "notice"
"""The step of a notice that could not be left for the agent."""

OPENED = "open"
"""The first step of every incident."""

SURVIVOR_WINDOW_S = 300.0
"""How far back in the heartbeats incarnations are looked up that must not count as new."""


class Recovery(Lays):
    """The executor: one method for each phase."""

    def advance(self, incident_id: str) -> Incident:
        """Run the incident's phases until it waits or is closed, and return it; raises NotFound for an unknown id."""
        agent = self.store.get(incident_id).agent
        with acting_on(agent, self.config.schedule.state) as held, contextlib.suppress(Stale):
            incident = self._taken_up(self.store.get(incident_id)) if held else None
            if not held:
                # Who acts on it may be killed at that.
                self.store.look_by(incident_id, self.now() + AGAIN_AFTER_S)
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
                incident,
                f"{incident.phase} was begun {counted(incident.resumes, 'time')} and never came to an end",
            )
        return self._keep(replace(incident, resumes=incident.resumes + 1))

    # ── phases ────────────────────────────────────────────────────────────────────────────────────────────────

    def _run_phase(self, incident: Incident) -> Incident | None:
        """Return the incident in its next phase, or None if it waits."""
        agent = self.config.agents.get(incident.agent)
        if agent is None:
            return self._give_up(incident, f"agent “{incident.agent}” is no longer in agents.json")
        phases: dict[str, Callable[[Incident, AgentConfig], Incident | None]] = {
            CONFIRM: self._confirm,
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
        if pause is None and not (incident.by_hand or incident.attempts > incident.inherited):
            tripped = breakers.agent_tripped(self.client, self.config, incident.agent, self.now())
            if tripped is not None:
                return self._give_up(self._noted(incident, breakers.BREAKER, False, tripped), tripped)
            tripped = breakers.fleet_tripped(self.client, self.config, self.now())
            pause = self.trip(tripped) if tripped is not None else None
        if pause is not None:
            return self._pause(incident, pause)
        if _was_held(incident) and self._came_back(incident, agent):
            detail = "it came back while recovery was paused, and beats; nothing was changed"
            return self._closed(self._noted(incident, FENCE, True, detail), RECOVERED, detail)
        return self._fence_now(incident, agent)

    def _pause(self, incident: Incident, pause: breakers.Pause) -> Incident | None:
        now = self.now()
        if not _was_held(incident):
            detail = f"recovery is paused by {pause.by}: {pause.reason or 'no reason given'}"
            incident = self._noted(incident, HELD, True, detail)
        return self._sleep(incident, min(now + HELD_LOOK_S, pause.until or now + HELD_LOOK_S))

    def _came_back(self, incident: Incident, agent: AgentConfig) -> bool:
        """Tell whether the agent lives after all: a human has started it meanwhile, and must not lose what it did."""
        if incident.by_hand or incident.attempts > incident.inherited:
            return False
        beats, since = (
            self._beats(incident.beat_mark, incident.agent),
            self.now() - agent.heartbeat.dead_after,
        )
        steady = beats.is_steady(incident.agent, incident.beat_mark, agent.heartbeat.stable_beats, since)
        return steady and bool(self.adapter_of(incident.agent).running())

    def _fence_now(self, incident: Incident, agent: AgentConfig) -> Incident:
        ended = self.adapter_of(incident.agent).stop(term_grace_s=agent.recovery.stop_within)
        detail = "ended " + ", ".join(map(str, ended)) if ended else "no process was left"
        incident = self._noted(incident, FENCE, True, detail)
        if incident.attempts >= agent.recovery.attempts:
            stable = f"within {agent.recovery.stable_for:g} s of its recovery"
            return self._give_up(
                incident, f"{incident.attempts} states were tried; on the last one it died {stable}"
            )
        return self._enter(incident, SELECT)

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
        pid = adapter.start(redis_url=redis_url_of(incident.agent, self.config, self.redis_url))
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
        beats = self._beats(incident.start_mark, incident.agent)
        now = self.now()
        incident = self._with_watched_deadline(incident, agent.heartbeat.verify_within, now)
        is_late = incident.deadline is not None and now >= incident.deadline
        # Before the deadline nothing can have come behind it, whatever clock its entry was written by.
        until = incident.deadline if is_late else None
        incarnation, count = beats.streak(
            incident.agent, incident.start_mark, incident.old_incarnations, until=until
        )
        if count >= agent.heartbeat.stable_beats:
            proof = f"{count} beats in a row of incarnation {incarnation}"
            verdict = self._examined(incident, agent, now)
            if verdict is None or verdict.ok:
                # It may have ended while it was examined.
                if verdict is not None and not adapter.running():
                    raise AgentBackupError("the new process has ended: " + self._last_words(incident.agent))
                detail = f"{proof}; {verdict}" if verdict else proof
                return self._recovered(self._noted(incident, PROVE, True, detail))
            if str(verdict) != incident.unwell:
                incident = self._noted(replace(incident, unwell=str(verdict)), HEALTH, False, str(verdict))
            now = self.now()
        if incident.deadline is not None and now >= incident.deadline:
            what = f"{count} of {agent.heartbeat.stable_beats} beats"
            raise AgentBackupError(
                f"{what} within {agent.heartbeat.verify_within:g} s: "
                + (incident.unwell or self._last_words(incident.agent))
            )
        return self._sleep(incident, min(now + LOOK_AGAIN_S, incident.deadline or now + LOOK_AGAIN_S))

    def _examined(self, incident: Incident, agent: AgentConfig, now: float) -> Health | None:
        """Return what the agent's `health` command says; None if it has none."""
        if agent.health is None:
            return None
        left_s = max(1.0, (incident.deadline or now) - now)
        limit_s = min(agent.heartbeat.health_within, left_s)
        url = redis_url_of(incident.agent, self.config, self.redis_url)
        return run_health(agent.health, agent.root, incident.agent, within_s=limit_s, redis_url=url)


def _was_held(incident: Incident) -> bool:
    return bool(incident.steps) and incident.steps[-1].step == HELD
