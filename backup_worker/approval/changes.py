"""The approval inbox: what became of each proposed change, folded from the stream of config changes.

The stream is the truth. `fold` reads on from where the last reader stopped and writes records and position in one
transaction, so any number of processes may fold at once, and an entry is taken in once. A record keeps every decision
that somebody has sent; which of them counts is asked when the record is read (`settle`), by the rules of that moment.

A decision counts if it stands on the stream behind the proposal; an approval, if it is not the proposer's and came
before the proposal expired. (Who proposed a change may reject it: that takes it back.) Where a file `allowed_signers`
exists, an approval counts only with the signature of somebody in it over the statement of exactly this change: its
proposal, agent, paths and the SHA-256 of what they shall hold. The first decision that counts stands.
"""

from __future__ import annotations

import contextlib
import hashlib
import unicodedata
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import redis.exceptions

from backup_worker.approval import signatures
from backup_worker.history.canonical import canonical
from em_bridge import events, streams
from em_bridge.errors import InvalidEvent, NotFound

if TYPE_CHECKING:
    from redis import Redis

PROPOSED, APPROVED, REJECTED, APPLIED, EXPIRED = "proposed", "approved", "rejected", "applied", "expired"

ConfigChange = events.ConfigProposed | events.ConfigApproved | events.ConfigRejected | events.ConfigApplied
"""The events on the stream of config changes."""

STATEMENT = "agent-backup approval 1"
MOST_DECISIONS = 50
"""How many decisions on one change are kept: somebody who may write to the stream must not fill the server."""

RECORDS = "backup:changes"
"""Hash: change -> msgpack map, see `Change`."""

CURSOR = "backup:changes:cursor"
_BATCH = 500


@dataclass(frozen=True, slots=True)
class Decision:
    """Somebody's word on a change, as it stands on the stream as `entry`; `at` is the server's time."""

    by: str
    approved: bool
    at: float
    entry: str
    reason: str = ""
    signature: str | bytes | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """Which decisions count, as of `now` (None: nothing expires by itself, only by when it was decided).

    While the file `signers` exists, approvals need a signature of somebody in it.
    """

    signers: Path | None = None
    expire_s: float | None = None
    now: float | None = None

    @property
    def need_signature(self) -> bool:
        """Whether approvals by name alone do not count."""
        return self.signers is not None and self.signers.exists()

    def fault(self, change: Change, decision: Decision) -> str | None:
        """Return why `decision` on `change` does not count, or None if it does."""
        if not decision.approved:
            return None
        if same_person(decision.by, change.by):
            return f"“{decision.by}” proposed it"
        expires_at = self.expires_at(change)
        if expires_at is not None and decision.at > expires_at:
            return "it came after the proposal had expired"
        if not self.need_signature:
            return None
        if not change.proposal:
            return "nothing was proposed that it could be about"
        assert self.signers is not None
        return signatures.fault(
            statement(change, decision.by), decision.signature, who=decision.by, signers=self.signers,
            at=decision.at,
        )  # fmt: skip

    def expires_at(self, change: Change) -> float | None:
        """Return until when the proposal can be approved, if that ends."""
        if self.expire_s is None or change.proposed_at is None:
            return None
        return change.proposed_at + self.expire_s


BY_NAME = Rules()
"""Decisions count by the name they bear."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change and its fate. Times are Unix seconds of the server's clock.

    `agent`, `paths` and `by` are the proposal's, or the application's if nothing was proposed. `proposal` is the
    proposal's entry on the stream. What begins with `decided_`, `decision`, `refused` (why decisions that were sent do
    not count) and `expires_at` follow from `decisions` and the rules.
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
    decided_reason: str = ""
    decision: str = ""
    applied_at: float | None = None
    proposed: dict[str, bytes] | None = None
    proposal: str = ""
    decisions: tuple[Decision, ...] = ()
    signed: bool = False
    refused: tuple[str, ...] = ()
    expires_at: float | None = None

    @property
    def sha256(self) -> dict[str, str]:
        """The SHA-256 of the proposed content, by path; paths without content are not in it."""
        proposed = self.proposed or {}
        return {path: hashlib.sha256(content).hexdigest() for path, content in proposed.items()}

    def summary(self) -> dict[str, Any]:
        """Return the change in the form of `backup-worker changes --json`; contents as text where they are text."""
        record = asdict(self)
        del record["decisions"]
        record["paths"], record["refused"] = list(self.paths), list(self.refused)
        record["sha256"] = self.sha256
        if self.proposed is not None:
            record["proposed"] = {
                path: content.decode(errors="replace") for path, content in self.proposed.items()
            }
        return record


def statement(change: Change, who: str, decision: str = APPROVED) -> bytes:
    """Return the bytes that `who` signs to decide `change`: one line of JSON as RFC 8785 writes it, and its end.

    `proposal` and `proposed_at` name this very proposal, so that the signature is worth nothing for another one that
    uses the same name again. A path without content has null: such an approval is about whatever is applied first.
    """
    hashes = change.sha256
    proposed_at = datetime.fromtimestamp(change.proposed_at or 0.0, UTC)
    content = {
        "format": STATEMENT,
        "decision": decision,
        "change": change.change,
        "agent": change.agent,
        "paths": {path: hashes.get(path) for path in change.paths},
        "by": who,
        "proposed_by": change.by,
        "proposed_at": proposed_at.isoformat(timespec="milliseconds"),
        "proposal": change.proposal,
        "reason": change.reason,
    }
    return canonical(content).encode() + b"\n"


def clean(path: str) -> str:
    """Return a relative path in the one form in which snapshots name it."""
    return "/".join(name for name in path.split("/") if name not in ("", ".")) or "."


def same_person(one: str, other: str) -> bool:
    """Tell whether two names are one but for case, spaces around them and ways to write the same letter."""

    def plain(name: str) -> str:
        return unicodedata.normalize("NFKC", name).strip().casefold()

    return plain(one) == plain(other)


def settle(change: Change, rules: Rules = BY_NAME) -> Change:
    """Return `change` with the first of its decisions that counts. Pure but for the signers' file."""
    raw = PROPOSED if change.applied_at is None else APPLIED
    change = replace(
        change, decision="", decided_by="", decided_at=None, decided_entry="", decided_reason="", signed=False
    )
    refused = []
    expires_at = rules.expires_at(change)
    for one in change.decisions:
        if problem := rules.fault(change, one):
            refused.append(f"{'approval' if one.approved else 'rejection'} by {one.by}: {problem}")
            continue
        decision = APPROVED if one.approved else REJECTED
        return replace(
            change,
            state=raw if raw == APPLIED else decision,
            decision=decision,
            decided_by=one.by,
            decided_at=one.at,
            decided_entry=one.entry,
            decided_reason=one.reason,
            signed=one.approved and rules.need_signature,
            refused=tuple(refused),
            expires_at=expires_at,
        )
    over = expires_at is not None and rules.now is not None and rules.now > expires_at
    state = EXPIRED if over and raw == PROPOSED else raw
    return replace(change, state=state, refused=tuple(refused), expires_at=expires_at)


def advance(change: Change | None, event: ConfigChange, entry_id: str) -> Change:
    """Return the record of a change after `event`, which stands on the stream as `entry_id`. Pure."""
    at = streams.entry_time(entry_id)
    match event:
        case events.ConfigProposed():
            if change is not None and (change.state == APPLIED or (change.decisions and change.proposal)):
                return change
            # A decision on nothing is gone: it is about what was proposed when it was made.
            return _proposed(event, entry_id, at)
        case events.ConfigApproved() | events.ConfigRejected():
            known = change or Change(event.change, PROPOSED)
            if len(known.decisions) >= MOST_DECISIONS:
                return known
            yes = isinstance(event, events.ConfigApproved)
            decision = Decision(event.by, yes, at, entry_id, event.reason, event.signature)
            return replace(known, decisions=(*known.decisions, decision))
        case events.ConfigApplied():
            known = change or Change(event.change, APPLIED)
            if known.proposed_at is None and known.applied_at is None:
                paths = tuple(map(clean, event.paths))
                known = replace(known, agent=event.agent, paths=paths, by=event.by, reason=event.reason)
            return replace(known, state=APPLIED, applied_at=known.applied_at or at)


def _proposed(event: events.ConfigProposed, entry_id: str, at: float) -> Change:
    given = {clean(path): content for path, content in (event.proposed or {}).items()}
    return Change(
        event.change,
        PROPOSED,
        event.agent,
        tuple(dict.fromkeys([*map(clean, event.paths), *given])),
        event.by,
        event.reason,
        at,
        proposed=None if event.proposed is None else given,
        proposal=entry_id,
    )


def fold(client: Redis, upto: str = "+") -> None:
    """Take in what is new on the stream, up to entry `upto`."""
    while _has_news(client, upto):
        with client.pipeline(transaction=True) as pipeline:
            watch: Any = pipeline.watch
            watch(CURSOR)
            cursor: Any = pipeline.get(CURSOR)
            start = f"({cursor.decode()}" if cursor else "-"
            rows: Any = pipeline.xrange(streams.CONFIG_CHANGE, start, upto, count=_BATCH)
            if not rows:
                continue
            parsed = [(entry_id.decode(), _event(fields)) for entry_id, fields in rows]
            names = {event.change for _, event in parsed if event is not None}
            records = {name: record_of(pipeline.hget(RECORDS, name)) for name in names}
            for entry_id, event in parsed:
                if event is not None:
                    records[event.change] = advance(records[event.change], event, entry_id)
            pipeline.multi()
            for name, record in records.items():
                if record is not None:
                    pipeline.hset(RECORDS, name, msgpack.packb(asdict(record)))
            pipeline.set(CURSOR, parsed[-1][0])
            with contextlib.suppress(redis.exceptions.WatchError):
                pipeline.execute()


def _has_news(client: Redis, upto: str) -> bool:
    """Return whether entries up to `upto` were not taken in: one question, as each look at a record asks it."""
    with client.pipeline(transaction=False) as asking:
        asking.get(CURSOR)
        asking.xrevrange(streams.CONFIG_CHANGE, upto, "-", count=1)
        cursor, newest = asking.execute()
    done = streams.id_order(cursor.decode()) if cursor else (0, 0)
    return bool(newest) and streams.id_order(newest[0][0].decode()) > done


def _event(fields: Any) -> ConfigChange | None:
    try:
        event = events.decode(fields, stream=streams.CONFIG_CHANGE)
    except InvalidEvent:
        # The dispatcher makes a dead letter of it.
        return None
    return event if isinstance(event, ConfigChange) else None


def record_of(data: Any) -> Change | None:
    """Return the change that a value of `RECORDS` holds, None for none; nothing in it is settled."""
    if data is None:
        return None
    raw = {key: value for key, value in msgpack.unpackb(data).items() if key in _FIELDS}
    for key in ("paths", "refused"):
        raw[key] = tuple(raw.get(key, ()))
    raw["decisions"] = tuple(Decision(**one) for one in raw.get("decisions", ()))
    return Change(**raw)


_FIELDS = frozenset(field.name for field in fields(Change))


def get(client: Redis, change: str, rules: Rules = BY_NAME) -> Change:
    """Return the record of `change` as of now; raises NotFound."""
    fold(client)
    record = record_of(client.hget(RECORDS, change))
    if record is None:
        raise NotFound(f"there is no change “{change}”", hint="see `backup-worker changes --all`")
    return settle(record, rules)


def as_of(client: Redis, change: str, entry_id: str, rules: Rules) -> Change | None:
    """Return the record with only those decisions that stand on the stream before `entry_id`, None for no record.

    So the answer is the same whenever it is asked, also after somebody has folded further.
    """
    fold(client, upto=entry_id)
    record = record_of(client.hget(RECORDS, change))
    if record is None:
        return None
    limit = streams.id_order(entry_id)
    before = tuple(one for one in record.decisions if streams.id_order(one.entry) < limit)
    return settle(replace(record, decisions=before), rules)


def all_changes(
    client: Redis, rules: Rules = BY_NAME, agent: str | None = None, decided_after: str = ""
) -> list[Change]:
    """Return every change as of now, the newest last.

    With `agent` only its own, with `decided_after` (an entry on the stream) only those with a decision behind it: a
    process that asks for the first time has to prove each signature among what it asks for.
    """
    fold(client)
    stored: Any = client.hvals(RECORDS)
    limit = streams.id_order(decided_after) if decided_after else (-1, 0)
    found = [
        settle(record, rules)
        for record in map(record_of, stored)
        if record is not None
        and (agent is None or record.agent.lower() == agent.lower())
        and (not decided_after or any(streams.id_order(one.entry) > limit for one in record.decisions))
    ]
    return sorted(found, key=lambda one: (_first_at(one), one.change))


def last_at(change: Change) -> float:
    """Return when something was heard of the change last, Unix seconds."""
    decided_at = change.decisions[-1].at if change.decisions else 0.0
    return max(change.proposed_at or 0.0, decided_at, change.applied_at or 0.0)


def _first_at(change: Change) -> float:
    decided_at = change.decisions[0].at if change.decisions else None
    return change.proposed_at or decided_at or change.applied_at or 0.0
