"""The floor for plain files in Python: the system calls of a backup that is read back, in a straight line.

`python -m tests.benchmarks.bare_files FROM TO [FIRST]` copies every file below FROM, syncs, and reads each back from
the disk; with FIRST, files are linked to those there instead. As many processes as we use share the folders out. It
knows no links, changes, locks, errors or manifests, judges nothing, and a crash leaves a half copy.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys

AHEAD = 64


def copy(source: str, target: str) -> str:
    """Copy a file and return its hash."""
    fd = os.open(source, os.O_RDONLY)
    content = os.read(fd, os.fstat(fd).st_size)
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(out, content)
    os.close(out)
    os.fstat(fd)
    os.close(fd)
    return hashlib.sha256(content).hexdigest()


def read_back(files: list[tuple[str, str]]) -> None:
    """Compare files with their hashes, as the disk has them; in groups that the disk answers together."""
    for start in range(0, len(files), AHEAD):
        group = files[start : start + AHEAD]
        fds = [os.open(path, os.O_RDONLY) for path, _ in group]
        for fd in fds:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        for fd in fds:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
        for fd, (path, digest) in zip(fds, group, strict=True):
            size = os.fstat(fd).st_size
            if hashlib.sha256(os.read(fd, size)).hexdigest() != digest:
                raise SystemExit(f"{path} came back changed")
            os.close(fd)


def work(number: int, folders: list[str], source: str, target: str, first: str | None) -> None:
    """Copy or link all of `folders`, sync once, read back, and keep the hashes for the next time."""
    known: dict[str, str] = {}
    if first:
        with open(f"{first}.{number}.json", encoding="ascii") as file:
            known = json.load(file)
    made: dict[str, str] = {}
    for folder in folders:
        for here, _, names in os.walk(os.path.join(source, folder)):
            below = os.path.relpath(here, source)
            os.makedirs(os.path.join(target, below))
            for name in names:
                path = f"{below}/{name}"
                if first:
                    os.stat(os.path.join(here, name))
                    os.link(os.path.join(first, path), os.path.join(target, path))
                    made[path] = known[path]
                else:
                    made[path] = copy(os.path.join(here, name), os.path.join(target, path))
    fd = os.open(target, os.O_RDONLY)
    ctypes.CDLL(None).syncfs(fd)
    read_back([(os.path.join(target, path), digest) for path, digest in made.items()])
    with open(f"{target}.{number}.json", "w", encoding="ascii") as file:
        json.dump(made, file)


def main(source: str, target: str, first: str | None = None) -> int:
    """Share the folders out over the processors."""
    folders = sorted(os.listdir(source))
    count = 2 * len(os.sched_getaffinity(0))
    os.makedirs(target)
    children = []
    for number in range(count):
        pid = os.fork()
        if not pid:
            work(number, folders[number::count], source, target, first)
            os._exit(0)
        children.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
