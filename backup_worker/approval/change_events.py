"""What is done about each event of a change: the record, the backup, the verdict, the alerts, the approved state.

Promise: an application backs up the state after the change; an approval that counts the state before it, in each tier
that lists `config.approved` among its events. The verdict on an application is about the very bytes that its snapshot
holds; if the change is not approved, or these are not the bytes that were approved, the snapshot is marked `unapproved`
and a human is alerted, and if they are, they become the approved state of the agent. An event may be handled twice: it
is on the record once, and makes the same snapshots.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backup_worker import backups
from backup_worker.approval import approvals, changes, guard, guarded
from backup_worker.approval.approvals import Ruling
from backup_worker.approval.approved import ApprovedStates, Held, How
from backup_worker.runtime import Runtime
from backup_worker.schedule import slot_name
from backup_worker.snapshots import Entry, Manifest, Scope, SnapshotError
from backup_worker.snapshots.take import Attest
from em_bridge import events, streams
from em_bridge.errors import AgentBackupError


@dataclass(slots=True)
class _Verdict:
    """The ruling on an application, as it stands once the bytes were seen; `found` is what was seen of its paths."""

    ruling: Ruling
    found: Mapping[str, str | None]

    @property
    def approved(self) -> bool:
        return self.ruling.approved


def handle(runtime: Runtime, event: changes.ConfigChange, entry: str, *, now: float) -> list[Manifest]:
    """Record a change event and make the snapshots that the tiers want for it.

    `entry` is the event's id on the stream: it names the slot and makes a second run return the same snapshots.
    """
    rules = approvals.rules(runtime.config, now)
    known = changes.get(runtime.redis, event.change, rules)
    # The event's own agent: the record of the change is about what was proposed.
    agent = runtime.config.id_of(getattr(event, "agent", known.agent))
    if not isinstance(event, events.ConfigApplied):
        _record(runtime, event, entry, known)
        made = _back_up(runtime, event, entry, known, agent, now, None) if agent else []
        if agent in runtime.config.agents and guard.deviations(runtime, agent):
            # What is approved now may be what stands there already.
            guard.scan(runtime, agent, now)
        return made
    ruling = approvals.judge(runtime.redis, event, entry, rules=rules)
    judging = _Judging(runtime, agent, ruling, rules)
    failure: AgentBackupError | None = None
    try:
        made = _back_up(runtime, event, entry, known, agent, now, judging)
    except AgentBackupError as error:
        # A full disk must not keep people from being told of a change that nobody approved.
        made, failure = [], error
    verdict = judging.verdict(made)
    _record(runtime, event, entry, known, verdict)
    if agent in runtime.config.agents:
        _act(runtime, agent, event, verdict, made, now)
    if failure is not None:
        raise failure
    return made


def _back_up(
    runtime: Runtime,
    event: changes.ConfigChange,
    entry: str,
    known: changes.Change,
    agent: str,
    now: float,
    judging: _Judging | None,
) -> list[Manifest]:
    made = []
    for name, tier in runtime.config.schedule.tiers.items():
        if event.type not in tier.events or not _counts(event, entry, known):
            continue
        slot = slot_name(tier, runtime.config.schedule.timezone, streams.entry_time(entry))
        why = event.reason or known.reason
        reason = f"{event.type} {event.change}" + (f": {why}" if why else "")
        made.append(
            backups.make(
                runtime, agent, name, tier, slot, now, reason=reason, on_taken="next",
                event=f"{streams.CONFIG_CHANGE}/{entry}",
                attest=judging.attest(runtime.config.files_of(agent).scope(tier.include)) if judging else None,
            )
        )  # fmt: skip
    return made


def _counts(event: changes.ConfigChange, entry: str, known: changes.Change) -> bool:
    """Tell whether an event may make a snapshot: an approval by nobody who may give it would fill the tier."""
    if not isinstance(event, events.ConfigApproved):
        return True
    return known.decision == changes.APPROVED and known.decided_entry == entry


class _Judging:
    """One ruling, put to the bytes that a snapshot has copied, or that stand in the agent's files."""

    def __init__(self, runtime: Runtime, agent: str, ruling: Ruling, rules: changes.Rules) -> None:
        self.runtime, self.agent, self.ruling, self.rules = runtime, agent, ruling, rules

    def attest(self, scope: Scope) -> Attest:
        """Return what answers for the engine, which asks about the copies in `scope` before it writes the manifest."""

        def answer(entries: Mapping[str, Entry]) -> tuple[bool, str | None]:
            ruling = self._compare(self._found(entries, scope))
            return ruling.approved, ruling.by

        return answer

    def verdict(self, made: list[Manifest]) -> _Verdict:
        """Return the verdict: that of the snapshots, if any was made; what they say of themselves stands."""
        if not made:
            found = self._found({}, Scope(()))
            return _Verdict(self._compare(found), self.ruling.applied(found))
        found = self._found(made[0].by_path(), made[0].scope)
        ruling = self._compare(found)
        if ruling.approved and not made[0].approved:
            ruling = ruling.refused("it was not when its snapshot was made")
        return _Verdict(ruling, self.ruling.applied(found))

    def _compare(self, found: Mapping[str, str]) -> Ruling:
        others = approvals.allowed(self.runtime.redis, self.rules, self.agent, self.ruling.entry)
        return approvals.compare(self.runtime.redis, self.ruling, found, others)

    def _found(self, entries: Mapping[str, Entry], scope: Scope) -> dict[str, str]:
        """Return the changed paths as the snapshot holds them; those it does not speak for as they stand now."""
        found = guarded.of_entries(entries.values(), scope)
        outside = [path for path in self.ruling.paths if not scope.covers(path)]
        if outside and self.agent in self.runtime.config.agents:
            files = self.runtime.config.files_of(self.agent)
            literal = Scope(tuple(re.sub(r"([*?\[])", r"[\1]", path) for path in outside))
            with contextlib.suppress(SnapshotError):
                found |= guarded.look(None, files, literal, 0.0).found
        return found


def _act(
    runtime: Runtime,
    agent: str,
    event: events.ConfigApplied,
    verdict: _Verdict,
    made: list[Manifest],
    now: float,
) -> None:
    """Make what is approved the approved state; tell people of what is not."""
    scope = guarded.scope_of(runtime.config, agent)
    found = {path: digest for path, digest in verdict.found.items() if scope.covers(path)}
    key = f"unapproved/{event.change}"
    if not verdict.approved:
        paths, who = ", ".join(verdict.ruling.paths) or "something", event.by or "somebody"
        body = f"{paths} of {agent} was changed by {who}, and {verdict.ruling.why}."
        body += f" Put the approved state back: backup-worker revert {agent}"
        runtime.alert(key, "critical", f"unapproved change of {agent}", body, agent=agent)
        guard.note_unapproved(runtime, agent, found, key, now)
    if ApprovedStates(runtime.repository).load(agent) is None:
        # The rest of its files has to be known before one of them can be approved.
        guard.scan(runtime, agent, now)
    if verdict.approved and found:
        held = {path: _held(verdict.ruling, path, digest, made, now) for path, digest in found.items()}
        _accept_if_new(runtime, agent, held, made)
        if guard.deviations(runtime, agent):
            guard.scan(runtime, agent, now)


def _accept_if_new(runtime: Runtime, agent: str, held: Mapping[str, Held], made: list[Manifest]) -> None:
    state = ApprovedStates(runtime.repository).load(agent)
    known = state.files if state else {}
    if all(path in known and known[path].sha256 == one.sha256 and known[path].change == one.change
           for path, one in held.items()):  # fmt: skip
        return
    guard.accept(runtime, agent, held, snapshot=made[0] if made else None, from_root=not made)


def _held(ruling: Ruling, path: str, digest: str | None, made: list[Manifest], now: float) -> Held:
    how: How = "signed" if ruling.signed else "by-name" if ruling.entry else "em-word"
    if ruling.entry and path not in ruling.expected:
        how = "unseen"
    entry = made[0].by_path().get(path) if made else None
    mode = entry.mode if entry else 0o600
    return Held(digest, how, now, mode, ruling.change, ruling.by or "", ruling.entry)


def _record(
    runtime: Runtime,
    event: changes.ConfigChange,
    entry: str,
    known: changes.Change,
    verdict: _Verdict | None = None,
) -> None:
    """Put a change event on the record, and open or close the notice that a change waits."""
    waiting = f"change/{event.change}"
    agent, paths = getattr(event, "agent", known.agent), getattr(event, "paths", known.paths)
    facts: dict[str, Any] = {"approved": None, "approved_by": None}
    if verdict is not None:
        facts = {
            "approved": verdict.approved, "approved_by": verdict.ruling.by, "signed": verdict.ruling.signed,
            "why": verdict.ruling.why, "sha256": dict(verdict.found),
        }  # fmt: skip
    elif isinstance(event, events.ConfigProposed):
        facts |= {"sha256": known.sha256}
    else:
        counts = known.decided_entry == entry
        facts |= {"counts": counts, "signed": counts and known.signed}
    runtime.record_once(
        f"change/{entry}", "change", event=event.type, change=event.change, agent=agent, paths=list(paths),
        by=event.by, reason=event.reason, **facts,
    )  # fmt: skip
    if known.state == changes.PROPOSED and known.agent and known.by != guard.FINDER:
        why = known.reason or "no reason given"
        body = f"{known.by} asks to change {', '.join(known.paths)} of {known.agent}: {why}"
        title = f"change {event.change} of {known.agent} waits for approval"
        runtime.alert(waiting, "info", title, body, agent=known.agent)
    else:
        runtime.resolve(waiting)
