"""What can go wrong in the engine, as one line for a person, a hint, and an exit code."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from em_bridge.errors import AgentBackupError


class SnapshotError(AgentBackupError):
    """A snapshot could not be made, proven, deleted or restored; nothing half was left behind (exit code 1)."""


class DamagedSnapshot(SnapshotError):
    """A snapshot was found damaged while it was restored; that is noted, and nothing was restored (exit code 1)."""


class NoSpace(SnapshotError):
    """The file system is full, or would be (exit code 1)."""


_HINTS = {
    errno.ENOSPC: "free some space, or run `backup-worker prune`",
    errno.EDQUOT: "the quota is used up: free some space, or run `backup-worker prune`",
    errno.EACCES: "check owner and mode of the path, and the user you run as",
    errno.EPERM: "check owner and mode of the path, and the user you run as",
    errno.EROFS: "the file system is mounted read-only",
    errno.EIO: "the disk reports an error: check it, and run `backup-worker verify`",
}


def from_os_error(doing: str, error: OSError) -> SnapshotError:
    """Return the error to raise when the system refuses something while we are `doing` (“backing up “z””)."""
    kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else SnapshotError
    where = f": “{printable(os.fsdecode(error.filename))}”" if isinstance(error.filename, str | bytes) else ""
    what = (error.strerror or str(error)).lower()
    return kind(f"{doing} failed: {what}{where}", hint=_HINTS.get(error.errno or 0))


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Raise what the system refuses meanwhile as `SnapshotError`; a context manager, and a decorator."""
    try:
        yield
    except OSError as error:
        raise from_os_error(doing, error) from error


def printable(path: str) -> str:
    r"""Return `path` for a person or a JSON document: bytes that are not UTF-8 as `\xNN`, controls escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
