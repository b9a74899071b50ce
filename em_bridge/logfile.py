"""The message log as files: what the EM exports, so that its own snapshots hold it.

Promise: what is committed is read back as it was written, or named as damaged; a batch that a crash or a copy cut off
in the middle counts as not there. Segments are only appended to and, when they are full, left alone, so that a copy of
the folder made at any moment is a whole export as of shortly before. The folder is bounded in bytes and in age.

A segment is a text file; each line is the CRC-32 of a JSON object (8 hexadecimal digits), a space, and that object:
first `{"format": "message-log", "version": 1}`, then entries `{"id", "type", "body"}` (the body in base64), and after
each batch `{"commit": last id, "routed": id, "senders": {…}, "agents": {…}}`: how far the router was, what the server
knew of the senders' numbers, and what each agent had dealt with. The first commit of a segment holds all of it, the
others what has changed since.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from em_bridge import streams
from em_bridge.errors import AgentBackupError, NotFound
from em_bridge.whole_file import replaced, sync_folder

SEGMENT_BYTES: Final = 8 * 1024 * 1024
LIMIT_BYTES: Final = 256 * 1024 * 1024
BATCH_BYTES: Final = 4 * 1024 * 1024
MAX_LINES: Final = 200
"""Lines (see `outbox`) remembered per sender, as on the server."""

_HEAD: Final = {"format": "message-log", "version": 1}
_LAST: Final = "last"


@dataclass(slots=True)
class Known:
    """What belongs to a log: per sender the fields of `em:sender:<name>`, per agent what it has dealt with."""

    senders: dict[str, dict[str, int]] = field(default_factory=dict)
    agents: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Agent -> `{"declared": whether the agent itself said so, "has": sender -> number}`."""
    routed: str = "0-0"
    """The last entry up to which the router is done with everything."""

    def learn(self, newer: Known) -> Known:
        """Take over what is new, and return it alone. A sender's numbers never shrink: a server may have lost them."""
        news = Known(routed=newer.routed)
        self.routed = newer.routed
        for name, fields in newer.senders.items():
            mine = self.senders.setdefault(name, {})
            grown = {key: number for key, number in fields.items() if number > mine.get(key, -1)}
            if grown:
                news.senders[name] = grown
                mine.update(grown)
                self.senders[name] = _newest(mine)
        for name, record in newer.agents.items():
            before = self.agents.get(name)
            if before is not None and before["declared"] and not record["declared"]:
                # An agent's own word does not end; it can only have been lost together with the server's data.
                continue
            if before != record:
                self.agents[name] = news.agents[name] = record
        return news

    def record(self, position: str) -> dict[str, Any]:
        """Return the commit of this up to the entry `position`."""
        return {"commit": position, "routed": self.routed, "senders": self.senders, "agents": self.agents}


def _newest(fields: dict[str, int]) -> dict[str, int]:
    if len(fields) <= MAX_LINES + 1:
        return fields
    lines = sorted((key for key in fields if key != _LAST), key=lambda key: fields[key])
    return {key: fields[key] for key in (_LAST, *lines[-MAX_LINES:]) if key in fields}


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the log; `id` is its place there."""

    id: str
    type: bytes
    body: bytes


class LogFiles:
    """The export in the folder `folder`, opened to be continued; one process at a time.

    `position` is the last entry that is committed, `known` what is committed with it. Raises `AgentBackupError` if
    another process has it open.
    """

    def __init__(
        self, folder: Path, *, limit_bytes: int = LIMIT_BYTES, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        self.folder = folder
        self.position = "0-0"
        self.known = Known()
        self._limit_bytes = limit_bytes
        self._segment_bytes = segment_bytes
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _lock(folder)
        self._file: int | None = None
        self._path: Path | None = None
        try:
            self._continue()
        except BaseException:
            self.close()
            raise

    def _continue(self) -> None:
        """Find the last commit; cut off what was begun after it, and set a damaged segment aside."""
        for path in reversed(segments(self.folder)):
            try:
                end = _scan(path, self)
            except AgentBackupError:
                # The entries are on the server as well: they are exported again.
                path.rename(path.with_suffix(".damaged"))
                continue
            if end is None:
                path.unlink()
                continue
            self._path = path
            self._file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            os.ftruncate(self._file, end)
            os.lseek(self._file, 0, os.SEEK_END)
            return

    def append(self, entries: Iterable[Entry]) -> None:
        """Write entries; they count from the next `commit` on."""
        self._write(b"".join(map(_entry_line, entries)))

    def commit(self, position: str, known: Known, *, older_than: str = "0-0") -> None:
        """Make what was appended count, up to the entry `position`; drop segments that end before `older_than`."""
        routed = self.known.routed
        news = self.known.learn(known)
        if position != self.position or news.senders or news.agents or news.routed != routed:
            self._write(_line(news.record(position)))
            assert self._file is not None
            os.fdatasync(self._file)
            self.position = position
        if self._file is not None and os.lseek(self._file, 0, os.SEEK_CUR) >= self._segment_bytes:
            self._finish()
        self._keep_within(older_than)

    def _write(self, data: bytes) -> None:
        if not data:
            return
        if self._file is None:
            self._begin()
        assert self._file is not None
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]

    def _begin(self) -> None:
        """Start a segment; it begins with everything that is known, so that it does not need those before it."""
        existing = segments(self.folder)
        number = int(existing[-1].stem) + 1 if existing else 1
        self._path = self.folder / f"{number:08d}.log"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._file = os.open(self._path, flags, 0o600)
        self._write(_line(_HEAD) + _line(self.known.record(self.position)))
        os.fdatasync(self._file)
        sync_folder(self.folder)

    def _finish(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = self._path = None

    def _keep_within(self, older_than: str) -> None:
        """Delete the oldest finished segments beyond the limit of bytes, or all of whose entries are too old."""
        found = segments(self.folder)
        sizes = {path: path.stat().st_size for path in found}
        total = sum(sizes.values())
        for path, following in itertools.pairwise(found):
            # A segment's entries end where the next one begins.
            if total <= self._limit_bytes and streams.id_order(_first_commit(following)) >= streams.id_order(
                older_than
            ):
                return
            path.unlink()
            total -= sizes[path]

    def close(self) -> None:
        """Let others open it."""
        self._finish()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def segments(folder: Path) -> list[Path]:
    """Return the segments of an export, oldest first."""
    return sorted(path for path in folder.glob("*.log") if path.stem.isdigit())


def write_file(path: Path, batches: Iterable[list[Entry]], finish: Callable[[], tuple[str, Known]]) -> None:
    """Write one whole export into the file `path`, which appears at once or not at all.

    `finish()` is called after the last batch, and returns what is committed: up to where, and what is known.
    """
    with replaced(path) as file:
        file.write(_line(_HEAD))
        for batch in batches:
            file.writelines(map(_entry_line, batch))
        position, known = finish()
        file.write(_line(known.record(position)))


def read(path: Path) -> tuple[Known, Iterator[Entry]]:
    """Return what an export (its folder, or one file of it) knows, and its committed entries in order.

    Everything is checked before this returns. Raises `NotFound` if there is none, `AgentBackupError` with the file and
    the line if something is damaged.
    """
    files = segments(path) if path.is_dir() else [path]
    if not files or not path.exists():
        raise NotFound(f"there is no exported message log in “{path}”", hint="see `em-bridge export --help`")
    known = Known()
    ends: list[tuple[Path, int]] = []
    for file in files:
        reached = _Reached()
        end = _scan(file, reached)
        if end is None and len(files) == 1:
            raise AgentBackupError(f"the export “{file}” holds no finished batch")
        if end is not None:
            known.learn(reached.known)
            ends.append((file, end))
    return known, _entries(ends)


@dataclass(slots=True)
class _Reached:
    position: str = "0-0"
    known: Known = field(default_factory=Known)


def _scan(path: Path, reached: LogFiles | _Reached) -> int | None:
    """Check a segment; set `reached` to its last commit and return where that ends, None if there is none.

    What follows the last commit may be cut off anywhere. Damage before a commit raises `AgentBackupError`.
    """
    known, position, end, bad = Known(), "0-0", None, 0
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            offset += len(line)
            record = _parsed(line)
            if record is None or (number == 1 and record != _HEAD):
                bad = bad or number
            elif "commit" in record:
                if bad:
                    raise AgentBackupError(
                        f"line {bad} of the export “{path}” is damaged",
                        hint="take the file from another snapshot of the execution manager",
                    )
                known.learn(Known(record["senders"], record["agents"], record["routed"]))
                position, end = record["commit"], offset
    if bad == 1 and end is None and offset:
        raise AgentBackupError(f"“{path}” is no exported message log")
    if end is not None:
        reached.known, reached.position = known, position
    return end


def _entries(ends: list[tuple[Path, int]]) -> Iterator[Entry]:
    for path, end in ends:
        with path.open("rb") as file:
            while file.tell() < end:
                record = _parsed(file.readline()) or {}
                if "id" in record:
                    body = base64.b64decode(record["body"])
                    yield Entry(record["id"], record["type"].encode(), body)


def _first_commit(path: Path) -> str:
    with path.open("rb") as file:
        for line in file:
            record = _parsed(line)
            if record and "commit" in record:
                return str(record["commit"])
    return "0-0"


def _entry_line(entry: Entry) -> bytes:
    body = base64.b64encode(entry.body).decode()
    return _line({"id": entry.id, "type": entry.type.decode(), "body": body})


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return the line's object, None if the line is not as it was written."""
    try:
        if not line.endswith(b"\n") or int(line[:8], 16) != zlib.crc32(line[9:-1]):
            return None
        record = json.loads(line[9:])
    except (ValueError, binascii.Error):
        return None
    return record if isinstance(record, dict) else None


def _lock(folder: Path) -> int:
    lock = os.open(folder / "writer.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise AgentBackupError(
            f"the message log in “{folder}” is being written by another process",
            hint="the execution manager does it while it runs; export into another folder or file",
        ) from None
    return lock
