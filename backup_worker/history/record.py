"""The record's files: append, rotate, read, follow and verify.

A line whose `append` returned is on disk. Lines of any number of processes come one after the other, never into one
another (a kernel lock on the file, so no stale lock can exist). A line cut short by a crash is completed or taken out
by the next writer, who says so in the record. A file that has reached its limit of size is given a number and never
written again (`system-history.000001.jsonl`); the chain goes on in a new one. A line cannot be changed, removed from
the middle or moved without `verify` naming the first place where the chain breaks; one that is cut off the end is
missed if it is as old as the head that the repository keeps (see `head`).

If the disk is full or the file cannot be written, `append` raises `HistoryUnwritable` and leaves the file as it was;
the caller decides whether its work goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from backup_worker.history import head
from backup_worker.history.chain import Broken, Report, follow, unproven
from backup_worker.history.line import (
    HEALED,
    Line,
    Link,
    checked,
    fault,
    link_behind,
    link_of,
    next_line,
    parse,
    plain,
    render,
)
from backup_worker.snapshots import disk
from em_bridge import clock
from em_bridge.errors import AgentBackupError

log = logging.getLogger(__name__)

_LOCK_TRIES_S = 0.005
_BLOCK = 64 * 1024


class HistoryUnwritable(AgentBackupError):
    """The line is not in the record; the file is as it was before."""

    retryable = True


class History:
    """The record at `path`, which is made with its folder, for its owner alone, by the first line.

    A file of `max_bytes` is put aside, None: never. `head_file` is where the head is noted at each backup.
    """

    def __init__(
        self,
        path: Path,
        *,
        lock_timeout_s: float = 30.0,
        max_bytes: int | None = None,
        head_file: Path | None = None,
    ) -> None:
        self.path = path
        self._lock_timeout_s = lock_timeout_s
        self._max_bytes = max_bytes
        self._head_file = head_file

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────

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
        contents = [(kind, float(now), checked(kind, fields)) for kind, now, fields in lines]
        if not contents:
            return []
        try:
            with self._locked() as file:
                written = self._append(file, contents)
                self._note_head(written)
                return written
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise HistoryUnwritable(
                f"cannot write the history “{self.path}”: {reason}",
                hint="free some space, or check owner and mode of the file and its folder",
            ) from error

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
                if _is_at(file, self.path) and not self._rotated(file):
                    yield file
                    return
            finally:
                # Closing is not enough: a child forked meanwhile by another thread shares the lock.
                fcntl.flock(file, fcntl.LOCK_UN)
                os.close(file)

    def _rotated(self, file: int) -> bool:
        """Put the file aside if it is full; killed behind the rename, the next writer begins the new one."""
        size = os.fstat(file).st_size
        if self._max_bytes is None or size < self._max_bytes or os.pread(file, 1, size - 1) != b"\n":
            return False
        numbers = [int(path.name.split(".")[-2]) for path in self._put_aside()]
        number = max(numbers, default=0) + 1
        os.rename(self.path, self.path.with_name(f"{self.path.stem}.{number:06d}{self.path.suffix}"))
        disk.sync_folder(self.path.parent)
        return True

    def _append(self, file: int, contents: Sequence[tuple[str, float, Mapping[str, Any]]]) -> list[Line]:
        size = os.fstat(file).st_size
        if size == 0:
            disk.sync_folder(self.path.parent)
        last, torn = _tail(file, size)
        sound = size - len(torn)
        behind, damage = link_behind(last or self._last_put_aside())
        missing_newline = b""
        found: dict[str, Any] = {}
        if damage:
            found["damaged"] = damage
        if torn and not fault(torn + b"\n", behind):
            # The crash took nothing but the line's end: the line is whole and stays.
            missing_newline, sound = b"\n", size
            behind = link_of(torn)
            found["kept"] = "the last line, which lacked only its end"
        elif torn:
            found["removed"] = plain(torn[:1000].decode("utf-8", "backslashreplace"))
            found["removed_bytes"] = len(torn)
        if found:
            contents = [(HEALED, contents[0][1], found), *contents]
        written: list[Line] = []
        for kind, now, content in contents:
            written.append(next_line(behind, now, kind, content))
            behind = Link(written[-1]["seq"], written[-1]["hash"])
        data = missing_newline + b"".join(render(line) for line in written)
        try:
            if sound != size:
                os.ftruncate(file, sound)
            _write_all(file, data)
            os.fsync(file)
        except OSError:
            # A line that may or may not be on disk would be repeated by a caller who tries again: take it back.
            # What was torn goes back: it may not go before the line that says so is there.
            with contextlib.suppress(OSError):
                os.ftruncate(file, sound)
                _write_all(file, torn if sound != size else b"")
            raise
        return written[1:] if found else written

    def _note_head(self, written: Sequence[Line]) -> None:
        """Note the newest line in the repository, if a backup is among them. The lines are written all the same."""
        if self._head_file is None or not any(line["kind"] in head.HEADED for line in written):
            return
        last = written[-1]
        try:
            head.note(self._head_file, head.Head(last["seq"], last["hash"], last["at"]))
        except OSError as error:
            log.error("the head of the record cannot be noted in “%s”: %s", self._head_file, error)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def read(
        self, kind: str | None = None, agent: str | None = None, since: float | None = None
    ) -> Iterator[Line]:
        """Yield the lines in their order, those that match all that is given; what is not a line is left out."""
        with self._opened() as files:
            for file in files:
                yield from _matching(_whole_lines(file), kind, agent, since)

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
        positions: dict[int, int] = {}
        while True:
            with self._opened() as files:
                for file in files:
                    info = os.fstat(file.fileno())
                    file.seek(positions.get(info.st_ino, 0))
                    for raw in _whole_lines(file):
                        positions[info.st_ino] = positions.get(info.st_ino, 0) + len(raw)
                        yield from _matching([raw], kind, agent, since)
            if stop():
                return
            clock.sleep(poll_s)

    def verify(self) -> Report:
        """Follow the chain from the first line to the last, through all files, and look for the noted head.

        Raises `OSError` if a file cannot be read, `FileNotFoundError` if there is none and no head is noted either.
        """
        noted = head.noted(self._head_file) if self._head_file is not None else None
        last, agrees = Link(), noted is None
        with self._opened() as files:
            if not files and noted is None:
                raise FileNotFoundError(f"there is no history at {self.path}")
            for file in files:
                current = file is files[-1]
                for found in follow(_sound_end(file) if current else file, last):
                    if isinstance(found, Broken):
                        name = Path(file.name).name
                        return Report(
                            False, last.seq, found.line, found.problem, last.hash, unproven(noted, last), name, noted
                        )  # fmt: skip
                    last = found
                    agrees = agrees or (noted is not None and last == noted.link)
        if noted is not None and not agrees:
            cut = last.seq < noted.seq
            problem = (
                f"lines were cut off the end: the repository vouches for line {noted.seq}"
                if cut
                else f"line {noted.seq} is not the one that the repository vouches for: the record was written anew"
            )
            where = last.seq + 1 if cut else noted.seq
            return Report(False, last.seq, where, problem, last.hash, unproven(noted, last), None, noted)
        return Report(True, last.seq, None, None, last.hash, unproven(noted, last), None, noted)

    def files(self) -> list[Path]:
        """Return the record's files that may be there, the oldest first."""
        return [*self._put_aside(), self.path]

    def _put_aside(self) -> list[Path]:
        """Return the files that were put aside, oldest first."""
        pattern = re.compile(rf"{re.escape(self.path.stem)}\.(\d+){re.escape(self.path.suffix)}")
        try:
            names = os.listdir(self.path.parent)
        except (FileNotFoundError, NotADirectoryError):
            return []
        found = [(int(match[1]), name) for name in names if (match := pattern.fullmatch(name))]
        return [self.path.with_name(name) for _, name in sorted(found)]

    def _last_put_aside(self) -> bytes:
        """Return the last line of the newest file that was put aside, empty if there is none."""
        earlier = self._put_aside()
        if not earlier:
            return b""
        with earlier[-1].open("rb") as file:
            return _tail(file.fileno(), os.fstat(file.fileno()).st_size)[0]

    @contextmanager
    def _opened(self) -> Iterator[list[IO[bytes]]]:
        """Open every file of the record, oldest first; one that is put aside meanwhile is opened once."""
        with ExitStack() as stack:
            files: list[IO[bytes]] = []
            current: IO[bytes] | None = None
            with contextlib.suppress(FileNotFoundError):
                current = stack.enter_context(self.path.open("rb"))
            files = [stack.enter_context(path.open("rb")) for path in self._put_aside()]
            known = {os.fstat(file.fileno()).st_ino for file in files}
            if current is not None and os.fstat(current.fileno()).st_ino not in known:
                files.append(current)
            yield files


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


def _sound_end(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of the file that is being written; a last one that is caught half written is read again."""
    for raw in file:
        if not raw.endswith(b"\n"):
            raw = _reread_last(file, len(raw))
            if not raw:
                return
        yield raw


def _reread_last(file: IO[bytes], length: int) -> bytes:
    """Read an unfinished last line again while no writer is at work."""
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
        line = parse(raw)
        if line is None or (kind is not None and line.get("kind") != kind):
            continue
        if agent is not None and line.get("agent") != agent:
            continue
        at = line.get("at")
        if since is not None and not (isinstance(at, int | float) and at >= since):
            continue
        yield line


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
