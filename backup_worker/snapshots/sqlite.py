"""One consistent copy of a SQLite database that another process may be writing to.

The copy goes through SQLite's online backup from a read-only connection, so that the application is not disturbed and
what is still in its write-ahead log is in the copy. No `-wal` or `-shm` file is created beside the original: a database
nobody has open is read as immutable, one that a crash left with a log is copied aside and recovered there.
Sources: https://www.sqlite.org/wal.html#read_only_databases, https://www.sqlite.org/backup.html
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from backup_worker.snapshots.content import copy_hashed
from backup_worker.snapshots.disk import Tree

MAGIC = b"SQLite format 3\0"
COMPANIONS = ("-wal", "-shm", "-journal")
_WAL = 2
_BUSY_TIMEOUT_S = 1.0


class Unstable(Exception):
    """The database changed, or was locked, while it was copied: try again."""


class NotADatabase(Exception):
    """SQLite cannot read it; only its bytes can be kept."""


def is_database(header: bytes) -> bool:
    """Tell whether a file that begins with `header` (at least 20 bytes) is a SQLite database."""
    return header.startswith(MAGIC) and len(header) >= 20


def copy_database(source: Tree, path: str, fd: int, scratch: Path) -> Path:
    """Copy the database `path`, open as `fd`, into the folder `scratch`; return the copy.

    Raises Unstable or NotADatabase; `fd` must stay open until this returns, because closing any descriptor of a
    file drops the POSIX locks that SQLite holds on it in this process.
    """
    header = os.pread(fd, 20, 0)
    logged = header[18] == _WAL or header[19] == _WAL
    log = source.find(path + "-wal")
    index = source.find(path + "-shm")
    copy = scratch / "copy"
    copy.unlink(missing_ok=True)
    if logged and log is not None and index is None:
        return _copy_aside(source, path, scratch)
    immutable = logged and log is None
    before = os.fstat(fd)
    try:
        with _open_beneath(source, path, fd, immutable=immutable) as original:
            _back_up(original, copy)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise Unstable(str(error)) from error
        return _copy_aside(source, path, scratch)
    except sqlite3.DatabaseError as error:
        raise NotADatabase(str(error)) from error
    if immutable and (_changed(before, os.fstat(fd)) or source.find(path + "-wal") is not None):
        raise Unstable("opened by an application meanwhile")
    return copy


@contextlib.contextmanager
def _open_beneath(source: Tree, path: str, fd: int, *, immutable: bool) -> Iterator[sqlite3.Connection]:
    folder, name = source.at(path)
    address = quote(f"/proc/self/fd/{folder}/".encode() + os.fsencode(name))
    mode = "immutable=1" if immutable else "mode=ro"
    connection = sqlite3.connect(
        f"file:{address}?{mode}", uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None
    )
    with contextlib.closing(connection):
        connection.execute("PRAGMA schema_version").fetchone()
        # SQLite resolves the path by itself. Only if it opened the very file that we hold, reached without following
        # a link, was no folder on the way swapped meanwhile.
        if _descriptors_of(os.fstat(fd)) < 2:
            raise Unstable("its folder was replaced meanwhile")
        yield connection


def _descriptors_of(wanted: os.stat_result) -> int:
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            info = os.fstat(int(name))
            count += (info.st_dev, info.st_ino) == (wanted.st_dev, wanted.st_ino)
    return count


def _back_up(original: sqlite3.Connection, copy: Path) -> None:
    target = sqlite3.connect(copy, isolation_level=None)
    with contextlib.closing(target):
        target.execute("PRAGMA journal_mode=OFF")
        target.execute("PRAGMA synchronous=OFF")
        original.backup(target)


def _copy_aside(source: Tree, path: str, scratch: Path) -> Path:
    """Copy the database and its log as they lie, and let SQLite recover that copy."""
    aside = scratch / "aside"
    for suffix in ("", *COMPANIONS):
        Path(f"{aside}{suffix}").unlink(missing_ok=True)
    before = {suffix: source.find(path + suffix) for suffix in ("", "-wal", "-journal")}
    for suffix, info in before.items():
        if info is not None:
            _copy_bytes(source, path + suffix, Path(f"{aside}{suffix}"))
    for suffix, info in before.items():
        after = source.find(path + suffix)
        if (info is None) != (after is None) or (
            info is not None and after is not None and _changed(info, after)
        ):
            raise Unstable("written while it was copied")
    copy = scratch / "copy"
    try:
        with contextlib.closing(sqlite3.connect(aside, isolation_level=None)) as original:
            _back_up(original, copy)
    except sqlite3.DatabaseError as error:
        raise NotADatabase(str(error)) from error
    finally:
        for suffix in ("", *COMPANIONS):
            Path(f"{aside}{suffix}").unlink(missing_ok=True)
    return copy


def _copy_bytes(source: Tree, path: str, target: Path) -> None:
    try:
        fd = source.open(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise Unstable("a part of it went away") from error
    try:
        out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            copy_hashed(fd, out)
        finally:
            os.close(out)
    finally:
        os.close(fd)


def _changed(before: os.stat_result, after: os.stat_result) -> bool:
    return (before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns) != (
        after.st_ino, after.st_size, after.st_mtime_ns, after.st_ctime_ns,
    )  # fmt: skip


def integrity_problem(path: str) -> str | None:
    """Return what `PRAGMA integrity_check` finds in a copy that nobody has open, or None if it is sound."""
    address = quote(os.fsencode(path))
    try:
        connection = sqlite3.connect(f"file:{address}?immutable=1", uri=True, isolation_level=None)
        with contextlib.closing(connection):
            answer = connection.execute("PRAGMA integrity_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        return f"not a sound SQLite database: {error}"
    return (
        None if answer == ("ok",) else f"not a sound SQLite database: {answer[0] if answer else 'no answer'}"
    )
