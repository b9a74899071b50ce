"""The approval inbox: what became of each proposed change, folded from the stream of config changes.

The stream is the truth. `fold` reads on from where the last reader stopped and writes records and position in one
transaction, so any number of processes may fold at once, and an entry is taken in once. A job that judges an applied
change folds first, so it sees every approval that stands before it on the stream, whatever order the jobs run in.

An approval counts if it stands on the stream before the application and behind the proposal, its author is not the
proposer, and what is applied is what was proposed: that agent, no other paths. If nothing was proposed, who applies a
change cannot approve it. Where a file `allowed_signers` exists,
the word of the EM in `approved_by` counts for nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import redis.exceptions

from em_bridge import events, streams
from em_bridge.errors import InvalidEvent, NotFound, UsageError

if TYPE_CHECKING:
    from redis import Redis

PROPOSED, APPROVED, REJECTED, APPLIED = "proposed", "approved", "rejected", "applied"

ConfigChange = events.ConfigProposed | events.ConfigApproved | events.ConfigRejected | events.ConfigApplied
"""The events on the stream of config changes."""

_RECORDS = "backup:changes"
CURSOR = "backup:changes:cursor"
_BATCH = 500


@dataclass(frozen=True, slots=True)
class Change:
    """One change and its fate. Times are Unix seconds of the server's clock.

    `agent`, `paths` and `by` are the proposal's, or the application's if nothing was proposed.
    """

    change: str
    state: str
    agent: str = ""
    paths: tuple[str, ...] = ()
    by: str = ""
    reason: str = ""
    proposed_at: float | None = None
    decided_by: str = ""
    decided_at: float | None = None
    decided_entry: str = ""
    decision: str = ""
    applied_at: float | None = None
    proposed: dict[str, bytes] | None = None

    def summary(self) -> dict[str, Any]:
        """Return the change in the form of `backup-worker changes --json`; contents as text where they are text."""
        record = asdict(self)
        record["paths"] = list(self.paths)
        if self.proposed is not None:
            record["proposed"] = {
                path: content.decode(errors="replace") for path, content in self.proposed.items()
            }
        return record


def advance(change: Change | None, event: ConfigChange, entry_id: str) -> Change:
    """Return the record of a change after `event`, which stands on the stream as `entry_id`. Pure."""
    at = streams.entry_time(entry_id)
    match event:
        case events.ConfigProposed():
            if change is not None and (change.state == APPLIED or (change.decision and change.proposed_at)):
                return change
            # A decision on nothing is gone: it is about what was proposed when it was made.
            proposed = None if event.proposed is None else dict(event.proposed)
            return Change(
                event.change,
                PROPOSED,
                event.agent,
                event.paths,
                event.by,
                event.reason,
                at,
                proposed=proposed,
            )
        case events.ConfigApproved() | events.ConfigRejected():
            known = change or Change(event.change, PROPOSED)
            if known.decision or event.by == known.by:
                return known
            decision = APPROVED if isinstance(event, events.ConfigApproved) else REJECTED
            state = known.state if known.state == APPLIED else decision
            return replace(
                known,
                state=state,
                decision=decision,
                decided_by=event.by,
                decided_at=at,
                decided_entry=entry_id,
            )
        case events.ConfigApplied():
            known = change or Change(event.change, APPLIED)
            if known.proposed_at is None and known.applied_at is None:
                known = replace(known, agent=event.agent, paths=event.paths, by=event.by, reason=event.reason)
            return replace(known, state=APPLIED, applied_at=known.applied_at or at)


def fold(client: Redis, upto: str = "+") -> None:
    """Take in what is new on the stream, up to entry `upto`."""
    while True:
        with client.pipeline(transaction=True) as pipeline:
            watch: Any = pipeline.watch
            watch(CURSOR)
            cursor: Any = pipeline.get(CURSOR)
            start = f"({cursor.decode()}" if cursor else "-"
            rows: Any = pipeline.xrange(streams.CONFIG_CHANGE, start, upto, count=_BATCH)
            if not rows:
                return
            parsed = [(entry_id.decode(), _event(fields)) for entry_id, fields in rows]
            names = {event.change for _, event in parsed if event is not None}
            records = {name: _record(pipeline.hget(_RECORDS, name)) for name in names}
            for entry_id, event in parsed:
                if event is not None:
                    records[event.change] = advance(records[event.change], event, entry_id)
            pipeline.multi()
            for name, record in records.items():
                if record is not None:
                    pipeline.hset(_RECORDS, name, msgpack.packb(asdict(record)))
            pipeline.set(CURSOR, parsed[-1][0])
            try:
                pipeline.execute()
            except redis.exceptions.WatchError:
                continue
            if len(rows) < _BATCH:
                return


def _event(fields: Any) -> ConfigChange | None:
    try:
        event = events.decode(fields, stream=streams.CONFIG_CHANGE)
    except InvalidEvent:
        # The dispatcher makes a dead letter of it.
        return None
    return event if isinstance(event, ConfigChange) else None


def _record(data: Any) -> Change | None:
    if data is None:
        return None
    raw = msgpack.unpackb(data)
    raw["paths"] = tuple(raw["paths"])
    return Change(**raw)


def get(client: Redis, change: str) -> Change:
    """Return the record of `change` as of now; raises NotFound."""
    fold(client)
    record = _record(client.hget(_RECORDS, change))
    if record is None:
        raise NotFound(f"there is no change “{change}”", hint="see `backup-worker changes --all`")
    return record


def all_changes(client: Redis) -> list[Change]:
    """Return every change as of now, the newest last."""
    fold(client)
    stored: Any = client.hvals(_RECORDS)
    found = [record for record in map(_record, stored) if record is not None]
    return sorted(
        found, key=lambda one: (one.proposed_at or one.decided_at or one.applied_at or 0.0, one.change)
    )


def judge(
    client: Redis, event: events.ConfigApplied, entry_id: str, *, signers_exist: bool
) -> tuple[bool, str | None]:
    """Return whether the applied change was approved, and by whom, as of its entry on the stream.

    Where signers exist, a word without a signature that proves it counts for nothing.
    """
    fold(client, upto=entry_id)
    record = _record(client.hget(_RECORDS, event.change))
    if signers_exist or record is None:
        return False, None
    author = event.by
    if record.proposed_at is not None:
        author = record.by
        same_agent = event.agent.lower() == record.agent.lower()
        if not same_agent or not set(event.paths) <= set(record.paths):
            return False, None
    # What stands behind the application on the stream came too late, whenever this is asked.
    decided = record.decided_entry and streams.id_order(record.decided_entry) < streams.id_order(entry_id)
    who = (record.decided_by if record.decision == APPROVED else None) if decided else event.approved_by
    return (True, who) if who and who != author else (False, None)


def check_decision(known: Change, who: str, *, yes: bool, signers: Path) -> None:
    """Raise UsageError, with what to do instead, if `who` may not decide the change now (`yes`: approve it).

    `signers` is the file of those whose signatures count; while it exists, nobody approves by name alone.
    """
    if known.decision or known.state == APPLIED:
        done = f"{known.decision} by {known.decided_by}" if known.decision else "applied"
        raise UsageError(
            f"change “{known.change}” is already {done}", hint="a new change needs a new proposal"
        )
    if known.by == who:
        raise UsageError(f"“{who}” proposed change “{known.change}”", hint="somebody else has to decide it")
    if yes and signers.exists():
        raise UsageError(
            f"“{signers}” exists, and an approval by name alone does not count then",
            hint="remove that file to go on with approvals by name",
        )
