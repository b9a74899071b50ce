"""Restore a state into a folder: stage, prove, keep evidence, swap.

All or nothing. What stands at the target is kept as evidence before anything changes, and where that is not possible
the restore refuses. What the state says nothing about (excluded paths such as virtual environments, caches and the
agent's outbox, and paths that no snapshot covers) is carried over. A killed restore leaves the old or the new tree;
the next one, or `finish_interrupted`, finishes or undoes it.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backup_worker.snapshots import disk, swap
from backup_worker.snapshots.content import copy_content
from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.errors import (
    DamagedSnapshot,
    NoSpace,
    SnapshotError,
    from_os_error,
    printable,
)
from backup_worker.snapshots.manifest import Entry
from backup_worker.snapshots.scope import WORKSHOP, AgentFiles, Scope
from backup_worker.snapshots.sqlite import COMPANIONS
from backup_worker.snapshots.state import RestorePlan, compare, is_special
from backup_worker.snapshots.together import Sync, Work, alone
from backup_worker.snapshots.verify import unproven
from em_bridge.errors import UsageError


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """What a restore did. `evidence`: where the tree that stood there before is kept, if there was one."""

    agent: str
    sources: tuple[str, ...]
    target: Path
    files: int
    bytes: int
    evidence: Path | None

    def as_json(self) -> dict[str, Any]:
        """Return the keys that `backup-worker restore --json` promises."""
        return {
            "agent": self.agent,
            "from": list(self.sources),
            "to": str(self.target),
            "files": self.files,
            "bytes": self.bytes,
            "evidence": str(self.evidence) if self.evidence else None,
            "ok": True,
        }


def execute(plan: RestorePlan, target: Path, *, evidence: Path | None, now: float) -> RestoreResult:
    """Make `target` hold the planned state and return what was done.

    `evidence` is the folder that what stands there now is copied to; it is made, with `-2` and so on if it is taken.
    None is only accepted where nothing would be lost. A target that holds the state already is left alone. The caller
    has proven that no process of the agent is alive. Raises DamagedSnapshot (plan again), SnapshotError, NoSpace,
    UsageError; the target is then as it was.
    """
    return alone(restoring(plan, target, evidence=evidence, now=now))


def restoring(plan: RestorePlan, target: Path, *, evidence: Path | None, now: float) -> Work[RestoreResult]:
    """As `execute`, as a work that can share its waits for the disk with others, of other agents."""
    target = Path(os.path.realpath(target))
    doing = f"restoring “{plan.agent.name}” into “{target}”"
    _check_target(plan, target, evidence)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with plan.repo.lock(f"tree.{plan.agent.name.lower()}"), plan.repo.hold(plan.sources):
            swap.finish_interrupted(target)
            changes = compare(plan, target)
            if target.is_dir() and not (changes.added or changes.changed or changes.removed):
                with Tree(target) as tree:
                    _dress(tree, (piece.entry for piece in plan.pieces))
                kept = evidence if evidence is not None and evidence.is_dir() else None
                return _result(plan, target, kept)
            if evidence is None and (changes.changed or changes.removed):
                raise UsageError(f"“{target}” is not empty, and there is no place to keep what stands there")
            kept = yield from _Replacing(plan, target, evidence, now).run()
    except OSError as error:
        raise from_os_error(doing, error) from error
    return _result(plan, target, kept)


def _result(plan: RestorePlan, target: Path, evidence: Path | None) -> RestoreResult:
    return RestoreResult(plan.agent.name, plan.sources, target, plan.files, plan.bytes, evidence)


def _check_target(plan: RestorePlan, target: Path, evidence: Path | None) -> None:
    store = plan.repo.root.resolve()
    if target == store or store in target.parents or target in store.parents:
        raise UsageError(
            f"“{target}” and the repository “{store}” lie within each other", hint="choose another folder"
        )
    if evidence is not None and target in (evidence.resolve(), *evidence.resolve().parents):
        raise UsageError(f"the evidence “{evidence}” would lie in “{target}”, which is replaced")
    if os.path.lexists(target) and not target.is_dir():
        raise UsageError(f"“{target}” is not a folder", hint="choose another folder")


class _Replacing:
    """One replacement of a tree, step by step."""

    def __init__(self, plan: RestorePlan, target: Path, evidence: Path | None, now: float) -> None:
        self.plan, self.target, self.evidence, self.now = plan, target, evidence, now
        self.kept: Path | None = None

    def run(self) -> Work[Path | None]:
        workshop = swap.choose(self.target)
        try:
            try:
                yield from self._replace(workshop)
            except swap.CannotExchange:
                workshop = swap.inside(self.target)
                yield from self._replace(workshop)
        except BaseException:
            if self.kept is not None and not swap.is_pending(workshop):
                # Nothing was changed: what stands there is not evidence of anything.
                with contextlib.suppress(OSError), Tree(self.kept.parent) as parent:
                    parent.remove(self.kept.name)
            raise
        root = self.plan.by_path.get(".")
        if workshop.inside and root is not None:
            os.utime(self.target, ns=(root.mtime_ns, root.mtime_ns))
        return self.kept

    def _replace(self, workshop: swap.Workshop) -> Work[None]:
        with Tree(workshop.path.parent) as around, swap.opened(workshop):
            with Tree(workshop.tree) as staged:
                entries = _stage(self.plan, staged)
                folders: list[Entry] = []
                if self.target.is_dir():
                    with Tree(self.target) as old:
                        folders, blocked = _carry_over(self.plan, old, staged)
                    if self.evidence is not None and self.kept is None:
                        self.kept = keep_evidence(self.plan.agent, self.target, self.evidence, also=blocked)
                yield Sync(staged.fd, weight=len(self.plan.pieces) + self.plan.bytes // 32768)
                self._prove(staged)
                _dress(staged, [*entries, *folders])
                yield Sync(staged.fd)
            # Reading and building are over: nothing from here on needs space, or the right to read.
            swap.swap(workshop)
            yield Sync(around.fd)

    def _prove(self, staged: Tree) -> None:
        bad = unproven(staged, (piece.entry for piece in self.plan.pieces))
        if bad:
            self._blame_source(bad[0])
            where = printable(bad[0].path)
            raise SnapshotError(
                f"restoring “{self.plan.agent.name}” failed: “{where}” came back from the disk changed",
                hint="check the disk and the memory of this machine; the target is as it was",
            )

    def _blame_source(self, entry: Entry) -> None:
        """Raise DamagedSnapshot if not the copy, but what was copied is not what it should be."""
        source = next(piece.source for piece in self.plan.pieces if piece.entry is entry)
        with self.plan.repo.files(source) as files:
            if not unproven(files, [entry]):
                return
        self.plan.repo.record_verified(source, now=self.now, ok=False)
        raise DamagedSnapshot(
            f"snapshot “{source}” is damaged: “{printable(entry.path)}” changed; nothing was restored",
            hint="run the restore again: it chooses another snapshot",
        )


# -- staging --------------------------------------------------------------------------------------------------------


def _stage(plan: RestorePlan, staged: Tree) -> list[Entry]:
    """Copy every piece; return those that get their modes and times only when they have been read back.

    The content is compared when it is read back from the disk, so that it is hashed once.
    """
    later: list[Entry] = []
    privileged = os.geteuid() == 0
    with contextlib.ExitStack() as stack:
        sources = {name: stack.enter_context(plan.repo.files(name)) for name in plan.sources}
        origin = {piece.entry.path: piece.source for piece in plan.pieces}
        for piece in plan.pieces:
            entry = piece.entry
            if entry.path == ".":
                later.append(entry)
            elif entry.kind == "dir":
                staged.make_folders(entry.path)
                later.append(entry)
            elif entry.kind == "link":
                folder, name = staged.at(entry.path)
                os.symlink(entry.target or "", name, dir_fd=folder)
                later.append(entry)
            elif not (entry.hardlink and origin.get(entry.hardlink) == piece.source and _join(staged, entry)):
                finish = privileged or entry.mode & 0o400 != 0
                _copy_file(sources[piece.source], staged, entry, dress=finish)
                if not finish:
                    later.append(entry)
    return later


def _join(staged: Tree, entry: Entry) -> bool:
    """Make the path another name of the file that it was a hard link to; tell whether that was possible."""
    assert entry.hardlink is not None
    try:
        folder, name = staged.at(entry.hardlink)
        held = os.dup(folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        to_folder, to_name = staged.at(entry.path)
        os.link(name, to_name, src_dir_fd=held, dst_dir_fd=to_folder, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EMLINK, errno.EPERM):
            return False
        raise
    finally:
        os.close(held)
    return True


def _copy_file(source: Tree, target: Tree, entry: Entry, *, dress: bool) -> None:
    fd = source.open(entry.path, os.O_RDONLY)
    try:
        out = target.open(entry.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            copy_content(fd, out, os.fstat(fd).st_size)
            if dress:
                _dress_file(out, entry)
        finally:
            os.close(out)
    finally:
        os.close(fd)


def _carry_over(plan: RestorePlan, old: Tree, staged: Tree) -> tuple[list[Entry], frozenset[str]]:
    """Bring what the plan does not decide about into the new tree.

    Returns the folders made, for their modes, and what could not come along because a file is where its folder was.
    """
    folders: list[Entry] = []
    blocked = set()
    excluded = Scope((), tuple(plan.agent.exclude))
    for path, info in disk.walk(old):
        if (plan.decides(path) and not is_special(info)) or path.split("/")[0] == WORKSHOP:
            continue
        here = staged.find(path)
        if _is_blocked(staged, path) or (
            here is not None and stat.S_ISDIR(here.st_mode) != stat.S_ISDIR(info.st_mode)
        ):
            blocked.add(path)
        elif stat.S_ISDIR(info.st_mode):
            staged.make_folders(path)
            folders.append(_as_folder(path, info))
        elif here is None:
            _make_ways(old, staged, path, folders)
            share = is_special(info) or excluded.excludes(path)
            if not (share and _link_file(old, staged, path)):
                copy_any(old, staged, path, info)
    return folders, frozenset(blocked)


def _is_blocked(staged: Tree, path: str) -> bool:
    """Tell whether the new tree has a file where `path` needs a folder; the path is then only in the evidence."""
    above = path.rpartition("/")[0]
    while above:
        here = staged.find(above)
        if here is not None:
            return not stat.S_ISDIR(here.st_mode)
        above = above.rpartition("/")[0]
    return False


def _make_ways(old: Tree, staged: Tree, path: str, folders: list[Entry]) -> None:
    above = path.rpartition("/")[0]
    missing = []
    while above and staged.find(above) is None:
        missing.append(above)
        above = above.rpartition("/")[0]
    for folder in reversed(missing):
        staged.make_folders(folder)
        folders.append(_as_folder(folder, old.lstat(folder)))


def _as_folder(path: str, info: os.stat_result) -> Entry:
    mode = stat.S_IMODE(info.st_mode)
    return Entry(path, "dir", 0, mode, info.st_mtime_ns, uid=info.st_uid, gid=info.st_gid)


def _link_file(old: Tree, staged: Tree, path: str) -> bool:
    """Share an excluded file with the new tree: the old one loses it when it is removed."""
    try:
        from_folder, name = old.at(path)
        to_folder, _ = staged.at(path)
        os.link(name, name, src_dir_fd=from_folder, dst_dir_fd=to_folder, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
            return False
        raise
    return True


def copy_any(source: Tree, target: Tree, path: str, info: os.stat_result) -> None:
    """Copy a file or link with its mode, owner and times; sockets, pipes and devices are left out."""
    mode = stat.S_IMODE(info.st_mode)
    entry = Entry(path, "file", info.st_size, mode, info.st_mtime_ns, uid=info.st_uid, gid=info.st_gid)
    if stat.S_ISLNK(info.st_mode):
        from_folder, name = source.at(path)
        text = os.readlink(name, dir_fd=from_folder)
        to_folder, _ = target.at(path)
        os.symlink(text, name, dir_fd=to_folder)
        _dress(target, [replace(entry, kind="link", target=text)])
    elif stat.S_ISREG(info.st_mode):
        _copy_file(source, target, entry, dress=True)


def _dress(tree: Tree, entries: Iterable[Entry]) -> None:
    """Give each path its owner (where we may), mode and times; folders last and from the inside out."""
    by_path = {entry.path: entry for entry in entries}
    privileged = os.geteuid() == 0
    for path in sorted(by_path, key=disk.order, reverse=True):
        entry = by_path[path]
        folder, name = (tree.fd, ".") if path == "." else tree.at(path)
        if entry.kind == "link":
            if privileged:
                os.chown(name, entry.uid, entry.gid, dir_fd=folder, follow_symlinks=False)
            os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=folder, follow_symlinks=False)
            continue
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
        try:
            _dress_file(fd, entry)
        finally:
            os.close(fd)


def _dress_file(fd: int, entry: Entry) -> None:
    for name, value in entry.xattrs:
        # A file system without attributes keeps the content all the same.
        try:
            os.setxattr(fd, name, base64.b64decode(value))
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS):
                raise
    if os.geteuid() == 0:
        os.fchown(fd, entry.uid, entry.gid)
    os.fchmod(fd, entry.mode)
    os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))


# -- evidence -------------------------------------------------------------------------------------------------------


def keep_evidence(agent: AgentFiles, root: Path, destination: Path, *, also: Container[str] = ()) -> Path:
    """Copy what stands in `root` to `destination` (`-2` and so on if it is taken) and return where it is.

    Excluded paths stay out, because a restore carries them over, save those in `also`, and a database's log. Appears
    by one rename, synced. Raises SnapshotError where anything cannot be read or kept.
    """
    root = Path(os.path.realpath(root))
    building = destination.parent / f".{destination.name}.{uuid.uuid4().hex}"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.mkdir(building, 0o700)
        try:
            _copy_evidence(agent, root, building, also)
            place, number = destination, 1
            while os.path.lexists(place):
                number += 1
                place = destination.with_name(f"{destination.name}-{number}")
            os.rename(building, place)
            disk.sync_folder(place.parent)
        except BaseException:
            with contextlib.suppress(OSError), Tree(building.parent) as parent:
                parent.remove(building.name)
            raise
    except OSError as error:
        failure = from_os_error(f"keeping what stands in “{root}” as evidence", error)
        kind = NoSpace if isinstance(failure, NoSpace) else SnapshotError
        raise kind(f"{failure.message}; nothing was changed", hint=failure.hint) from error
    return place


def _copy_evidence(agent: AgentFiles, root: Path, building: Path, also: Container[str]) -> None:
    scope = Scope(("**",), tuple(agent.exclude))
    folders = []
    with Tree(root) as old, Tree(building) as new:
        for path, info in disk.walk(old):
            if scope.excludes(path) and not (path in also or path.endswith(COMPANIONS)):
                continue
            new.make_folders(path.rpartition("/")[0])
            if stat.S_ISDIR(info.st_mode):
                new.make_folders(path)
                folders.append(_as_folder(path, info))
            else:
                copy_any(old, new, path, info)
        _dress(new, folders)
        disk.sync_all(new.fd)
