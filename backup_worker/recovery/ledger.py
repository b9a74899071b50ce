"""Writes down what a recovery does, step by step, and holds what it works with.

A step is on the record before the incident says so, and the incident says so before the next phase begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from backup_worker.recovery import breakers, heartbeats
from backup_worker.recovery.adapters import Adapter, adapter_for
from backup_worker.recovery.incident import AGAIN_AFTER_S, Incident, IncidentStore
from backup_worker.recovery.states import States
from em_bridge import streams

if TYPE_CHECKING:
    from redis import Redis

    from backup_worker.config import Config


@dataclass(frozen=True, slots=True)
class Escalation:
    """Why an incident is given to a human; not `final`: the human is called, while the recovery goes on."""

    reason: str
    final: bool = True


@dataclass(slots=True)
class Ledger:
    """What a recovery works with, and how it is written down.

    `record` is told of every step and of the end; `escalate` writes the evidence and pages; `trip` pauses recovery, for
    the reason that it is given; `mass` pages that these agents fell silent together, and what else is wrong.
    """

    client: Redis
    config: Config
    states: States
    redis_url: str
    record: Callable[[Incident, str, bool, str], None]
    escalate: Callable[[Incident, Escalation], Incident]
    trip: Callable[[str], breakers.Pause]
    mass: Callable[[Sequence[str], Sequence[str]], None]

    def now(self) -> float:
        """Return the server's clock in Unix seconds: the hosts' own need not agree."""
        return streams.server_time(self.client)

    @property
    def store(self) -> IncidentStore:
        """The incidents."""
        return IncidentStore(self.client)

    def _noted(self, incident: Incident, step: str, ok: bool, detail: str) -> Incident:
        self.record(incident, step, ok, detail)
        return incident.noted(step, self.now(), ok, detail)

    def _enter(self, incident: Incident, phase: str, **changes: object) -> Incident:
        return self._keep(incident.entering(phase, **changes))

    def _keep(self, incident: Incident) -> Incident:
        """Write the incident, to be looked at again soon if this worker does not live to go on."""
        return self.store.save(incident, wake_at=self.now() + AGAIN_AFTER_S)

    def _sleep(self, incident: Incident, until: float) -> Incident | None:
        """Keep the phase, be woken at `until` at the latest, and end this run."""
        self.store.save(replace(incident, resumes=0), wake_at=until)
        return None

    def adapter_of(self, name: str) -> Adapter:
        """Return what starts and ends agent `name`; raises AgentBackupError if it has no `start`."""
        return adapter_for(name, self.config.agents[name], self.config.schedule.state)

    def evidence_folder(self, incident: Incident) -> Path:
        """Return the folder of everything that is kept of this incident."""
        return self.config.schedule.state / "evidence" / incident.id

    def _last_beat(self) -> str:
        return streams.last_id(self.client, streams.HEARTBEATS)

    def _beats(self, mark: str, *agents: str) -> heartbeats.Beats:
        return heartbeats.read(self.client, heartbeats.Beats(cursor=mark), only=agents)

    def _last_words(self, agent: str) -> str:
        adapter = self.adapter_of(agent)
        lines = adapter.log_lines(3)
        said = " / ".join(lines) if lines else "it wrote nothing"
        return ": ".join(filter(None, [adapter.last_end(), said]))
