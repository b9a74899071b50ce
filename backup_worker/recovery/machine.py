"""Advances one incident, phase by phase, until it waits or is closed.

`advance` may be called at any time, by any number of workers on the agent's host, for any reason: a kernel lock an
agent lets one of them act, and the incident's version keeps one that lost the lock from writing. A phase is written
down before its work begins, and its work may be done twice. What fails is an outcome, recorded as a step: only Redis
being away, and programming errors, leave this module as exceptions; the incident's deadline then brings it back.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from backup_worker.recovery import heartbeats, processes
from backup_worker.recovery.incident import (
    CURRENT,
    DEADLINES,
    DEPEND,
    ESCALATED,
    FENCE,
    PROVE,
    RECOVERED,
    RESTORE,
    SELECT,
    START,
    Incident,
    IncidentStore,
    Stale,
)
from backup_worker.recovery.pacemaker import AGAIN_AFTER_S, missing_dependencies
from backup_worker.recovery.states import States
from em_bridge import clock, streams
from em_bridge.errors import AgentBackupError, RedisUnavailable

if TYPE_CHECKING:
    from redis import Redis

    from backup_worker.config import AgentConfig, Config

LOOK_AGAIN_S = 2.0
"""While an agent has to prove that it lives, its process is looked at this often: one that exits fails at once."""

SURVIVOR_WINDOW_S = 300.0
"""How far back in the heartbeats incarnations are looked up that must not count as new."""


@dataclass(frozen=True, slots=True)
class Escalation:
    """Why an incident is given to a human."""

    reason: str
    hint: str = ""


@dataclass(slots=True)
class Recovery:
    """The executor. `record` is told of every step and of the end; `escalate` writes the evidence and pages."""

    client: Redis
    config: Config
    states: States
    redis_url: str
    record: Callable[[Incident, str, bool, str], None]
    escalate: Callable[[Incident, Escalation], Incident]
    now: Callable[[], float] = clock.now

    @property
    def store(self) -> IncidentStore:
        """The incidents."""
        return IncidentStore(self.client)

    def advance(self, incident_id: str) -> Incident:
        """Run the incident's phases until it waits or is closed, and return it; raises NotFound for an unknown id."""
        incident = self.store.get(incident_id)
        with self._agent_lock(incident.agent) as held:
            if not held:
                return incident
            incident = self.store.get(incident_id)
            with contextlib.suppress(Stale):
                while incident.is_open:
                    before = incident
                    incident = self._run_phase(incident)
                    if incident.version == before.version:
                        break
        return incident

    @contextlib.contextmanager
    def _agent_lock(self, agent: str) -> Iterator[bool]:
        """Hold the agent's kernel lock: it cannot outlive this process, so it can never be stale."""
        folder = self.config.schedule.state / "locks"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / f"{agent}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(descriptor)

    # ── phases ────────────────────────────────────────────────────────────────────────────────────────────────

    def _run_phase(self, incident: Incident) -> Incident:
        agent = self.config.agents.get(incident.agent)
        if agent is None:
            return self._give_up(incident, f"agent “{incident.agent}” is no longer in agents.json")
        phases = {
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
            hint = (getattr(error, "hint", None) or "").strip()
            detail = str(error) + (f" ({hint})" if hint else "")
            return self._phase_failed(incident, detail)

    def _phase_failed(self, incident: Incident, detail: str) -> Incident:
        failed = self._noted(incident, incident.phase, False, detail)
        if incident.phase == RESTORE:
            # The state did not prove, or could not be laid down: the next older one may.
            return self._retry(failed, detail, SELECT)
        if incident.phase in (START, PROVE):
            return self._retry(failed, detail, FENCE)
        return self._give_up(failed, detail)

    def _fence(self, incident: Incident, agent: AgentConfig) -> Incident:
        ended = processes.fence(self.process_of(incident.agent), term_grace_s=agent.recovery.stop_within)
        detail = "no process was left"
        if ended:
            detail = "ended " + ", ".join(f"pid {process.pid} ({process.command[:60]})" for process in ended)
        return self._enter(self._noted(incident, FENCE, True, detail), SELECT)

    def _select(self, incident: Incident, agent: AgentConfig) -> Incident:
        if agent.recovery.first_try == CURRENT and not incident.tried:
            problems = self.states.problems_on_disk(incident.agent)
            if not problems:
                chosen = self._noted(
                    incident, SELECT, True, "the state on disk is sane: starting on it first"
                )
                patience = self.now() + agent.heartbeat.verify_within
                return self._enter(chosen, DEPEND, chosen=(CURRENT,), deadline=patience)
            incident = self._noted(
                incident, SELECT, False, "the state on disk is not sane: " + "; ".join(problems)
            )
        # As of the death: what was stored of the dead agent since is no state to go back to.
        plan = self.states.choose(incident.agent, as_of=incident.opened_at, exclude=incident.tried)
        chosen = self._noted(incident, SELECT, True, "state of " + ", ".join(plan.sources))
        return self._enter(chosen, RESTORE, chosen=plan.sources)

    def _restore(self, incident: Incident, agent: AgentConfig) -> Incident:
        kept = self.evidence_folder(incident) / f"tree-{len(incident.evidence) + 1}"
        result = self.states.restore(
            incident.agent, as_of=incident.opened_at, exclude=incident.tried, evidence=kept
        )
        evidence = (*incident.evidence, str(result.evidence)) if result.evidence else incident.evidence
        detail = f"{result.files} files, {result.bytes} bytes, verified and swapped in"
        detail += (
            f"; what stood there is in {result.evidence}" if result.evidence else "; it stood there already"
        )
        done = self._noted(replace(incident, evidence=evidence), RESTORE, True, detail)
        return self._enter(done, DEPEND, deadline=self.now() + agent.heartbeat.verify_within)

    def _depend(self, incident: Incident, agent: AgentConfig) -> Incident:
        if agent.depends_on:
            beats = self._beats(incident.beat_mark)
            missing = missing_dependencies(incident, agent.depends_on, self.store.open_ids(), beats)
            if missing:
                return self._wait_for(incident, missing)
        detail = f"{', '.join(agent.depends_on)} alive" if agent.depends_on else "depends on nobody"
        return self._enter(self._noted(incident, DEPEND, True, detail), START)

    def _wait_for(self, incident: Incident, missing: list[str]) -> Incident:
        fallen = [agent for agent in missing if self._escalated_since(agent, incident.opened_at)]
        if fallen:
            return self._give_up(
                self._noted(incident, DEPEND, False, f"{', '.join(fallen)} could not be recovered"),
                f"it needs {', '.join(fallen)}, which could not be recovered",
            )
        now = self.now()
        if incident.deadline is not None and now >= incident.deadline:
            # An open recovery of a dependency has deadlines of its own; only one that nobody works on is given up.
            idle = [agent for agent in missing if agent not in self.store.open_ids()]
            if idle:
                return self._give_up(
                    self._noted(incident, DEPEND, False, f"no beat of {', '.join(idle)}"),
                    f"it needs {', '.join(idle)}, of which nothing was heard",
                )
        if not incident.steps or incident.steps[-1].step != "wait":
            incident = self._noted(incident, "wait", True, f"for {', '.join(missing)}")
        return self._sleep(incident, now + LOOK_AGAIN_S)

    def _escalated_since(self, agent: str, since: float) -> bool:
        for incident in self.store.all():
            if incident.agent == agent:
                return incident.state == ESCALATED and (incident.closed_at or 0.0) >= since
        return False

    def _start(self, incident: Incident, agent: AgentConfig) -> Incident:
        process = self.process_of(incident.agent)
        # A worker that was killed right here may have started it already: that one would be a second incarnation.
        processes.fence(process, term_grace_s=agent.recovery.stop_within)
        mark = self._last_beat()
        old = self._survivors(incident, mark)
        incident = self.store.save(
            replace(incident, start_mark=mark, old_incarnations=old), wake_at=self.now() + AGAIN_AFTER_S
        )
        pid = processes.start(process, redis_url=self.redis_url)
        started = self._noted(
            replace(incident, pid=pid), START, True, f"pid {pid}: {' '.join(process.command)}"
        )
        return self._enter(started, PROVE, deadline=self.now() + agent.heartbeat.verify_within)

    def _prove(self, incident: Incident, agent: AgentConfig) -> Incident:
        beats = self._beats(incident.start_mark)
        incarnation, count = beats.streak(incident.agent, incident.start_mark, incident.old_incarnations)
        if count >= agent.heartbeat.stable_beats:
            detail = f"{count} beats in a row of incarnation {incarnation}"
            return self._recovered(self._noted(incident, PROVE, True, detail))
        now = self.now()
        if not processes.find_agent(self.process_of(incident.agent)):
            raise AgentBackupError("the new process has ended: " + self._last_words(incident.agent))
        if incident.deadline is not None and now >= incident.deadline:
            raise AgentBackupError(
                f"{count} of {agent.heartbeat.stable_beats} beats within {agent.heartbeat.verify_within:g} s: "
                + self._last_words(incident.agent)
            )
        return self._sleep(incident, min(now + LOOK_AGAIN_S, incident.deadline or now + LOOK_AGAIN_S))

    # ── ends ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _retry(self, incident: Incident, why: str, phase: str) -> Incident:
        """Go on with the next older state, or give up after the configured number of attempts."""
        attempts = incident.attempts + 1
        tried = (*incident.tried, *incident.chosen[:1])
        incident = replace(incident, attempts=attempts, tried=tried, chosen=(), deadline=None)
        if attempts >= self.config.agents[incident.agent].recovery.attempts:
            return self._give_up(incident, f"{attempts} attempts failed; the last one: {why}")
        return self._enter(incident, phase)

    def _recovered(self, incident: Incident) -> Incident:
        attempts = incident.attempts + 1
        closed = self.store.save(
            replace(incident, attempts=attempts).closed(RECOVERED, self.now()), wake_at=None
        )
        self._wake_dependents()
        self.record(closed, RECOVERED, True, f"recovered from {', '.join(closed.chosen)}")
        return closed

    def _give_up(self, incident: Incident, reason: str) -> Incident:
        # The evidence is written first: an incident must not say “escalated” with nothing for the human to read.
        told = self.escalate(incident, Escalation(reason))
        closed = self.store.save(told.closed(ESCALATED, self.now()), wake_at=None)
        self._wake_dependents()
        self.record(closed, ESCALATED, False, reason)
        return closed

    def _wake_dependents(self) -> None:
        now = self.now()
        for incident_id in self.store.open_ids().values():
            if self.store.get(incident_id).phase == DEPEND:
                self.client.zadd(DEADLINES, {incident_id: now}, xx=True, lt=True)

    # ── small things ──────────────────────────────────────────────────────────────────────────────────────────

    def _noted(self, incident: Incident, step: str, ok: bool, detail: str) -> Incident:
        self.record(incident, step, ok, detail)
        return incident.noted(step, self.now(), ok, detail)

    def _enter(self, incident: Incident, phase: str, **changes: object) -> Incident:
        return self.store.save(incident.entering(phase, **changes), wake_at=self.now() + AGAIN_AFTER_S)

    def _sleep(self, incident: Incident, until: float) -> Incident:
        """Keep the phase, be woken at `until` at the latest, and end this run: the version is not handed on."""
        self.store.save(incident, wake_at=until)
        return incident

    def process_of(self, name: str) -> processes.Agent:
        """Return what is needed to find and start the process of agent `name`."""
        agent = self.config.agents[name]
        command = tuple(agent.start.command or ()) if agent.start else ()
        return processes.Agent(name, agent.root, command, self.config.schedule.state)

    def evidence_folder(self, incident: Incident) -> Path:
        """Return the folder of everything that is kept of this incident."""
        return self.config.schedule.state / "evidence" / incident.id

    def _last_beat(self) -> str:
        return streams.last_id(self.client, streams.HEARTBEATS)

    def _beats(self, mark: str) -> heartbeats.Beats:
        return heartbeats.read(self.client, heartbeats.Beats(cursor=mark))

    def _survivors(self, incident: Incident, mark: str) -> tuple[str, ...]:
        """Return the incarnations that have beaten of late: none of them is the process that is started next."""
        since = max(0.0, streams.entry_time(mark) - SURVIVOR_WINDOW_S)
        recent = self._beats(streams.id_at(since))
        return tuple(sorted({*incident.old_incarnations, *recent.incarnations(incident.agent)}))

    def _last_words(self, agent: str) -> str:
        lines = processes.last_log_lines(self.process_of(agent), 3)
        return " / ".join(lines) if lines else "it wrote nothing"
