"""The watch over guarded files: what stands there is compared with what was approved, also what changed unseen.

Promise: a guarded file that differs from its last approved state for longer than `approvals.settle_seconds` (the time
an EM has to say what it has just written) is backed up, marked `unapproved`, put on the record, alerted once for what
stands there, and proposed, with its bytes, as a change that a human can approve or reject. Whether the service ran when
it happened does not matter: the approved state is on disk, and each scan looks at the files themselves. When all is as
approved again (by approval, or by `backup-worker revert`), the alert is resolved.

A scan that cannot read an agent's files decides nothing about it. The first scan of an agent accepts what it finds.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import msgpack

from backup_worker import alerts as alerting
from backup_worker import backups
from backup_worker.approval import approvals, changes, guarded
from backup_worker.approval.approved import ApprovedState, ApprovedStates, Differences, Held, How
from backup_worker.runtime import Runtime
from backup_worker.schedule import slot_name
from backup_worker.snapshots import Manifest, SnapshotError
from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.errors import printable
from em_bridge import events, streams
from em_bridge.errors import AgentBackupError, InvalidEvent

if TYPE_CHECKING:
    from backup_worker.approval.changes import Change

log = logging.getLogger(__name__)

FINDER = "backup-worker"
"""Who proposes what was found to be changed."""

UNKNOWN = "found: changed without an approval"
OLDER = "found: an older state than the approved one"
GONE = "this does not stand in the agent's files any more"

_MOST_PROPOSED = 900 * 1024
_LOOKED_AT = 100
"""In how many snapshots, the newest first, what stands there is looked for."""
_PROPOSAL_TTL_S = 30 * 86400.0
_DEVIATING = "backup:deviating:"
"""Hash, with the agent's name: path -> msgpack map, see `Deviation`."""


@dataclass(frozen=True, slots=True)
class Deviation:
    """A guarded file that is not as approved: `have` stands there since `since`, and not `want`; None is no file.

    `key` is the alert that a human got for it, empty while it is still too fresh to be told of.
    """

    want: str | None
    have: str | None
    since: float
    key: str = ""


def scan(runtime: Runtime, agent: str, now: float) -> dict[str, Any]:
    """Compare the agent's guarded files with what was approved, and act on it; return what deviates, by path."""
    with _one_at_a_time(runtime, agent):
        return _scan(runtime, agent, now)


@contextlib.contextmanager
def _one_at_a_time(runtime: Runtime, agent: str) -> Iterator[None]:
    """Hold the lock of this agent's watch: of two looks at once, the second knows what the first has told."""
    runtime.repository.prepare()
    with runtime.repository.lock(f"guard.{agent.lower()}"):
        yield


def _scan(runtime: Runtime, agent: str, now: float) -> dict[str, Any]:
    settle_s = runtime.config.schedule.approvals.settle_seconds
    scope = guarded.scope_of(runtime.config, agent)
    files = runtime.config.files_of(agent)
    look = guarded.look(runtime.client, files, scope, now)
    states = ApprovedStates(runtime.repository)
    state, known = states.load(agent), deviations(runtime, agent)
    if state is None or state.scope != scope:
        state = _accept_first(runtime, states, state, agent, look, known, now)
    differing = state.differences(look.found)
    accepted = _approved_since(runtime, state, differing)
    if accepted:
        state = accept(runtime, agent, accepted, from_root=True)
        differing = state.differences(look.found)
    current = {
        path: _deviation(known.get(path), want, have, look.changed_at.get(path, now), now)
        for path, (want, have) in differing.items()
    }
    fresh = [path for path, one in current.items() if not one.key and one.since <= now - settle_s]
    if fresh:
        current |= _tell(runtime, agent, {path: current[path] for path in fresh}, now)
    _remember(runtime, agent, current)
    _resolve(runtime, agent, known, current)
    told = [printable(path) for path, one in sorted(current.items()) if one.key]
    not_yet = [printable(path) for path, one in sorted(current.items()) if not one.key]
    return {"deviating": told, "fresh": not_yet, "files": len(look.found)}


def accept(runtime: Runtime, agent: str, files: Mapping[str, Held], *, from_root: bool = False,
           snapshot: Manifest | None = None) -> ApprovedState:  # fmt: skip
    """Make `files` the approved state, with bytes from the agent's root or from `snapshot`, and record it."""
    source = runtime.config.files_of(agent)

    def content(path: str) -> bytes | None:
        try:
            if snapshot is not None:
                with runtime.repository.files(snapshot.id) as tree:
                    return tree.read_bytes(path)
            with Tree(source.root, follow=True) as tree:
                return tree.read_bytes(path)
        except (OSError, AgentBackupError):
            return None

    scope = guarded.scope_of(runtime.config, agent)
    state = ApprovedStates(runtime.repository).accept(agent, scope, files, content)
    first = next(iter(files.values()))
    facts = {path: held.sha256 for path, held in sorted(files.items())}
    runtime.record(
        "approved-state", agent=agent, change=first.change or None, by=first.by or None, how=first.how, sha256=facts,
        found=from_root,
    )  # fmt: skip
    return state


def held(change: Change, sha256: str | None, mode: int, at: float) -> Held:
    """Return how a path that an approved change has set is held."""
    how: How = "signed" if change.signed else "by-name"
    if sha256 is not None and sha256 not in change.sha256.values():
        how = "unseen"
    return Held(sha256, how, at, mode, change.change, change.decided_by, change.decided_entry)


def deviations(runtime: Runtime, agent: str) -> dict[str, Deviation]:
    """Return what deviated when it was last looked, by path."""
    if runtime.client is None:
        return {}
    rows: Any = runtime.client.hgetall(_DEVIATING + agent)
    return {os.fsdecode(path): Deviation(**msgpack.unpackb(row)) for path, row in rows.items()}


def note_unapproved(
    runtime: Runtime, agent: str, found: Mapping[str, str | None], key: str, now: float
) -> None:
    """Remember that people were told, by the alert `key`, of what an unapproved change has left."""
    with _one_at_a_time(runtime, agent):
        state = ApprovedStates(runtime.repository).load(agent)
        wanted = {path: held.sha256 for path, held in state.files.items()} if state else {}
        known = deviations(runtime, agent)
        for path, have in found.items():
            known[path] = Deviation(wanted.get(path), have, now, key)
        _remember(runtime, agent, known)


def _accept_first(
    runtime: Runtime,
    states: ApprovedStates,
    state: ApprovedState | None,
    agent: str,
    look: guarded.Look,
    known: Mapping[str, Deviation],
    now: float,
) -> ApprovedState:
    """Accept what was never looked at before: a new agent, or paths that the configuration guards from now on.

    What people were told of as unapproved is not accepted.
    """
    fresh = {
        path: Held(digest, "first-seen", now, look.modes[path])
        for path, digest in look.found.items()
        if path not in known and (state is None or not state.scope.covers(path))
    }
    if fresh:
        return accept(runtime, agent, fresh, from_root=True)
    return states.accept(agent, guarded.scope_of(runtime.config, agent), {}, lambda _: None)


def _approved_since(runtime: Runtime, state: ApprovedState, differing: Differences) -> dict[str, Held]:
    """Return what differs because of an approved change that nobody has said is applied, or was not looked at yet."""
    if not differing or runtime.client is None:
        return {}
    covered = approvals.covered(runtime.client, approvals.rules(runtime.config), state, differing)
    return {
        path: held(change, differing[path][1], _mode(runtime, state.agent, path), change.decided_at or 0.0)
        for path, change in covered.items()
    }


def _mode(runtime: Runtime, agent: str, path: str) -> int:
    try:
        with Tree(runtime.config.files_of(agent).root, follow=True) as tree:
            return tree.lstat(path).st_mode & 0o7777
    except OSError:
        return 0o600


def _deviation(
    known: Deviation | None, want: str | None, have: str | None, changed_at: float, now: float
) -> Deviation:
    if known is not None and known.have == have:
        return known
    # A file that is gone has no time: it counts from now on.
    return Deviation(want, have, min(changed_at, now) if have is not None else now)


def _tell(runtime: Runtime, agent: str, fresh: Mapping[str, Deviation], now: float) -> dict[str, Deviation]:
    """Back up, record, alert and propose what deviates; return it with the alert's key. Killed, it is done again."""
    digest = _digest(agent, fresh)
    key, change = f"unapproved/{agent}/{digest}", _found(agent, digest)
    snapshot = _back_up(runtime, agent, fresh, digest, now)
    runtime.record(
        "unapproved", agent=agent, paths=sorted(fresh), snapshot=snapshot, change=change,
        sha256={path: {"approved": one.want, "found": one.have} for path, one in sorted(fresh.items())},
    )  # fmt: skip
    older = _is_older(runtime, agent, fresh)
    proposed = _propose(runtime, agent, fresh, change, OLDER if older else UNKNOWN)
    names = ", ".join(map(printable, sorted(fresh)))
    mend = f"Put the approved state back: backup-worker revert {agent}"
    if proposed:
        mend += f"; or look at it (backup-worker changes show {change}), and approve it"
    kept = f"It is kept as {snapshot}." if snapshot else "It could not be backed up."
    if older:
        # A recovery or a restore has done that, or somebody who brought an old copy back.
        body = f"{names} of {agent} is as it was before a newer change was approved. {kept} {mend}."
        runtime.alert(
            key, "warning", f"{agent} holds an older state than the approved one", body, agent=agent
        )
    else:
        body = f"{names} of {agent} is not what was approved, and no approval covers it. {kept} {mend}."
        runtime.alert(key, "critical", f"unapproved change of {agent}", body, agent=agent)
    return {path: Deviation(one.want, one.have, one.since, key) for path, one in fresh.items()}


def _is_older(runtime: Runtime, agent: str, fresh: Mapping[str, Deviation]) -> bool:
    """Tell whether all of it stood there before, as snapshots that are not of an unapproved change know."""
    left = {path: one.have for path, one in fresh.items()}
    heads = [
        head for head in runtime.repository.snapshots(agent) if head.is_good and head.approved is not False
    ]
    for head in heads[: -_LOOKED_AT - 1 : -1]:
        try:
            held = guarded.of_entries(runtime.repository.get(head.id).entries, head.scope)
        except AgentBackupError:
            continue

        for path in [path for path, have in left.items() if have is not None and held.get(path) == have]:
            if head.created_at < fresh[path].since:
                del left[path]
        if not left:
            return True
    return False


def _digest(agent: str, fresh: Mapping[str, Deviation]) -> str:
    rows = [[agent, path, one.want, one.have, int(one.since)] for path, one in sorted(fresh.items())]
    return hashlib.sha256(msgpack.packb(rows, unicode_errors="surrogateescape")).hexdigest()[:12]


def _back_up(runtime: Runtime, agent: str, fresh: Iterable[str], digest: str, now: float) -> str | None:
    """Take a snapshot, marked unapproved, in the first tier that waits for applied changes; return its id."""
    for name, tier in runtime.config.schedule.tiers.items():
        if events.ConfigApplied.type not in tier.events:
            continue
        slot = slot_name(tier, runtime.config.schedule.timezone, now)
        reason = f"changed without an approval: {', '.join(sorted(fresh))}"
        try:
            made = backups.make(
                runtime, agent, name, tier, slot, now, reason=reason, on_taken="next",
                event=f"guard/{digest}", approved=False,
            )  # fmt: skip
        except SnapshotError as error:
            # The alert matters more, and says that there is none.
            log.error("no snapshot of the unapproved change of %s: %s", agent, error.message)
            return None
        return made.id
    return None


def _propose(runtime: Runtime, agent: str, fresh: Mapping[str, Deviation], change: str, why: str) -> bool:
    """Put what was found into the inbox, if its bytes can be shown there; a file that is gone cannot."""
    if any(one.have is None for one in fresh.values()):
        return False
    try:
        with Tree(runtime.config.files_of(agent).root, follow=True) as tree:
            if sum(tree.lstat(path).st_size for path in fresh) > _MOST_PROPOSED:
                return False
            content = {path: tree.read_bytes(path) for path in fresh}
    except OSError:
        return False
    same = all(hashlib.sha256(content[path]).hexdigest() == one.have for path, one in fresh.items())
    if not same:
        return False
    try:
        event = events.ConfigProposed(change, agent, tuple(sorted(fresh)), FINDER, why, proposed=content)
    except InvalidEvent:
        # A name that is not text cannot travel on the bus.
        return False
    streams.append_once(runtime.redis, event, once=f"guard/{change}", ttl_s=_PROPOSAL_TTL_S)
    return True


def _remember(runtime: Runtime, agent: str, current: Mapping[str, Deviation]) -> None:
    if runtime.client is None:
        return
    with runtime.client.pipeline(transaction=True) as pipeline:
        pipeline.delete(_DEVIATING + agent)
        if current:
            rows: Any = {os.fsencode(path): msgpack.packb(asdict(one)) for path, one in current.items()}
            pipeline.hset(_DEVIATING + agent, mapping=rows)
        pipeline.execute()


def _resolve(
    runtime: Runtime, agent: str, known: Mapping[str, Deviation], current: Mapping[str, Deviation]
) -> None:
    """Close the alerts of which nothing is left, and take back what was proposed of it."""
    left = {one.key for one in current.values()}
    over = sorted({one.key for one in known.values() if one.key} - left)
    for key in over:
        runtime.resolve(key)
    if over:
        _take_back(runtime, agent, left)
    if runtime.client is not None:
        for alert in alerting.open_alerts(runtime.client):
            if alert.key.startswith(f"unapproved/{agent}/") and alert.key not in left:
                runtime.resolve(alert.key)


def _take_back(runtime: Runtime, agent: str, left: Collection[str]) -> None:
    """Reject what the watch has proposed of something that does not stand there any more."""
    if runtime.client is None:
        return
    names = {_found(agent, key.rpartition("/")[2]) for key in left}
    for one in changes.all_changes(runtime.client, approvals.rules(runtime.config), agent):
        if one.by == FINDER and one.state == changes.PROPOSED and one.change not in names:
            event = events.ConfigRejected(one.change, FINDER, GONE)
            streams.append_once(runtime.client, event, once=f"guard/{one.change}/back", ttl_s=_PROPOSAL_TTL_S)


def _found(agent: str, digest: str) -> str:
    """Return the name of the change that is proposed of a deviation."""
    return f"found-{agent}-{digest}"
