"""Does this part live? Each part leaves a mark in Redis that expires; a container's health check looks for it.

`python -m backup_worker.running.health PART` exits 0 if PART on this host left its mark within `MARK_TTL_S`, else 1.
"""

from __future__ import annotations

import socket
import sys
from typing import Any

from em_bridge import clock, connection
from em_bridge.errors import AgentBackupError

MARK_TTL_S = 30
EVERY_S = 5.0


def _key(part: str) -> str:
    return f"backup:alive:{part}:{socket.gethostname()}"


class Mark:
    """The mark of one part of this host; `renew` may be called as often as one likes."""

    def __init__(self, client: Any, part: str) -> None:
        self._client = client
        self._key = _key(part)
        self._due = 0.0

    def renew(self) -> None:
        """Say that the part lives, at most every `EVERY_S`."""
        now = clock.monotonic()
        if now >= self._due:
            self._client.set(self._key, b"1", ex=MARK_TTL_S)
            self._due = now + EVERY_S


def main(part: str) -> int:
    """Return 0 if `part` of this host is alive."""
    try:
        client = connection.connect()
        with connection.translate_errors(client):
            alive = bool(client.exists(_key(part)))
    except AgentBackupError as error:
        sys.stderr.write(f"{part}: {error.message}\n")
        return 1
    if not alive:
        sys.stderr.write(f"{part} on {socket.gethostname()} has left no mark for {MARK_TTL_S} s\n")
    return int(not alive)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
