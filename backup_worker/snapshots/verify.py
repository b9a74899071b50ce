"""Prove a snapshot: re-read every byte from the disk and compare it with what was written down.

Nothing is assumed: a missing, added, changed, retyped or too widely readable file is a problem, and so is any byte of
the manifest or of `SHA256SUMS`. The result is noted in the repository; a damaged snapshot is no longer restored from
and no longer counts as good.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from backup_worker.snapshots import disk, parts
from backup_worker.snapshots.content import opened_ahead
from backup_worker.snapshots.disk import Tree
from backup_worker.snapshots.errors import SnapshotError, translated
from backup_worker.snapshots.large import hash_from_disk
from backup_worker.snapshots.manifest import CHECKSUMS, FILES, MANIFEST, Entry, Manifest, Problem, checksums
from backup_worker.snapshots.parts import in_parts
from backup_worker.snapshots.repository import Repository
from backup_worker.snapshots.sanity import Look

SMALL_BYTES = 1 << 20
"""A file below this is read with one call."""


@translated("verifying")
def verify_snapshot(repo: Repository, identifier: str, now: float) -> list[Problem]:
    """Re-read the snapshot `identifier` and return what is wrong with it; empty means proven.

    Writes down the date, or the damage. Raises NotFound. May run beside backups, restores and prunes.
    """
    with repo.hold([identifier]):
        return prove(repo, identifier, now=now)


def prove(repo: Repository, identifier: str, *, now: float) -> list[Problem]:
    """As `verify_snapshot`, for a caller that holds the snapshot already, or takes NotFound for an answer."""
    problems = _examine(repo, identifier)
    # A repository that is mounted read-only, or full, can be verified all the same.
    with contextlib.suppress(OSError):
        repo.record_verified(identifier, now=now, ok=not problems)
    return problems


def _examine(repo: Repository, identifier: str) -> list[Problem]:
    try:
        manifest = repo.get(identifier)
    except SnapshotError as error:
        return [Problem(MANIFEST, error.message)]
    try:
        with Tree(repo.path(identifier)) as top:
            problems = list(_paper_problems(top, manifest))
            with Tree(FILES, dir_fd=top.fd) as files:
                problems += _tree_problems(files, manifest)
                problems += [
                    Problem(entry.path, why) for entry, why in read_all_back(files, manifest.entries)
                ]
    except OSError as error:
        return [Problem(FILES, f"cannot be read: {(error.strerror or str(error)).lower()}")]
    return problems


def read_all_back(files: Tree, entries: Iterable[Entry], look: Look | None = None) -> list[tuple[Entry, str]]:
    """Do what `read_back` does; many files in several processes at once."""
    wanted = [entry for entry in entries if entry.kind == "file"]
    sizes = [entry.size for entry in wanted]
    if not parts.are_worth_it(sizes):
        return list(read_back(files, wanted, look))

    def read(part: Sequence[Entry]) -> Any:
        bad = {entry.path: why for entry, why in read_back(files, part, look)}
        problems = look.problems if look else {}
        return bad, {entry.path: problems[entry.path] for entry in part if entry.path in problems}

    found: list[tuple[Entry, str]] = []
    for part, (bad, problems) in in_parts(wanted, sizes, read):
        found += [(entry, bad[entry.path]) for entry in part if entry.path in bad]
        if look:
            look.problems.update(problems)
    return found


def unproven(files: Tree, entries: Iterable[Entry]) -> list[Entry]:
    """Re-read the regular files among `entries` from the disk; return those that are not what they should be."""
    return [entry for entry, _ in read_all_back(files, entries)]


def read_back(
    files: Tree, entries: Iterable[Entry], look: Callable[[Entry, int, bytes | None], None] | None = None
) -> Iterator[tuple[Entry, str]]:
    """Re-read the regular files among `entries` from the disk; yield those that are not what they should be, and why.

    `look` is shown each file that is: its entry, a descriptor, and its content if it is a small one.
    """
    wanted = (entry for entry in entries if entry.kind == "file")
    for entry, found in opened_ahead(files, wanted, lambda entry: entry.path):
        if isinstance(found, OSError):
            yield entry, f"cannot be opened: {(found.strerror or '').lower()}"
            continue
        content: bytes | None = None
        size = expected = entry.size
        try:
            if expected < SMALL_BYTES:
                content = os.read(found, expected + 1)
            if content is not None and len(content) == expected:
                digest = hashlib.sha256(content).hexdigest()
            else:
                content = None
                os.lseek(found, 0, os.SEEK_SET)
                size, digest = hash_from_disk(found, expected)
        except OSError as error:
            yield entry, f"cannot be read: {(error.strerror or '').lower()}"
            continue
        if size != expected:
            yield entry, f"has {size} bytes, not {expected}"
        elif digest != entry.sha256:
            yield entry, "its content changed"
        elif look is not None:
            look(entry, found, content)


def _paper_problems(top: Tree, manifest: Manifest) -> Iterator[Problem]:
    content = top.read_bytes(MANIFEST)
    try:
        written = top.read_bytes(CHECKSUMS)
    except FileNotFoundError:
        yield Problem(CHECKSUMS, "missing")
    else:
        if written != checksums(content, manifest.entries):
            yield Problem(CHECKSUMS, "does not agree with the manifest: one of the two was changed")
    if stat.S_IMODE(os.fstat(top.fd).st_mode) & 0o077:
        yield Problem(".", "readable by others than its owner")
    for name in sorted(os.listdir(top.fd)):
        if name not in (MANIFEST, CHECKSUMS, FILES):
            yield Problem(name, "was added")


def _tree_problems(files: Tree, manifest: Manifest) -> Iterator[Problem]:
    expected = manifest.by_path()
    expected.pop(".", None)
    for path, info in disk.walk(files):
        entry = expected.pop(path, None)
        if entry is None:
            yield Problem(path, "was added")
            continue
        kind = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "link"}.get(
            stat.S_IFMT(info.st_mode)
        )
        if kind != entry.kind:
            yield Problem(path, f"is no longer a {entry.kind}")
        elif kind != "link" and info.st_mode & 0o077:
            yield Problem(path, "readable by others than its owner")
        elif kind == "link":
            folder, name = files.at(path)
            if os.readlink(name, dir_fd=folder) != entry.target:
                yield Problem(path, "points elsewhere")
    for path in expected:
        yield Problem(path, "missing")
