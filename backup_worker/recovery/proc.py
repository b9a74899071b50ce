"""What the kernel tells of a process, read straight from `/proc`: a whole table of processes in a few milliseconds.

A process that ends while it is looked at raises `OSError` (FileNotFoundError or ProcessLookupError); what we may not
read of one that belongs to somebody else raises PermissionError.
"""

from __future__ import annotations

import os

ZOMBIE, DEAD = "Z", "X"
CHUNK_BYTES = 1 << 16


def pids() -> list[int]:
    """Return the processes that there are."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def environment(pid: int, *names: str) -> dict[str, str]:
    """Return those of the variables `names` that the process was started with."""
    # Searched as one text: every process of the host is asked, and most of them have none of these.
    text = b"\0" + _read(pid, "environ")
    found = {}
    for name in names:
        _, is_there, rest = text.partition(b"\0" + os.fsencode(name) + b"=")
        if is_there:
            found[name] = os.fsdecode(rest.partition(b"\0")[0])
    return found


def command_line(pid: int) -> list[str]:
    """Return the argument list; a process that has renamed itself may have joined it with blanks."""
    raw = _read(pid, "cmdline")
    words = raw.rstrip(b"\0").split(b"\0") if raw else []
    if len(words) == 1 and not raw.endswith(b"\0"):
        words = raw.split(b" ")
    return [os.fsdecode(word) for word in words]


def folder(pid: int) -> str:
    """Return the working folder."""
    return os.readlink(f"/proc/{pid}/cwd")


def name(pid: int) -> str:
    """Return the name of the program."""
    return os.fsdecode(_read(pid, "comm").rstrip(b"\n"))


def is_zombie(pid: int) -> bool:
    """Tell whether it has ended, and only waits to be noticed by its parent."""
    return _stat(pid)[0] in (ZOMBIE, DEAD)


def started(pid: int) -> int | None:
    """Return when it started, in clock ticks since the boot, or None if there is none."""
    try:
        return int(_stat(pid)[19])
    except (FileNotFoundError, ProcessLookupError):
        return None


def family(pid: int) -> set[int]:
    """Return the process and its ancestors, as far as they can be seen."""
    found: set[int] = set()
    while pid > 0 and pid not in found:
        found.add(pid)
        try:
            pid = int(_stat(pid)[1])
        except OSError:
            break
    return found


def _stat(pid: int) -> list[str]:
    """Return the fields behind the name, which stands in parentheses and may hold anything: state, parent, …"""
    return _read(pid, "stat").decode(errors="replace").rpartition(")")[2].split()


def _read(pid: int, what: str) -> bytes:
    descriptor = os.open(f"/proc/{pid}/{what}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        chunks = []
        while chunk := os.read(descriptor, CHUNK_BYTES):
            chunks.append(chunk)
        return b"".join(chunks)
    finally:
        os.close(descriptor)
