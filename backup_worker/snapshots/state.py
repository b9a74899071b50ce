"""The state of an agent as of a time, put together from snapshots: what a restore is going to write.

For every path, the newest good snapshot whose scope covers the path decides, also when it says that the path is absent.
Paths that no snapshot covers are left as they are. Planning changes nothing on the agent's side, and every snapshot
that the plan rests on is read and proven first; a damaged one is noted and the next older one decides instead.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from backup_worker.snapshots import disk
from backup_worker.snapshots.content import copy_hashed
from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.errors import SnapshotError, printable, translated
from backup_worker.snapshots.manifest import Entry, Head, Manifest
from backup_worker.snapshots.repository import Repository
from backup_worker.snapshots.scope import AgentFiles, Scope
from backup_worker.snapshots.sqlite import COMPANIONS
from backup_worker.snapshots.verify import prove
from em_bridge import clock
from em_bridge.errors import NotFound, UsageError


@dataclass(frozen=True, slots=True)
class Piece:
    """One path of the state, and the id of the snapshot that it comes from."""

    entry: Entry
    source: str


@dataclass(frozen=True)
class RestorePlan:
    """What `execute` writes. `sources` are snapshot ids, newest first; `sources[0]` names the state."""

    repo: Repository
    agent: AgentFiles
    pieces: tuple[Piece, ...]
    sources: tuple[str, ...]
    scopes: tuple[Scope, ...] = field(repr=False)
    paths: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        """The newest snapshot of this state; give it to `plan_restore(exclude_states=…)` for the next older one."""
        return self.sources[0]

    @property
    def files(self) -> int:
        """How many regular files are written."""
        return sum(piece.entry.kind == "file" for piece in self.pieces)

    @property
    def bytes(self) -> int:
        """How many bytes of regular files are written."""
        return sum(piece.entry.size for piece in self.pieces if piece.entry.kind == "file")

    @cached_property
    def by_path(self) -> dict[str, Entry]:
        """The entries by path."""
        return {piece.entry.path: piece.entry for piece in self.pieces}

    @cached_property
    def _own(self) -> Scope:
        return Scope(self.paths or ("**",), tuple(self.agent.exclude))

    def decides(self, path: str) -> bool:
        """Tell whether this state says what is at `path`; all other paths stay as they are."""
        for suffix in COMPANIONS:
            # An old write-ahead log beside a restored database would be played into it, and destroy it.
            base = self.by_path.get(path.removesuffix(suffix)) if path.endswith(suffix) else None
            if base is not None and base.sqlite:
                return True
        return self._own.covers(path) and any(scope.covers(path) for scope in self.scopes)

    @property
    def missing_required(self) -> tuple[str, ...]:
        """Required paths that no good snapshot holds: they are only there afterwards if they are there now."""
        return tuple(
            path for path in self.agent.required if not self.paths and path.strip("/") not in self.by_path
        )


@dataclass(frozen=True, slots=True)
class Changes:
    """What a restore would do to a tree. `lost`: content that is in no newest backup, and only in the evidence then."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


@translated("planning the restore")
def plan_restore(
    repo: Repository,
    agent: AgentFiles,
    *,
    as_of: float | None = None,
    from_id: str | None = None,
    paths: Sequence[str] = (),
    exclude_states: Collection[str] = (),
    proven: bool = True,
) -> RestorePlan:
    """Plan the restore of the state as of `as_of` (Unix seconds; default: the newest), or of one snapshot `from_id`.

    `paths` (or patterns) restrict it. `exclude_states` are the `state`s that were tried already: the result is the
    next older state that differs from them in content. Raises NotFound if there is no such state, UsageError for
    paths that leave the root, SnapshotError if `from_id` is damaged. Only good snapshots are used, save `from_id`.
    Without `proven` nothing is read beforehand: `execute` finds damage too, and then raises DamagedSnapshot.
    """
    wanted = tuple(_clean(path) for path in paths)
    if from_id is not None:
        return _plan_from(repo, agent, from_id, wanted)
    heads = good_heads(repo, agent.name, as_of)
    passed_over: set[str] = set()
    tried: set[int] = set()
    while True:
        manifests = _deciding(repo, [head for head in heads if head.id not in passed_over])
        if not manifests:
            raise _no_state(agent.name, as_of, " that was not tried" if exclude_states else "")
        plan = compose(repo, agent, manifests, wanted)
        newest = manifests[0].id
        if newest in exclude_states or (tried and not wanted and _content(plan) in tried):
            tried |= {_content(plan)}
            passed_over.add(newest)
            continue
        damaged = _first_damaged(repo, plan.sources) if proven else None
        if damaged is None:
            return _found_paths(plan)
        passed_over.add(damaged)


def all_states(repo: Repository, agent: AgentFiles) -> list[RestorePlan]:
    """Return each state that the snapshots of `agent` make, if it differs from the one before it; oldest first.

    Suspect ones are among them, damaged ones are not. Nothing is proven: `execute` finds damage.
    """
    heads = [head for head in repo.snapshots(agent.name) if not head.damaged]
    states: list[RestorePlan] = []
    for count in range(1, len(heads) + 1):
        manifests = _deciding(repo, heads[:count])
        plan = compose(repo, agent, manifests) if manifests else None
        if plan is not None and (not states or _content(plan) != _content(states[-1])):
            states.append(plan)
    return states


def newest(heads: Iterable[Head]) -> dict[tuple[str, str], Head]:
    """Return (tier, agent) -> the last of its snapshots in `heads`, which are the oldest first. Pure."""
    return {(head.tier, head.agent): head for head in heads}


def good_heads(repo: Repository, agent: str, as_of: float | None = None) -> list[Head]:
    """Return what a state as of `as_of` may come from, oldest first. Raises NotFound if that is nothing."""
    heads = [h for h in repo.snapshots(agent) if h.is_good and (as_of is None or h.created_at <= as_of)]
    if not heads:
        raise _no_state(agent, as_of)
    return heads


def _no_state(agent: str, as_of: float | None, which: str = "") -> NotFound:
    when = " from that time or before" if as_of is not None else ""
    return NotFound(
        f"there is no good snapshot of “{agent}”{which}{when}",
        hint=f"see `backup-worker list --agent {agent}`; a suspect one can be named with --from",
    )


def _content(plan: RestorePlan) -> int:
    return hash(tuple((p.entry.path, p.entry.kind, p.entry.sha256, p.entry.target) for p in plan.pieces))


def _plan_from(repo: Repository, agent: AgentFiles, from_id: str, wanted: tuple[str, ...]) -> RestorePlan:
    manifest = repo.get(from_id)
    if manifest.agent != agent.name:
        raise UsageError(f"snapshot “{from_id}” is one of “{manifest.agent}”, not of “{agent.name}”")
    problems = prove(repo, from_id, now=clock.now())
    if problems:
        first = problems[0]
        raise SnapshotError(
            f"snapshot “{from_id}” is damaged: “{printable(first.path)}” {first.problem}",
            hint="choose another one",
        )
    return _found_paths(compose(repo, agent, [manifest], wanted))


def _first_damaged(repo: Repository, sources: Iterable[str]) -> str | None:
    for identifier in sources:
        try:
            if prove(repo, identifier, now=clock.now()):
                return identifier
        except NotFound:
            return identifier  # pruned meanwhile
    return None


def _deciding(repo: Repository, heads: list[Head]) -> list[Manifest]:
    """Return the newest snapshot of each scope, newest first: no other can decide about any path."""
    found: dict[Scope, Manifest] = {}
    for head in reversed(heads):
        if head.scope not in found:
            try:
                found[head.scope] = repo.get(head.id)
            except (NotFound, SnapshotError):
                continue
    return list(found.values())


def compose(
    repo: Repository, agent: AgentFiles, manifests: Sequence[Manifest], wanted: tuple[str, ...] = ()
) -> RestorePlan:
    """Lay `manifests` (newest first) over one another."""
    own = Scope(wanted or ("**",), tuple(agent.exclude))
    chosen: dict[str, Piece] = {}
    for position, manifest in enumerate(manifests):
        newer = [other.scope for other in manifests[:position]]
        # Most often they are the same, and asking costs more than all the rest here.
        same = own == manifest.scope
        for entry in manifest.entries:
            path = entry.path
            covered = path != "." and own.covers(path) and (same or manifest.scope.covers(path))
            if covered and not (newer and any(scope.covers(path) for scope in newer)):
                chosen[path] = Piece(entry, manifest.id)
    _add_ways(chosen, manifests)
    pieces = tuple(chosen[path] for path in sorted(chosen, key=disk.order))
    used = {piece.source for piece in pieces if piece.entry.path != "."}
    if not wanted or not used:
        # It names the whole state, also where all that it says is that something is gone.
        used.add(manifests[0].id)
    sources = tuple(manifest.id for manifest in manifests if manifest.id in used)
    return RestorePlan(repo, agent, pieces, sources, tuple(m.scope for m in manifests), wanted)


def _add_ways(chosen: dict[str, Piece], manifests: Sequence[Manifest]) -> None:
    """Add the folders above each piece, and the root; drop pieces below what is now a file."""
    folders: dict[str, Piece] = {}
    for manifest in manifests:
        for entry in manifest.entries:
            if entry.kind == "dir":
                folders.setdefault(entry.path, Piece(entry, manifest.id))
    is_way = {"": True}
    for path in sorted(chosen, key=disk.order):
        above = path.rpartition("/")[0]
        missing = []
        while above not in is_way:
            missing.append(above)
            above = above.rpartition("/")[0]
        for folder in reversed(missing):
            way = is_way[folder.rpartition("/")[0]]
            if way:
                piece = chosen.setdefault(folder, folders.get(folder) or _nameless(folder, manifests[0]))
                way = piece.entry.kind == "dir"
            is_way[folder] = way
        if not is_way[path.rpartition("/")[0]]:
            del chosen[path]
    if "." in folders:
        chosen["."] = folders["."]


def _nameless(folder: str, manifest: Manifest) -> Piece:
    """Return a folder of which no manifest says anything but that something lies in it."""
    return Piece(Entry(folder, "dir", 0, 0o700, int(manifest.created_at * 1e9)), manifest.id)


def _found_paths(plan: RestorePlan) -> RestorePlan:
    for wanted in plan.paths:
        only = Scope((wanted,))
        if not any(only.covers(path) for path in plan.by_path if path != "."):
            raise NotFound(
                f"no good snapshot of “{plan.agent.name}” holds “{printable(wanted)}”",
                hint="see `backup-worker show ID`",
            )
    return plan


def _clean(path: str) -> str:
    names = [name for name in path.split("/") if name not in ("", ".")]
    if path.startswith("/") or ".." in names or not names:
        raise UsageError(
            f"“{printable(path)}” is not a path below the agent's root", hint="give it relative to the root"
        )
    return "/".join(names)


def compare(plan: RestorePlan, target: Path) -> Changes:
    """Return what executing `plan` would do to `target` now. Reads every file there that it would touch."""
    newest: dict[str, Entry] | None = None
    changed: list[str] = []
    removed: list[str] = []
    lost: list[str] = []
    remaining = {path: entry for path, entry in plan.by_path.items() if path != "."}
    if target.is_dir():
        with Tree(target, follow=True) as tree:
            for path, info in disk.walk(tree):
                wanted = remaining.pop(path, None)
                if wanted is None and (is_special(info) or not plan.decides(path)):
                    continue
                if wanted is not None and same_on_disk(tree, path, info, wanted):
                    continue
                (changed if wanted else removed).append(path)
                newest = _newest_content(plan) if newest is None else newest
                kept = newest.get(path)
                if not stat.S_ISDIR(info.st_mode) and not (kept and same_on_disk(tree, path, info, kept)):
                    lost.append(path)
    return Changes(tuple(remaining), tuple(changed), tuple(removed), tuple(lost))


def _newest_content(plan: RestorePlan) -> dict[str, Entry]:
    # What is damaged is passed over by a restore, so nothing in it can be counted on.
    heads = [head for head in plan.repo.snapshots(plan.agent.name) if not head.damaged]
    manifests = _deciding(plan.repo, heads)
    return compose(plan.repo, plan.agent, manifests).by_path if manifests else {}


def is_special(info: os.stat_result) -> bool:
    """Tell whether it is a socket, pipe or device: snapshots say nothing about these, and a restore keeps them."""
    return not (stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode) or stat.S_ISLNK(info.st_mode))


def same_on_disk(tree: Tree, path: str, info: os.stat_result, entry: Entry) -> bool:
    """Tell whether `path` holds what `entry` says (content and type; modes and times are not compared)."""
    if entry.kind == "dir":
        return stat.S_ISDIR(info.st_mode)
    if entry.kind == "link":
        if not stat.S_ISLNK(info.st_mode):
            return False
        folder, name = tree.at(path)
        return os.readlink(name, dir_fd=folder) == entry.target
    if not stat.S_ISREG(info.st_mode) or info.st_size != entry.size:
        return False
    if entry.sqlite:
        # A copy of a database never equals it byte for byte; an untouched one has its times, and no log beside it.
        log = tree.find(path + "-wal")
        return info.st_mtime_ns == entry.mtime_ns and (log is None or log.st_size == 0)
    fd = tree.open(path, os.O_RDONLY)
    try:
        return copy_hashed(fd, None, info.st_size)[1] == entry.sha256
    finally:
        os.close(fd)
