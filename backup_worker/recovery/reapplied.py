"""Back up what a recovery has put back, as the change was when it was applied, and put it on the record.

Once for an incident and change, however often it is told. A backup that fails alerts; it never stops a recovery.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from backup_worker import backups
from backup_worker.recovery.incident import Incident, Missed
from backup_worker.runtime import Runtime
from backup_worker.schedule import slot_name
from backup_worker.snapshots import Entry, Manifest
from backup_worker.snapshots.take import Attest
from em_bridge import events
from em_bridge.errors import AgentBackupError

log = logging.getLogger(__name__)


def store(runtime: Runtime, incident: Incident, now: float) -> None:
    """Make the snapshots on change of everything that `incident` has put back."""
    for change in incident.reapplied:
        try:
            _store(runtime, incident, change, now)
        except (AgentBackupError, OSError) as error:
            log.error("what was put back into %s cannot be backed up: %s", incident.agent, error)
            title = f"what was put back into {incident.agent} is in no backup"
            key = f"failed/{change.snapshot.partition('/')[0]}/{incident.agent}"
            runtime.alert(key, "critical", title, f"{change}: {error}", agent=incident.agent)


def _store(runtime: Runtime, incident: Incident, change: Missed, now: float) -> None:
    once = f"reapplied/{incident.id}/{change.snapshot}"
    source = runtime.repository.get(change.snapshot)
    runtime.record_once(
        once, "change", event="reapplied", change=change.change, agent=incident.agent, paths=list(change.paths),
        incident=incident.id, snapshot=change.snapshot, approved=source.approved, approved_by=change.approved_by,
    )  # fmt: skip
    reason = f"re-applied {change.change or change.snapshot}: after {incident.id}"
    for name, tier in runtime.config.schedule.tiers.items():
        if events.ConfigApplied.type in tier.events:
            slot = slot_name(tier, runtime.config.schedule.timezone, now)
            backups.make(
                runtime, incident.agent, name, tier, slot, now, reason=reason, on_taken="next", event=once,
                attest=_attest(source, change),
            )  # fmt: skip


def _attest(source: Manifest, change: Missed) -> Attest:
    """Return what answers for the engine: approved is what `source` holds of the change, byte for byte."""
    held = source.by_path()

    def answer(entries: Mapping[str, Entry]) -> tuple[bool, str | None]:
        same = all(path in entries and entries[path].sha256 == held[path].sha256 for path in change.paths)
        return (True, change.approved_by) if same and source.approved else (False, None)

    return answer
