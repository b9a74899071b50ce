"""Who may decide about a change, and whether what was applied is what was approved.

Promise: an applied change counts as approved only if a decision that counts stands on the stream before the
application, and what was found in the files is, path by path, what was proposed: the same agent, no other path, the
same SHA-256. A path that was proposed without its content was approved unseen: such an approval is bound, for good, to
the first bytes that are applied under it, and to no later ones. Where no file `allowed_signers` exists, the EM's word
in `approved_by` does for a decision; the bytes are compared all the same.

Whatever cannot be decided is not approved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import msgpack

from backup_worker.approval import changes, signatures
from backup_worker.approval.changes import APPLIED, APPROVED, REJECTED, Change, Rules, same_person
from em_bridge import clock, events, streams
from em_bridge.errors import UsageError
from em_bridge.publisher import Publisher

if TYPE_CHECKING:
    from redis import Redis

    from backup_worker.approval.approved import ApprovedState, Differences
    from backup_worker.config import Config

BOUND = "backup:changes:bound"
"""Hash: change -> msgpack map path -> SHA-256 or None, of what was applied first under an approval given unseen."""

Found = Mapping[str, str | None]
"""What stands in an agent's files: path -> SHA-256; None, or no key, where there is nothing."""


def rules(config: Config, now: float | None = None) -> Rules:
    """Return which decisions count under `config`, as of `now` (default: this moment)."""
    expire_s = config.schedule.approvals.expire_days * 86400.0
    return Rules(config.allowed_signers, expire_s, clock.now() if now is None else now)


# ── deciding ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_decision(known: Change, who: str, *, yes: bool, rules: Rules, proposal: str | None = None) -> None:
    """Raise UsageError, with what to do instead, if `who` may not decide the change now (`yes`: approve it).

    `proposal` is the entry of the proposal that `who` has seen (empty: there was none), None if that is not known. The
    signature that an approval may need is not asked for here.
    """
    if proposal is not None and proposal != known.proposal:
        raise UsageError(
            f"what is proposed as “{known.change}” now is not the one you have seen",
            hint="it was proposed anew: look at it again, with `backup-worker changes show CHANGE` or in the console",
        )
    if known.decision or known.state == APPLIED:
        done = f"{known.decision} by {known.decided_by}" if known.decision else "applied"
        raise UsageError(
            f"change “{known.change}” is already {done}", hint="a new change needs a new proposal"
        )
    if yes and same_person(known.by, who):
        raise UsageError(f"“{who}” proposed change “{known.change}”", hint="somebody else has to decide it")
    expires_at = rules.expires_at(known)
    if yes and expires_at is not None and rules.now is not None and rules.now > expires_at:
        raise UsageError(f"change “{known.change}” has expired", hint="propose it again, under a new name")
    if yes and rules.need_signature and not known.proposal:
        raise UsageError(
            f"nothing was proposed as “{known.change}”, and a signature has to be about something",
            hint="it has to be proposed first",
        )


def decide(
    client: Redis,
    change: str,
    who: str,
    *,
    yes: bool,
    rules: Rules,
    reason: str = "",
    signature: str | bytes | None = None,
    proposal: str | None = None,
    patience_s: float = 30.0,
) -> str:
    """Publish the decision of `who` and return its entry on the stream.

    Where signers exist, `signature` is one over `changes.statement(change, who)`, made with `ssh-keygen -Y sign -n
    agent-backup`. It is proven before anything is published. `proposal` is as in `check_decision`. Raises NotFound, and
    UsageError for a decision that would not count.
    """
    known = changes.get(client, change, rules)
    check_decision(known, who, yes=yes, rules=rules, proposal=proposal)
    if yes and rules.need_signature:
        assert rules.signers is not None
        if not signature:
            raise UsageError(
                f"“{rules.signers}” exists, and an approval by name alone does not count then",
                hint="sign it: `backup-worker approve CHANGE --by NAME --key FILE`, or --signature FILE",
            )
        problem = signatures.fault(
            changes.statement(known, who), signature, who=who, signers=rules.signers,
            at=clock.now() if rules.now is None else rules.now,
        )  # fmt: skip
        if problem:
            hint = f"the names and keys that count are in {rules.signers}; what is to be signed: approve --statement"
            raise UsageError(f"the approval of “{change}” does not count: {problem}", hint=hint)
    publisher = Publisher(client, patience_s=patience_s)
    if yes:
        return publisher.config_approved(change=change, by=who, reason=reason, signature=signature)
    return publisher.config_rejected(change=change, by=who, reason=reason, signature=signature)


# ── judging ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Ruling:
    """Whether the application of `change` to `paths` was approved, by whom, or why not.

    `expected` says by path which SHA-256 was approved; a path that is not in it was approved unseen. `entry` is the
    decision's on the stream, and empty where it is the EM's word in the application.
    """

    change: str
    paths: tuple[str, ...]
    approved: bool
    by: str | None = None
    why: str = ""
    entry: str = ""
    signed: bool = False
    expected: Mapping[str, str] = field(default_factory=dict)

    def touches(self, path: str) -> bool:
        """Tell whether the change is about `path`, by itself or by a folder above it."""
        return any(path == one or path.startswith(one + "/") or one == "." for one in self.paths)

    def applied(self, found: Found) -> dict[str, str | None]:
        """Return what the change has left where it may write: the files in `found`, None for what is gone."""
        here = {path: digest for path, digest in found.items() if self.touches(path)}
        wanted = {path for path in self.expected if self.touches(path)}
        named = {path for path in self.paths if not any(other.startswith(path + "/") for other in here)}
        return {**dict.fromkeys(sorted(wanted | named)), **here}

    def refused(self, why: str) -> Ruling:
        """Return the same without the approval."""
        return replace(self, approved=False, by=None, why=why)


def judge(client: Redis, event: events.ConfigApplied, entry: str, *, rules: Rules) -> Ruling:
    """Return whether the applied change was approved, as of its entry on the stream, whatever its bytes are."""
    record = changes.as_of(client, event.change, entry, rules)
    ruling = Ruling(event.change, tuple(map(changes.clean, event.paths)), approved=False)
    if record is None:
        return replace(ruling, why="there is no record of it")
    if not ruling.paths:
        ruling = replace(ruling, paths=record.paths)
    if not ruling.paths:
        return replace(ruling, why="it names no path")
    author = record.by if record.proposal else event.by
    if record.proposal:
        ruling = replace(ruling, expected=record.sha256)
        if event.agent.lower() != record.agent.lower():
            return replace(ruling, why=f"it was proposed for {record.agent}")
        proposed = replace(ruling, paths=record.paths)
        if more := [path for path in ruling.paths if not proposed.touches(path)]:
            return replace(ruling, why=f"{', '.join(more)} was not a part of what was proposed")
    if record.decision == APPROVED:
        signed, who = record.signed, record.decided_by
        return replace(ruling, approved=True, by=who, entry=record.decided_entry, signed=signed)
    if record.decision == REJECTED:
        return replace(ruling, why=f"it was rejected by {record.decided_by}")
    if rules.need_signature:
        why = "; ".join(record.refused) or "nobody in allowed_signers has approved it"
        return replace(ruling, why=why)
    expires_at = rules.expires_at(record)
    if expires_at is not None and streams.entry_time(entry) > expires_at:
        return replace(ruling, why="the proposal had expired, and nobody had approved it")
    if event.approved_by and not same_person(event.approved_by, author):
        return replace(ruling, approved=True, by=event.approved_by)
    return replace(ruling, why="; ".join(record.refused) or "nobody has approved it")


def compare(
    client: Redis, ruling: Ruling, found: Found, others: Mapping[str, Mapping[str, Change]]
) -> Ruling:
    """Return `ruling` as it is for the bytes that were `found`, and bind an approval that was given unseen to them.

    `others` are bytes that other approvals allow (see `allowed`): a change that was applied on top of this one before
    anybody looked is not held against it.
    """
    if not ruling.approved:
        return ruling
    applied = ruling.applied(found)
    unseen: dict[str, str | None] = {}
    for path, digest in sorted(applied.items()):
        wanted = ruling.expected.get(path)
        if wanted is None:
            unseen[path] = digest
        elif digest != wanted and (digest is None or digest not in others.get(path, {})):
            return ruling.refused(f"{path} is not what was approved" if digest else f"{path} is not there")
    if not unseen or not ruling.entry or client.hsetnx(BOUND, ruling.change, _packed(unseen)):
        return ruling
    stored = client.hget(BOUND, ruling.change)
    assert isinstance(stored, bytes)
    first = msgpack.unpackb(stored, unicode_errors="surrogateescape")
    for path, digest in unseen.items():
        if first.get(path) != digest and not (digest and digest in others.get(path, {})):
            return ruling.refused(
                f"{path} is not what was applied first under this approval, which was given unseen"
            )
    return ruling


def _packed(found: Found) -> bytes:
    # A file's name need not be text.
    return bytes(msgpack.packb(dict(found), unicode_errors="surrogateescape"))


def covered(client: Redis, rules: Rules, state: ApprovedState, differing: Differences) -> dict[str, Change]:
    """Return which of the `differing` paths hold what a change allows that is newer than their approved state."""
    newer = {
        entry: allowed(client, rules, state.agent, entry) for entry in set(map(state.newest_entry, differing))
    }
    found = {}
    for path, (_, have) in differing.items():
        change = newer[state.newest_entry(path)].get(path, {}).get(have or "")
        if change is not None:
            found[path] = change
    return found


def allowed(client: Redis, rules: Rules, agent: str, after: str) -> dict[str, dict[str, Change]]:
    """Return by path and SHA-256 the approved changes of `agent` whose decisions stand on the stream behind `after`."""
    limit = streams.id_order(after) if after else (0, 0)
    found: dict[str, dict[str, Change]] = {}
    for one in changes.all_changes(client, rules, agent, after or "0-0"):
        if one.decision == APPROVED and streams.id_order(one.decided_entry) > limit:
            for path, digest in one.sha256.items():
                found.setdefault(path, {})[digest] = one
    return found
