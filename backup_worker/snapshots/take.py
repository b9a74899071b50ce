"""Take one snapshot: stage aside, sync, read back, judge, and give it its name by one rename.

Killed anywhere, the repository holds the previous snapshots and nothing half; whatever fails raises `SnapshotError`
and leaves nothing behind. Running again for the same bus event returns what the first run made.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from backup_worker.snapshots import disk
from backup_worker.snapshots.capture import Capture, Captured
from backup_worker.snapshots.capture_file import Previous
from backup_worker.snapshots.content import opened_ahead
from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.errors import NoSpace, SnapshotError, from_os_error, printable
from backup_worker.snapshots.hooks import around_backup
from backup_worker.snapshots.manifest import (
    CHECKSUMS,
    FILES,
    MANIFEST,
    Entry,
    Head,
    Manifest,
    Status,
    checksums,
    encode,
    snapshot_id,
)
from backup_worker.snapshots.repository import Repository
from backup_worker.snapshots.sanity import Limits, Look, judge
from backup_worker.snapshots.scope import WORKSHOP, AgentFiles
from backup_worker.snapshots.together import Sync, Work, alone, weight
from backup_worker.snapshots.verify import read_all_back
from backup_worker.units import size
from em_bridge.errors import NotFound, UsageError

Attest = Callable[[Mapping[str, Entry]], tuple[bool | None, str | None]]
"""Says of what was captured, by path, whether it was approved, and by whom."""


def take_snapshot(
    repo: Repository,
    agent: AgentFiles,
    *,
    tier: str,
    slot: str,
    include: Sequence[str],
    unchanged: Literal["link", "copy"],
    now: float,
    reason: str,
    event: str | None = None,
    approved: bool | None = None,
    approved_by: str | None = None,
    attest: Attest | None = None,
    on_taken: Literal["next", "return"] = "next",
    limits: Limits | None = None,
) -> Manifest:
    """Copy `agent`'s files of the classes `include` into `<tier>/<slot>/<agent>` and return the manifest.

    A taken slot gives `<slot>-2` and so on (`on_taken="next"`), or the snapshot that is there (`"return"`: a scheduled
    slot is made once). With `event`, the snapshot of that slot made for the same event is returned. `approved` False
    means: by a change that nobody approved; `attest` is asked about the very bytes that were copied, and has the last
    word on it. Raises SnapshotError, NoSpace, UsageError; none leaves anything behind.
    """
    return alone(
        taking(
            repo, agent, tier=tier, slot=slot, include=include, unchanged=unchanged, now=now, reason=reason,
            event=event, approved=approved, approved_by=approved_by, attest=attest, on_taken=on_taken, limits=limits,
        )
    )  # fmt: skip


def taking(
    repo: Repository,
    agent: AgentFiles,
    *,
    tier: str,
    slot: str,
    include: Sequence[str],
    unchanged: Literal["link", "copy"],
    now: float,
    reason: str,
    event: str | None = None,
    approved: bool | None = None,
    approved_by: str | None = None,
    attest: Attest | None = None,
    on_taken: Literal["next", "return"] = "next",
    limits: Limits | None = None,
) -> Work[Manifest]:
    """As `take_snapshot`, as a work that can share its waits for the disk with others, of other agents."""
    snapshot_id(tier, slot, agent.name)
    doing = f"backing up “{agent.name}”"
    try:
        _check_places(repo, agent)
        repo.prepare()
        with (
            repo.lock(f"take.{tier}.{agent.name.lower()}"),
            repo.lock(f"tree.{agent.name.lower()}", shared=True),
        ):
            earlier = repo.snapshots(agent.name, tier)
            made = _already_made(repo, earlier, slot, event, on_taken)
            if made is not None:
                return made
            head = Head(
                id="", agent=agent.name, tier=tier, slot=slot, created_at=now, reason=reason, status="good", files=0,
                bytes=0, scope=agent.scope(include), approved=approved, approved_by=approved_by, event=event,
            )  # fmt: skip
            work = _Taking(repo, agent, head, unchanged, limits or Limits(), earlier, attest)
            manifest = yield from work.run()
        repo.record_success(tier, agent.name)
        return replace(manifest, verified_at=manifest.created_at)
    except NoSpace:
        # Not a reason to stop pruning: a full disk could then never be freed.
        raise
    except SnapshotError:
        _record_failure(repo, tier, agent.name, now)
        raise
    except OSError as error:
        failure = from_os_error(doing, error)
        if not isinstance(failure, NoSpace):
            _record_failure(repo, tier, agent.name, now)
        raise failure from error


def _record_failure(repo: Repository, tier: str, agent: str, now: float) -> None:
    # The failure itself is on its way to the caller; a repository that cannot even take this note deletes nothing.
    with contextlib.suppress(OSError):
        if repo.hidden.is_dir():
            repo.record_failure(tier, agent, now=now)


def _check_places(repo: Repository, agent: AgentFiles) -> None:
    if not agent.root.is_dir():
        what = "is not a folder" if agent.root.exists() else "does not exist"
        raise SnapshotError(
            f"the root “{agent.root}” of “{agent.name}” {what}", hint="see `root` in agents.json"
        )
    root, store = os.path.realpath(agent.root), os.path.realpath(repo.root)
    if os.path.commonpath((root, store)) in (root, store):
        raise UsageError(
            f"the repository “{store}” and the root “{root}” of “{agent.name}” lie within each other",
            hint="put the repository outside of every agent's root",
        )
    if os.path.exists(os.path.join(root, WORKSHOP, "journal.json")):
        raise SnapshotError(
            f"a restore of “{agent.name}” was interrupted; its files are neither old nor new",
            hint="run the restore again: it finishes first what was begun",
        )


def _already_made(
    repo: Repository, earlier: Sequence[Head], slot: str, event: str | None, on_taken: str
) -> Manifest | None:
    for head in reversed(earlier):
        mine = head.slot == slot or (
            head.slot.startswith(slot + "-") and head.slot[len(slot) + 1 :].isdecimal()
        )
        if (event is not None and mine and head.event == event) or (
            on_taken == "return" and head.slot == slot
        ):
            return repo.get(head.id)
    return None


class _Taking:
    """The making of one snapshot, step by step."""

    def __init__(
        self,
        repo: Repository,
        agent: AgentFiles,
        head: Head,
        unchanged: str,
        limits: Limits,
        earlier: Sequence[Head],
        attest: Attest | None = None,
    ) -> None:
        self.repo, self.agent, self.head, self.unchanged, self.limits = repo, agent, head, unchanged, limits
        self.attest = attest
        self.previous = next((h for h in reversed(earlier) if not h.damaged), None)
        self.last_good = next((h for h in reversed(earlier) if h.is_good), None)
        self.warnings: list[str] = []
        self.manifest: Manifest | None = None

    def run(self) -> Work[Manifest]:
        with contextlib.ExitStack() as stack:
            previous = self._open_previous(stack)
            staging = stack.enter_context(self.repo.staging())
            source = stack.enter_context(Tree(self.agent.root, follow=True))
            snapshot, scratch = staging / "snapshot", staging / "scratch"
            for folder in (snapshot, snapshot / FILES):
                os.mkdir(folder, 0o700)
            store = stack.enter_context(Tree(snapshot / FILES))
            capture = Capture(source, store, scratch, self.head.scope, previous=previous)
            with around_backup(self.agent, self.warnings):
                self._check_space(capture.planned_bytes())
                captured = capture.run()
            look = Look(self.agent, store, self.manifest)
            yield Sync(store.fd, weight=weight(len(captured.entries), captured.bytes))
            yield from self._prove(capture, store, look)
            manifest = self._describe(store, captured, look)
            return (yield from self._commit(store.fd, snapshot, manifest))

    def _open_previous(self, stack: contextlib.ExitStack) -> Previous | None:
        if self.unchanged != "link" or self.previous is None:
            return None
        try:
            stack.enter_context(self.repo.hold([self.previous.id]))
            self.manifest = self.repo.get(self.previous.id)
            files = stack.enter_context(self.repo.files(self.previous.id))
            return Previous(files, self.manifest.by_path())
        except (SnapshotError, NotFound, OSError) as error:
            self.warnings.append(f"nothing is shared with “{self.previous.id}”: it cannot be read ({error})")
            return None

    def _check_space(self, needed: int) -> None:
        if self.unchanged == "link" and self.previous is not None:
            needed = 0  # how much is unchanged is not known yet
        free = self.repo.free_bytes() - self.limits.reserve_bytes
        if needed > free:
            raise NoSpace(
                f"backing up “{self.agent.name}” needs {size(needed)}, "
                f"and {size(max(free, 0))} are free beyond the reserve",
                hint="free some space, or run `backup-worker prune`",
            )

    def _prove(self, capture: Capture, store: Tree, look: Look) -> Work[None]:
        """Read everything back from the disk, and look at it; heal a shared file that has gone bad."""
        bad = [entry for entry, _ in read_all_back(store, capture.done.entries.values(), look)]
        damaged = [entry for entry in bad if entry.linked]
        if damaged and self.previous is not None:
            for entry in damaged:
                self.warnings.append(
                    f"“{printable(entry.path)}” is damaged in “{self.previous.id}”; copied afresh"
                )
            self.repo.record_verified(self.previous.id, now=self.head.created_at, ok=False)
            capture.take_again([entry.path for entry in damaged])
            yield Sync(store.fd)
            bad = [entry for entry, _ in read_all_back(store, capture.done.entries.values(), look)]
        if bad:
            raise SnapshotError(
                f"backing up “{self.agent.name}” failed: “{printable(bad[0].path)}” came back from the disk changed",
                hint="check the disk and the memory of this machine",
            )

    def _describe(self, store: Tree, captured: Captured, look: Look) -> Manifest:
        last_good = self.manifest
        if self.last_good is None or last_good is None or last_good.id != self.last_good.id:
            last_good = self.repo.get(self.last_good.id) if self.last_good else None
        doubts = judge(self.agent, self.head.scope, store, captured.entries, last_good, self.limits, look)
        named = {problem.path for problem in captured.problems}
        # What could not be copied is missing for that reason, and not for another.
        doubts = [doubt for doubt in doubts if doubt.path not in named]
        status: Status = "partial" if captured.problems else "suspect" if doubts else "good"
        entries = tuple(captured.entries[path] for path in sorted(captured.entries, key=disk.order))
        files = [entry for entry in entries if entry.kind == "file"]
        values = {key: getattr(self.head, key) for key in self.head.__dataclass_fields__}
        values |= {
            "status": status,
            "judge": look.judge,
            "files": len(files),
            "bytes": sum(entry.size for entry in files),
            "problems": (*captured.problems, *doubts),
            "warnings": tuple(self.warnings),
            "skipped": dict(captured.skipped),
        }
        if self.attest is not None:
            values["approved"], values["approved_by"] = self.attest(captured.entries)
        return Manifest(**values, entries=entries)

    def _commit(self, fd: int, snapshot: Path, manifest: Manifest) -> Work[Manifest]:
        number = 1
        while True:
            slot = self.head.slot if number == 1 else f"{self.head.slot}-{number}"
            identifier = snapshot_id(self.head.tier, slot, self.agent.name)
            self.repo.discard_remains(identifier)
            if not self.repo.path(identifier).exists():
                named = replace(manifest, id=identifier, slot=slot)
                papers = _write_papers(snapshot, named, again=number > 1)
                yield Sync(fd)
                _check_papers(snapshot, papers)
                with contextlib.suppress(FileExistsError):
                    self.repo.commit(snapshot, identifier, sync=False)
                    # Only now: a name that the disk does not know yet is not a snapshot.
                    yield Sync(fd)
                    return named
            number += 1


def _write_papers(snapshot: Path, manifest: Manifest, *, again: bool) -> dict[str, bytes]:
    content = encode(manifest)
    papers = {MANIFEST: content, CHECKSUMS: checksums(content, manifest.entries)}
    with Tree(snapshot) as tree:
        for name, text in papers.items():
            if again:
                tree.remove(name)
            disk.write_file(tree, name, text, sync=False)
    return papers


def _check_papers(snapshot: Path, papers: Mapping[str, bytes]) -> None:
    with Tree(snapshot) as tree:
        for name, found in opened_ahead(tree, papers, lambda name: name):
            if isinstance(found, OSError):
                raise found
            with open(os.dup(found), "rb", buffering=0) as file:
                if file.readall() != papers[name]:
                    raise SnapshotError(f"“{name}” came back from the disk changed")
