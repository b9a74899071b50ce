"""The durable local queue of one agent: what it sent and Redis has not confirmed, and what it has received.

Promise: when `put` returns, the message is on disk (SQLite, WAL, `synchronous=FULL`) and survives a kill -9 and a power
cut; messages leave in the order of `put`; a message stays for `KEEP_S` after its acknowledgement, so that what a
restarted server lost in its last second can be sent again. Fails with `OutboxFull` when its limit of bytes is
reached, and with `AgentBackupError` when another process has it open or the file is damaged.

A number alone does not identify a message: an outbox that was restored from a backup, or lost, counts numbers that the
server has already seen. So each opening of the file starts a new *line*, a random name that is stored with every
message put by it. The server remembers the last number of each line; a number that another line has used is answered
with “behind”, and the message gets a new number here (`renumber`) instead of being dropped as a double.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from em_bridge import clock
from em_bridge.errors import AgentBackupError, OutboxFull

DEFAULT_LIMIT_BYTES: Final = 64 * 1024 * 1024
KEEP_S: Final = 2.0
_ROW_BYTES: Final = 100
"""What a message costs on disk besides its payload."""

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS outgoing(
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    line TEXT NOT NULL, recipient TEXT NOT NULL, payload BLOB NOT NULL, at REAL NOT NULL, acked_at REAL);
CREATE INDEX IF NOT EXISTS waiting ON outgoing(seq) WHERE acked_at IS NULL;
CREATE INDEX IF NOT EXISTS kept ON outgoing(acked_at) WHERE acked_at IS NOT NULL;
CREATE TABLE IF NOT EXISTS last_seen(sender TEXT PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message that waits: its number, the line that put it, and its content; `at` in Unix seconds."""

    seq: int
    line: str
    to: str
    payload: bytes
    at: float


class Outbox:
    """The queue in the file `path`, for the agent `owner`; a context manager, safe for several threads.

    `limit_bytes` bounds what waits to be sent. Raises `AgentBackupError` if another process has the file open, if it
    belongs to another agent, or if it is damaged.
    """

    def __init__(
        self, path: str | os.PathLike[str], owner: str, *, limit_bytes: int = DEFAULT_LIMIT_BYTES
    ) -> None:
        self.path = Path(path)
        self.line = uuid.uuid4().hex[:16]
        self._limit_bytes = limit_bytes
        self._lock = threading.RLock()
        self._guard = _take(self.path)
        try:
            with self._explained():
                self._db = _open(self.path)
                self._claim(owner)
                self._waiting_bytes = self._measure()
        except BaseException:
            os.close(self._guard)
            raise

    def _claim(self, owner: str) -> None:
        with self._db:
            self._db.execute("INSERT OR IGNORE INTO meta VALUES ('owner', ?)", (owner,))
        [(found,)] = self._db.execute("SELECT value FROM meta WHERE key = 'owner'")
        if found != owner:
            raise AgentBackupError(
                f"the outbox “{self.path}” belongs to “{found}”, not to “{owner}”",
                hint="give each agent an outbox file of its own",
            )

    def put(self, to: str, payload: bytes) -> int:
        """Store one message and return its number. Raises `OutboxFull`; then nothing was stored."""
        size = len(payload) + _ROW_BYTES
        with self._lock, self._explained():
            if self._waiting_bytes + size > self._limit_bytes:
                raise OutboxFull(
                    f"the outbox “{self.path}” is full ({self._waiting_bytes} of {self._limit_bytes} bytes)",
                    hint="Redis has been away for long, or messages are sent faster than it takes them",
                )
            with self._db:
                row = self._db.execute(
                    "INSERT INTO outgoing(line, recipient, payload, at) VALUES (?, ?, ?, ?)",
                    (self.line, to, payload, clock.now()),
                )
            self._waiting_bytes += size
            assert row.lastrowid is not None
            return row.lastrowid

    def batch(self, limit: int = 500, limit_bytes: int = 4 * 1024 * 1024) -> list[Outgoing]:
        """Return the oldest messages that wait, in order: at most `limit`, and `limit_bytes` unless one is larger."""
        found: list[Outgoing] = []
        size = 0
        with self._lock, self._explained():
            for row in self._db.execute(
                "SELECT seq, line, recipient, payload, at FROM outgoing WHERE acked_at IS NULL ORDER BY seq LIMIT ?",
                (limit,),
            ):
                size += len(row[3])
                if found and size > limit_bytes:
                    break
                found.append(Outgoing(*row))
        return found

    def acknowledge(self, messages: Sequence[Outgoing]) -> None:
        """Note that these waiting messages are on the server; they are kept for `KEEP_S` more."""
        with self._lock, self._explained():
            at = clock.now()
            with self._db:
                self._db.executemany(
                    "UPDATE outgoing SET acked_at = ? WHERE seq = ?",
                    ((at, message.seq) for message in messages),
                )
            self._waiting_bytes -= sum(len(message.payload) + _ROW_BYTES for message in messages)

    def confirmed(self) -> dict[str, int]:
        """Return, for each line with messages still kept, the last number that the server has acknowledged."""
        with self._lock, self._explained():
            return dict(
                self._db.execute(
                    "SELECT line, max(seq) FROM outgoing WHERE acked_at IS NOT NULL GROUP BY line"
                )
            )

    def send_again(self) -> int:
        """Let everything that is still kept wait again, because the server may have lost it; return how many."""
        with self._lock, self._explained():
            with self._db:
                changed = self._db.execute(
                    "UPDATE outgoing SET acked_at = NULL WHERE acked_at IS NOT NULL"
                ).rowcount
            self._waiting_bytes = self._measure()
            return changed

    def renumber(self, from_seq: int, above: int) -> None:
        """Give every waiting message from `from_seq` on a new number above `above` (and all of ours), in order."""
        with self._lock, self._explained(), self._db:
            [(highest,)] = self._db.execute(
                "SELECT max(?, coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'outgoing'), 0))",
                (above,),
            )
            rows = self._db.execute(
                "SELECT seq FROM outgoing WHERE acked_at IS NULL AND seq >= ? ORDER BY seq", (from_seq,)
            ).fetchall()
            for offset, (seq,) in enumerate(rows, start=1):
                self._db.execute("UPDATE outgoing SET seq = ? WHERE seq = ?", (highest + offset, seq))
            # AUTOINCREMENT counts inserts, not updates.
            self._db.execute(
                "INSERT OR IGNORE INTO sqlite_sequence(name, seq) SELECT 'outgoing', 0 "
                "WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'outgoing')"
            )
            self._db.execute(
                "UPDATE sqlite_sequence SET seq = ? WHERE name = 'outgoing'", (highest + len(rows),)
            )

    def forget_old(self) -> int:
        """Delete what was acknowledged more than `KEEP_S` ago; return how many messages are still kept."""
        with self._lock, self._explained():
            now = clock.now()
            # A clock that was set back must not keep messages for ever: an acknowledgement in the future is old, too.
            with self._db:
                self._db.execute(
                    "DELETE FROM outgoing WHERE acked_at < ? OR acked_at > ?", (now - KEEP_S, now + 1)
                )
            [(kept,)] = self._db.execute("SELECT count(*) FROM outgoing WHERE acked_at IS NOT NULL")
            return int(kept)

    def waiting(self) -> int:
        """Return how many messages wait to be sent."""
        with self._lock, self._explained():
            [(number,)] = self._db.execute("SELECT count(*) FROM outgoing WHERE acked_at IS NULL")
            return int(number)

    def last_seen(self, sender: str) -> int:
        """Return the number of the last message from `sender` that was dealt with; 0 if there was none."""
        with self._lock, self._explained():
            row = self._db.execute("SELECT seq FROM last_seen WHERE sender = ?", (sender,)).fetchone()
            return int(row[0]) if row else 0

    def all_last_seen(self) -> dict[str, int]:
        """Return `last_seen` of every sender."""
        with self._lock, self._explained():
            return dict(self._db.execute("SELECT sender, seq FROM last_seen"))

    def note_seen(self, sender: str, seq: int) -> None:
        """Note, durably, that the messages of `sender` up to `seq` are dealt with."""
        with self._lock, self._explained(), self._db:
            self._db.execute(
                "INSERT INTO last_seen VALUES (?, ?) ON CONFLICT(sender) DO UPDATE SET seq = max(seq, excluded.seq)",
                (sender, seq),
            )

    def close(self) -> None:
        """Close the file and let others open it; harmless if it is closed."""
        with self._lock:
            if self._guard >= 0:
                self._db.close()
                os.close(self._guard)
                self._guard = -1

    def _measure(self) -> int:
        [(size,)] = self._db.execute(
            "SELECT coalesce(sum(length(payload) + ?), 0) FROM outgoing WHERE acked_at IS NULL", (_ROW_BYTES,)
        )
        return int(size)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise AgentBackupError(
                f"the outbox “{self.path}” cannot be used: {error}",
                hint="check the disk's free space and the file's mode; a damaged file can be moved aside: "
                "what it still held is then lost",
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _take(path: Path) -> int:
    """Return a descriptor that holds the outbox for this process.

    The lock is on a file beside the database: closing any descriptor of the database itself would drop the locks
    that SQLite holds on it.
    """
    guard = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(guard)
        raise AgentBackupError(
            f"the outbox “{path}” is in use by another process",
            hint="stop the other one, or give this one an outbox of its own",
        ) from None
    return guard


def _open(path: Path) -> sqlite3.Connection:
    # Made before SQLite opens it, so that it, its -wal and its -shm are never readable by others.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    os.chmod(path, 0o600)
    db = sqlite3.connect(path, timeout=10.0, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.executescript(_SCHEMA)
    except BaseException:
        db.close()
        raise
    return db
