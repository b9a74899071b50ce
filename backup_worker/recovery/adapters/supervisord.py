"""A program of supervisord, over its XML-RPC: http, or the unix socket of its own server.

supervisord starts a program that exits again at once (`autorestart`), so `EXITED` counts as down only at the second
look: between two requests it has decided. `BACKOFF` is about to be started, so it is not down.
"""

from __future__ import annotations

import base64
import http.client
import xmlrpc.client
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from backup_worker.recovery import launch
from backup_worker.recovery.adapters.local_http import connection_to, without_password
from backup_worker.recovery.adapters.supervised import ANSWER_WITHIN_S, AdapterError, Supervised, Word

STOPPED, BACKOFF, EXITED, FATAL = 0, 30, 100, 200
DOWN = frozenset({STOPPED, EXITED, FATAL})
"""The other states (`UNKNOWN` too) are not known to be down. See http://supervisord.org/subprocess.html."""

BAD_NAME, ALREADY_STARTED, NOT_RUNNING = 10, 60, 70
LOG_BYTES = 16 * 1024


class _Transport(xmlrpc.client.Transport):
    """XML-RPC over a connection of ours, with a time limit, which the standard one has not."""

    def __init__(self, server: str) -> None:
        parts = urlsplit(server)
        headers = []
        if parts.username is not None:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            headers.append(("Authorization", f"Basic {base64.b64encode(login).decode()}"))
        super().__init__(headers=headers)
        self.server = server

    def make_connection(self, host: object) -> http.client.HTTPConnection:
        return connection_to(self.server, ANSWER_WITHIN_S)


class SupervisordAdapter(Supervised):
    """The program `program` (`name` or `group:name`) of the supervisord at `server`."""

    def __init__(self, name: str, root: Path, state: Path, program: str, server: str) -> None:
        super().__init__(name, root, state)
        self.program, self.server = program, server

    def describe(self) -> str:
        """Return the program's name."""
        return f"supervisord's program “{self.program}”"

    def word(self) -> Word:
        """Return its state."""
        info = self._info()
        if info["state"] == EXITED:
            info = self._info()
        # In STOPPING the pid is still there; in BACKOFF it is 0.
        return Word(info["state"] not in DOWN, int(info["pid"]), str(info["statename"]))

    def _info(self) -> dict[str, Any]:
        return cast(dict[str, Any], self._call(lambda rpc: rpc.getProcessInfo(self.program)))

    def ask_stop(self, term_grace_s: float) -> None:
        """Stop it; from now on supervisord starts it no more by itself."""
        self._call(lambda rpc: rpc.stopProcess(self.program, False), harmless=NOT_RUNNING)

    def ask_kill(self) -> None:
        """Kill its process group, if it has a process."""
        self._call(lambda rpc: rpc.signalProcess(self.program, "KILL"), harmless=NOT_RUNNING)

    def ask_start(self) -> None:
        """Start it."""
        self._call(lambda rpc: rpc.startProcess(self.program, False), harmless=ALREADY_STARTED)

    def last_end(self) -> str:
        """Return its exit code, or why it could not be started."""
        try:
            info = self._info()
        except AdapterError:
            return ""
        if info["state"] not in (EXITED, FATAL, BACKOFF):
            return ""
        code = int(info["exitstatus"])
        # supervisord gives a signal as a negative number.
        ended = launch.signalled(-code) if code < 0 else f"exit code {code}"
        return f"{ended} ({info['spawnerr']})" if info["spawnerr"] else ended

    def log_lines(self, count: int = 50) -> list[str]:
        """Return the end of its output, and behind it of its errors if they have a log of their own."""
        out = self._log(lambda rpc: rpc.readProcessStdoutLog(self.program, -LOG_BYTES, 0))
        err = self._log(lambda rpc: rpc.readProcessStderrLog(self.program, -LOG_BYTES, 0))
        lines = [*out.splitlines(), *err.splitlines()]
        return lines[-count:]

    def _log(self, read: Callable[[Any], Any]) -> str:
        try:
            return str(self._call(read))
        except AdapterError:
            # A program may have no log: not worth failing a recovery for.
            return ""

    def _call(self, call: Callable[[Any], Any], *, harmless: int | None = None) -> Any:
        """Return the answer; raises AdapterError. A fault with the number `harmless` is an answer too: None."""
        try:
            transport = _Transport(self.server)
            with xmlrpc.client.ServerProxy("http://localhost/RPC2", transport=transport) as proxy:
                return call(proxy.supervisor)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode == harmless:
                return None
            hint = "correct `start.supervisord.program` in agents.json; `supervisorctl status` names them"
            raise AdapterError(
                f"{self.describe()} of agent “{self.name}”: supervisord answers “{fault.faultString}”",
                hint=hint if fault.faultCode == BAD_NAME else "see supervisord's own log",
            ) from fault
        except (OSError, http.client.HTTPException, xmlrpc.client.Error, ValueError) as error:
            why = (
                f"{error.errcode} {error.errmsg}" if isinstance(error, xmlrpc.client.ProtocolError) else error
            )
            raise AdapterError(
                f"supervisord at “{without_password(self.server)}” cannot be asked about agent “{self.name}”: {why}",
                hint="check that it runs, and `start.supervisord.server` in agents.json",
            ) from error
