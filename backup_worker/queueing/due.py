"""Events that this package sends to itself: something is due.

They travel like every other event (a stream, the dispatcher, one job), so they are as safe as those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from em_bridge import fields as check
from em_bridge.events import Event, register
from em_bridge.fields import wire

STREAM: Final = "em:due"


@register
@dataclass(frozen=True, slots=True)
class BackupDue(Event):
    """A scheduled backup of `agent` in `tier`; `slot` names it, `fire_at` is when it was due (Unix seconds).

    `attempt` counts the tries that failed for good before this one.
    """

    type: ClassVar[str] = "backup.due"
    stream: ClassVar[str] = STREAM
    tier: str = wire(check.label)
    slot: str = wire(check.label)
    agent: str = wire(check.agent_id)
    fire_at: float = wire(check.moment)
    attempt: int = wire(check.count, default=0)


@register
@dataclass(frozen=True, slots=True)
class IncidentDue(Event):
    """The incident has reached a deadline, or what it waited for has come."""

    type: ClassVar[str] = "incident.due"
    stream: ClassVar[str] = STREAM
    incident: str = wire(check.label)


@register
@dataclass(frozen=True, slots=True)
class MaintenanceDue(Event):
    """A task of `backup_worker.jobs.maintenance` is due."""

    type: ClassVar[str] = "maintenance.due"
    stream: ClassVar[str] = STREAM
    task: str = wire(check.label)
