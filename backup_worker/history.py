"""The record: one JSON line for everything that was done, each line holding the hash of the one before it.

A line whose `append` returned is on disk. Lines of any number of processes come one after the other, never into one
another (a kernel lock on the file, so no stale lock can exist). A line cut short by a crash is completed or taken out
by the next writer, who says so in the record. A line cannot be changed, removed from the middle or moved without
`verify` naming the first place where the chain breaks. What the chain alone cannot prove: that nothing was cut off
the end, and that nobody wrote the whole file anew.

If the disk is full or the file cannot be written, `append` raises `HistoryUnwritable` and leaves the file as it was;
the caller decides whether its work goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from backup_worker.canonical import canonical
from em_bridge import clock
from em_bridge.errors import AgentBackupError, UsageError

ORIGIN = "0" * 64
"""What stands for the hash of the line before the first one."""

HEALED = "history-healed"
"""Kind of the line that says what the next writer found after a crash, and what became of it."""

_FIRST, _LAST = ("seq", "at", "kind"), ("prev", "hash")
_RESERVED = frozenset((*_FIRST, *_LAST))
_KIND = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_LOCK_TRIES_S = 0.005
_BLOCK = 64 * 1024

Line = dict[str, Any]


class HistoryUnwritable(AgentBackupError):
    """The line is not in the record; the file is as it was before."""

    retryable = True


@dataclass(frozen=True, slots=True)
class Report:
    """What `verify` found: `ok` only if every line proves the one before it and the last one is whole."""

    ok: bool
    lines: int
    first_broken: int | None
    problem: str | None
    head: str
    unproven: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the report as a map for `--json`."""
        return {**asdict(self), "unproven": list(self.unproven)}


class History:
    """The record at `path`, which is made with its folder, for its owner alone, by the first line."""

    def __init__(self, path: Path, *, lock_timeout_s: float = 30.0) -> None:
        self.path = path
        self._lock_timeout_s = lock_timeout_s
        self._threads = threading.Lock()

    def append(self, kind: str, *, now: float, **fields: Any) -> Line:
        """Add a line and return it as it was written, once it is on disk.

        Fields may be anything that JSON holds, and also paths, tuples, sets, bytes (as hexadecimal) and text that is
        not valid Unicode (file names), which are written in a readable form.

        Raises `HistoryUnwritable` (full disk, no permission, locked for too long) and `UsageError` (a bad kind or a
        field with a reserved name).
        """
        return self.extend([(kind, now, fields)])[0]

    def extend(self, lines: Iterable[tuple[str, float, Mapping[str, Any]]]) -> list[Line]:
        """Add lines of (kind, now, fields) as `append` does: all of them or none, and with one wait for the disk."""
        contents = [(kind, float(now), _checked(kind, fields)) for kind, now, fields in lines]
        if not contents:
            return []
        try:
            # The kernel's lock is asked for again and again; threads of this process need not wait like that.
            with self._threads, self._locked() as file:
                return self._append(file, contents)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise HistoryUnwritable(
                f"cannot write the history “{self.path}”: {reason}",
                hint="free some space, or check owner and mode of the file and its folder",
            ) from error

    def read(
        self, kind: str | None = None, agent: str | None = None, since: float | None = None
    ) -> Iterator[Line]:
        """Yield the lines in their order, those that match all that is given; what is not a line is left out."""
        try:
            with self.path.open("rb") as file:
                yield from _matching(_whole_lines(file), kind, agent, since)
        except FileNotFoundError:
            return

    def follow(
        self,
        kind: str | None = None,
        agent: str | None = None,
        since: float | None = None,
        *,
        poll_s: float = 0.5,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Line]:
        """Yield as `read` does, then wait for more, until `stop` says so; survives the file being replaced."""
        position, seen = 0, None
        while True:
            with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != seen:
                    position, seen = 0, inode
                file.seek(position)
                for raw in _whole_lines(file):
                    position += len(raw)
                    yield from _matching([raw], kind, agent, since)
            if stop():
                return
            clock.sleep(poll_s)

    def verify(self) -> Report:
        """Follow the chain from the first line to the last; raises `OSError` if the file cannot be read."""
        previous, count = ORIGIN, 0
        unproven = (
            "that no lines were cut off the end: compare the head with one that was noted elsewhere",
            "that the whole file was not written anew by somebody who can write it",
        )
        with self.path.open("rb") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    raw = _reread_last(file, len(raw))
                    if not raw:
                        break
                count += 1
                problem = _fault(raw, count, previous)
                if problem:
                    return Report(False, count - 1, count, problem, previous, unproven)
                previous = str(json.loads(raw)["hash"])
        return Report(True, count, None, None, previous, unproven)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Open the file and hold its lock; it is the file at `path` also once the lock is held."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        deadline = clock.monotonic() + self._lock_timeout_s
        while True:
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            file = os.open(self.path, flags, 0o600)
            try:
                _lock(file, deadline)
                if _is_at(file, self.path):
                    yield file
                    return
            finally:
                # Closing is not enough: a child forked meanwhile by another thread shares the lock.
                fcntl.flock(file, fcntl.LOCK_UN)
                os.close(file)

    def _append(self, file: int, contents: Sequence[tuple[str, float, Mapping[str, Any]]]) -> list[Line]:
        size = os.fstat(file).st_size
        if size == 0:
            _sync_folder(self.path.parent)
        last, torn = _tail(file, size)
        sound = size - len(torn)
        seq, previous, damage = _link(last)
        missing_newline = b""
        found: dict[str, Any] = {}
        if damage:
            found["damaged"] = damage
        if torn and not _fault(torn + b"\n", seq + 1, previous):
            # The crash took nothing but the line's end: the line is whole and stays.
            missing_newline, sound = b"\n", size
            seq, previous = seq + 1, str(json.loads(torn)["hash"])
            found["kept"] = "the last line, which lacked only its end"
        elif torn:
            found["removed"] = _plain(torn[:1000].decode("utf-8", "backslashreplace"))
            found["removed_bytes"] = len(torn)
        if found:
            contents = [(HEALED, contents[0][1], found), *contents]
        written: list[Line] = []
        for kind, now, content in contents:
            written.append(_next(seq, previous, now, kind, content))
            seq, previous = written[-1]["seq"], written[-1]["hash"]
        data = missing_newline + b"".join(_render(line) for line in written)
        try:
            if sound != size:
                os.ftruncate(file, sound)
            _write_all(file, data)
            os.fsync(file)
        except OSError:
            # A line that may or may not be on disk would be repeated by a caller who tries again: take it back.
            with contextlib.suppress(OSError):
                os.ftruncate(file, sound)
            raise
        return written[1:] if found else written


def _checked(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    if not _KIND.fullmatch(kind):
        raise UsageError(f"“{kind}” is not a kind of history line", hint="lower-case words joined by hyphens")
    if reserved := _RESERVED & fields.keys():
        raise UsageError(f"“{min(reserved)}” is written by the history itself")
    return {key: _plain(value) for key, value in fields.items()}


def digest(line: Mapping[str, Any]) -> str:
    """Return the hash that belongs into `line`: SHA-256 over the canonical form of everything else in it."""
    content = {key: value for key, value in line.items() if key != "hash"}
    return hashlib.sha256(canonical(content).encode()).hexdigest()


def _next(seq: int, previous: str, now: float, kind: str, content: Mapping[str, Any]) -> Line:
    line: Line = {"seq": seq + 1, "at": now, "kind": kind, **content, "prev": previous}
    return {**line, "hash": digest(line)}


def _render(line: Mapping[str, Any]) -> bytes:
    """Write a line: number, time and kind first for people who read it, the hashes last, the rest in order."""
    middle = sorted(key for key in line if key not in _RESERVED)
    keys = [key for key in (*_FIRST, *middle, *_LAST) if key in line]
    return ("{" + ",".join(f"{canonical(key)}:{canonical(line[key])}" for key in keys) + "}\n").encode()


def _parse(raw: bytes) -> Line | None:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _fault(raw: bytes, number: int, previous: str) -> str | None:
    """Say what is wrong with the line `raw`, which should be the `number`th and follow `previous`."""
    if not raw.endswith(b"\n"):
        return "the line is not finished: a writer crashed (the next one heals and records it), or it was cut"
    line = _parse(raw)
    if line is None:
        return "the line is not a JSON object"
    if line.get("seq") != number:
        found = json.dumps(line.get("seq"))[:40]
        return f"the line's number is {found}, not {number}: a line is missing, extra or moved"
    if line.get("prev") != previous:
        return "the line does not follow the one before it: one of the two was changed, removed or moved"
    try:
        if line.get("hash") != digest(line) or _render(line) != raw:
            return "the line was changed after it was written"
    except (ValueError, OverflowError, RecursionError):
        return "the line holds what the history never writes"
    return None


def _link(last: bytes) -> tuple[int, str, str | None]:
    """Return number and hash to go on from, and what is wrong with the last line.

    After damage the chain goes on, and `verify` still names the damage.
    """
    if not last:
        return 0, ORIGIN, None
    line = _parse(last) or {}
    seq, previous, hash_ = line.get("seq"), line.get("prev"), line.get("hash")
    if isinstance(seq, int) and isinstance(previous, str) and isinstance(hash_, str):
        return seq, hash_, _fault(last, seq, previous)
    return 0, hashlib.sha256(last).hexdigest(), "the line is not one of the history's"


def _tail(file: int, size: int) -> tuple[bytes, bytes]:
    """Return the last whole line (with its end) and what stands behind it without an end."""
    data, start = b"", size
    while start > 0:
        step = min(_BLOCK, start)
        start -= step
        data = os.pread(file, step, start) + data
        end = data.rfind(b"\n")
        if end >= 0 and (before := data.rfind(b"\n", 0, end)) >= 0:
            return data[before + 1 : end + 1], data[end + 1 :]
    end = data.rfind(b"\n")
    return data[: end + 1], data[end + 1 :]


def _reread_last(file: Any, length: int) -> bytes:
    """Read an unfinished last line again while no writer is at work: it may have been caught half written."""
    start = file.tell() - length
    fcntl.flock(file.fileno(), fcntl.LOCK_SH)
    try:
        file.seek(start)
        return bytes(file.readline())
    finally:
        fcntl.flock(file.fileno(), fcntl.LOCK_UN)


def _whole_lines(file: Iterable[bytes]) -> Iterator[bytes]:
    for raw in file:
        if not raw.endswith(b"\n"):
            return
        yield raw


def _matching(
    lines: Iterable[bytes], kind: str | None, agent: str | None, since: float | None
) -> Iterator[Line]:
    for raw in lines:
        line = _parse(raw)
        if line is None or (kind is not None and line.get("kind") != kind):
            continue
        if agent is not None and line.get("agent") != agent:
            continue
        at = line.get("at")
        if since is not None and not (isinstance(at, int | float) and at >= since):
            continue
        yield line


def _plain(value: Any) -> Any:
    """Return `value` in JSON's own types: a line must never fail because of what somebody put into it."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, bool | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=str)
    return _plain(str(value))


def _lock(file: int, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if clock.monotonic() > deadline:
                raise OSError(None, "another process holds its lock and does not let go") from None
            clock.sleep(_LOCK_TRIES_S)


def _is_at(file: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(file)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
