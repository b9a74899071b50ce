"""A container, over the API of Docker (or of Podman, which speaks it too) on its unix socket or over TCP.

Only its own process tree is behind a container: its pid namespace ends with its first process. The API is asked without
a version, so that each server answers with its own: what is used here has not changed in any.
"""

from __future__ import annotations

import http.client
import json
import math
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, urlencode

import psutil

from backup_worker.recovery import processes
from backup_worker.recovery.adapters.local_http import connection_to, without_password
from backup_worker.recovery.adapters.supervised import (
    ANSWER_WITHIN_S,
    AdapterError,
    Supervised,
    Word,
    processes_of,
    tree_of,
)

DONE_ALREADY, NOT_FOUND, CONFLICT = 304, 404, 409
FRAME_HEADER_BYTES = 8


class DockerAdapter(Supervised):
    """The container `container` (name or id) of the Docker at `server`."""

    def __init__(self, name: str, root: Path, state: Path, container: str, server: str) -> None:
        super().__init__(name, root, state)
        self.container, self.server = container, server

    def describe(self) -> str:
        """Return the container's name."""
        return f"the container “{self.container}”"

    def word(self) -> Word:
        """Return its state."""
        state = self._inspect()["State"]
        busy = any(state.get(key) for key in ("Running", "Paused", "Restarting"))
        return Word(busy, int(state.get("Pid") or 0) if busy else 0, str(state.get("Status", "unknown")))

    def _inspect(self) -> dict[str, Any]:
        return cast(dict[str, Any], json.loads(self._ask("GET", "json")))

    def members(self, word: Word) -> list[psutil.Process]:
        """Return its processes on this host: what its first one started, and what was executed into it."""
        if not word.pid:
            return []
        found = {one.pid: one for one in (*tree_of(word.pid), *processes_of(self._pids()))}
        return list(found.values())

    def _pids(self) -> list[int]:
        answer = self._ask("GET", "top", fine=(CONFLICT,))
        top = json.loads(answer) if answer else {}
        titles = top.get("Titles") or []
        if "PID" not in titles:
            return []
        column = titles.index("PID")
        return [int(row[column]) for row in top.get("Processes") or []]

    def ask_stop(self, term_grace_s: float) -> None:
        """Stop it: its image's stop signal, and KILL after the grace; its restart policy is held off by this."""
        if self._inspect()["State"].get("Paused"):
            # A frozen process cannot end by itself.
            self._ask("POST", "unpause", fine=(CONFLICT,))
        grace_s = math.ceil(term_grace_s)
        self._ask(
            "POST",
            "stop",
            fine=(DONE_ALREADY,),
            within_s=grace_s + processes.KILL_GRACE_S + ANSWER_WITHIN_S,
            t=str(grace_s),
        )

    def ask_kill(self) -> None:
        """Kill it."""
        self._ask("POST", "kill", fine=(CONFLICT,), signal="SIGKILL")

    def ask_start(self) -> None:
        """Start it."""
        self._ask("POST", "start", fine=(DONE_ALREADY,))

    def last_end(self) -> str:
        """Return its exit code, and what Docker says of it."""
        try:
            state = self._inspect()["State"]
        except AdapterError:
            return ""
        if state.get("Running") or "ExitCode" not in state:
            return ""
        said = [str(state["Error"])] if state.get("Error") else []
        said += ["its memory was used up"] if state.get("OOMKilled") else []
        return "; ".join([f"exit code {state['ExitCode']}", *said])

    def log_lines(self, count: int = 50) -> list[str]:
        """Return its last lines."""
        try:
            raw = self._ask("GET", "logs", stdout="1", stderr="1", tail=str(count))
            terminal = bool(self._inspect().get("Config", {}).get("Tty"))
        except AdapterError:
            # A log driver may keep nothing that can be read: not worth failing a recovery for.
            return []
        text = raw if terminal else _unframed(raw)
        return text.decode(errors="replace").splitlines()[-count:]

    def _ask(
        self,
        method: str,
        action: str,
        *,
        fine: tuple[int, ...] = (),
        within_s: float = ANSWER_WITHIN_S,
        **options: str,
    ) -> bytes:
        """Return the body of the answer, empty for a status in `fine`; raises AdapterError."""
        path = f"/containers/{quote(self.container, safe='')}/{action}" + (
            f"?{urlencode(options)}" if options else ""
        )
        try:
            connection = connection_to(self.server, within_s)
            try:
                connection.request(method, path)
                answer = connection.getresponse()
                body = answer.read()
            finally:
                connection.close()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise AdapterError(
                f"docker at “{without_password(self.server)}” cannot be asked about agent “{self.name}”: {error}",
                hint="check that it runs, that we may use its socket, and `start.docker` in agents.json",
            ) from error
        if answer.status in fine:
            return b""
        if answer.status >= 400:
            hint = "correct `start.docker.container` in agents.json; `docker ps -a` names them"
            raise AdapterError(
                f"{self.describe()} of agent “{self.name}”: docker answers “{_message(body)}”",
                hint=hint if answer.status == NOT_FOUND else "see the container's own log: `docker logs`",
            )
        return body


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:200]


def _unframed(raw: bytes) -> bytes:
    """Join the frames of a log: each has eight bytes in front, the last four of which are its length."""
    joined, at = b"", 0
    while at + FRAME_HEADER_BYTES <= len(raw):
        length = int.from_bytes(raw[at + 4 : at + FRAME_HEADER_BYTES], "big")
        joined += raw[at + FRAME_HEADER_BYTES : at + FRAME_HEADER_BYTES + length]
        at += FRAME_HEADER_BYTES + length
    return joined
