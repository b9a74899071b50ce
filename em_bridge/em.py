"""A complete small execution manager: one lease, a router, a monitor, and a heartbeat of its own.

Promise: among any number of these processes one works, and the others wait; what a deposed one still tries to write is
refused by the server. Killed at any instant, its successor resumes where it stopped. While Redis is away it waits and
reconnects by itself. An error that is neither (a fault of this program) ends `run` with that error, so that whoever
supervises it sees a dead EM rather than a silent one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import redis

from em_bridge import streams
from em_bridge.connection import connect, translate, translate_errors
from em_bridge.errors import AgentBackupError, LeaseLost, RedisRefused
from em_bridge.expiry import expire
from em_bridge.exporter import Exporter
from em_bridge.lease import Lease, new_holder, process_is_gone
from em_bridge.letterbox import Letterbox
from em_bridge.monitor import TICK_S, Monitor
from em_bridge.pulse import Pulse
from em_bridge.reach import Reach
from em_bridge.router import Router

log = logging.getLogger(__name__)

LEASE_TTL_S: Final = 5.0
RENEW_S: Final = 1.0
CONTEND_S: Final = 0.25
PAUSE_S: Final = 0.5
TRIM_S: Final = 60.0
RETENTION_S: Final = 7 * 24 * 3600.0
HEARTBEAT_RETENTION_S: Final = 3600.0
EXPORT_S: Final = 1.0
"""The pause between two exports: shorter than outboxes keep a message, so that a lost server costs none."""
INBOX_RETENTION_S: Final = 3600.0
"""What an agent has acknowledged; the log keeps it for a replay."""
DEAD_LETTER_RETENTION_S: Final = 30 * 24 * 3600.0


@dataclass(slots=True)
class _Tenure:
    """One time of holding the lease: its threads end when `over` is set; `fault` is the unforeseen error of one."""

    epoch: int
    over: threading.Event = field(default_factory=threading.Event)
    fault: BaseException | None = None


class ExecutionManager:
    """The EM `name` on the bus at `url` (default `$REDIS_URL`); `run` works until `stop` is called.

    `retention_s` is how long the message log and the event streams are kept; `message_log` is the folder into which
    the log is exported meanwhile (see `logfile`). With `reads_inbox`, what is sent to the EM is said in the log (see
    `letterbox`); without, it waits for an `Agent` of that name. A context manager: `with` runs it in the background.
    """

    def __init__(
        self,
        url: str | None = None,
        name: str = "em",
        *,
        retention_s: float = RETENTION_S,
        heartbeat_s: float = 1.0,
        lease_ttl_s: float = LEASE_TTL_S,
        message_log: Path | None = None,
        reads_inbox: bool = False,
    ) -> None:
        self.name = name
        self._reads_inbox = reads_inbox
        self._message_log = message_log
        self._url = url
        self._retention_s = retention_s
        self._heartbeat_s = heartbeat_s
        self._client = connect(url, retrying=False)
        self._holder = new_holder()
        self._lease = Lease(self._client, name, holder=self._holder, ttl_s=lease_ttl_s)
        self._stop = threading.Event()
        self._leading = threading.Event()
        self._reach = Reach(f"execution manager {name}")
        self._tenure: _Tenure | None = None
        self._background: threading.Thread | None = None
        self.fault: BaseException | None = None

    @property
    def leading(self) -> bool:
        """Whether this process holds the lease, as far as it knows."""
        return self._leading.is_set()

    def wait_until_leading(self, timeout_s: float) -> bool:
        """Wait until this process holds the lease; False if it does not within `timeout_s`."""
        return self._leading.wait(timeout_s)

    def stop(self) -> None:
        """Let `run` return soon; callable from a signal handler and from any thread."""
        self._stop.set()
        tenure = self._tenure
        if tenure is not None:
            tenure.over.set()

    def run(self) -> None:
        """Work until `stop`. Raises `RedisRefused` if the server does not let us in, and any unforeseen error."""
        waiting = False
        while not self._stop.is_set():
            try:
                epoch = self._lease.acquire(gone=process_is_gone)
            except (redis.RedisError, OSError) as error:
                self._away(error)
                continue
            self._reach.back()
            if epoch is None:
                if not waiting:
                    log.info("another execution manager holds the lease “%s”: waiting", self.name)
                waiting = True
                self._stop.wait(CONTEND_S)
                continue
            waiting = False
            self._hold(_Tenure(epoch))
        self._release()

    def _hold(self, tenure: _Tenure) -> None:
        """Work under one epoch, until the lease is lost, a thread fails, or `stop`."""
        log.info("leading “%s” with epoch %d", self.name, tenure.epoch)
        self._tenure = tenure
        threads = [
            threading.Thread(target=self._guarded, args=(tenure, work), name=work.__name__, daemon=True)
            for work in (self._route, self._watch, self._tidy, self._export)
            if work != self._export or self._message_log is not None
        ]
        with Pulse(connect(self._url, retrying=False), self.name, interval_s=self._heartbeat_s):
            for thread in threads:
                thread.start()
            self._leading.set()
            try:
                self._keep_lease(tenure)
            finally:
                self._leading.clear()
                tenure.over.set()
                for thread in threads:
                    thread.join()
        if tenure.fault is not None:
            self._release()
            raise tenure.fault

    def _keep_lease(self, tenure: _Tenure) -> None:
        letterbox = Letterbox(self._client, self.name) if self._reads_inbox else None
        while not (self._stop.is_set() or tenure.over.is_set()):
            try:
                if not self._lease.renew():
                    log.warning("the lease “%s” was lost to another execution manager", self.name)
                    return
                self._reach.back()
                if letterbox is not None:
                    letterbox.step()
            except (redis.RedisError, OSError) as error:
                # The threads go on: what they write carries the epoch, and is refused if somebody else leads.
                self._away(error)
            tenure.over.wait(RENEW_S)

    def _guarded(self, tenure: _Tenure, work: Callable[[_Tenure], None]) -> None:
        try:
            work(tenure)
        except LeaseLost as loss:
            log.warning("%s", loss.message)
        except BaseException as fault:  # handed to `run`, which raises it
            log.exception("%s failed", work.__name__.strip("_"))
            tenure.fault = fault
        finally:
            tenure.over.set()

    def _route(self, tenure: _Tenure) -> None:
        # A client that repeats by itself would route a batch again after a lost reply.
        client = connect(self._url, retrying=False)
        router = Router(client, consumer=self._holder, epoch=tenure.epoch, name=self.name)
        self._repeat(tenure, client, router.step, "router")

    def _watch(self, tenure: _Tenure) -> None:
        client = connect(self._url, retrying=False)
        monitor = Monitor(client, epoch=tenure.epoch, me=self.name)

        def watch() -> None:
            monitor.step()
            tenure.over.wait(TICK_S)

        self._repeat(tenure, client, watch, "monitor")

    def _tidy(self, tenure: _Tenure) -> None:
        client = connect(self._url)

        def tidy() -> None:
            self._trim(client)
            tenure.over.wait(TRIM_S)

        self._repeat(tenure, client, tidy, "trimming")

    def _export(self, tenure: _Tenure) -> None:
        assert self._message_log is not None
        folder = self._message_log
        client = connect(self._url, retrying=False)
        exporter: Exporter | None = None
        told = False

        def export() -> None:
            nonlocal exporter, told
            try:
                exporter = exporter or Exporter(client, folder, retention_s=self._retention_s)
                exporter.step()
            except AgentBackupError as problem:
                # Another process still writes there: routing must not wait for it.
                if not told:
                    log.warning("the message log is not exported: %s", problem)
                told = True
            except BaseException as error:
                exporter = None
                if not (isinstance(error, redis.ResponseError) and "NOGROUP" in str(error)):
                    raise
                # The server lost its data while we looked.
            tenure.over.wait(EXPORT_S)

        try:
            self._repeat(tenure, client, export, "export of the message log")
        finally:
            if exporter is not None:
                exporter.close()

    def _repeat(self, tenure: _Tenure, client: redis.Redis, step: Callable[[], object], what: str) -> None:
        """Call `step` again and again; pause while Redis is away."""
        reach = Reach(what)
        try:
            while not (tenure.over.is_set() or self._stop.is_set()):
                try:
                    step()
                    reach.back()
                except (redis.RedisError, OSError) as error:
                    if isinstance(error, redis.RedisError) and translate(error, client) is None:
                        raise
                    reach.lost(error, client)
                    tenure.over.wait(PAUSE_S)
        finally:
            client.close()

    def _trim(self, client: redis.Redis) -> None:
        for stream in (streams.MESSAGES, streams.AGENT_STATE, streams.CONFIG_CHANGE):
            streams.trim(client, stream, older_than_s=self._retention_s)
        streams.trim(client, streams.HEARTBEATS, older_than_s=HEARTBEAT_RETENTION_S)
        streams.trim(client, streams.DEAD_LETTER, older_than_s=DEAD_LETTER_RETENTION_S)
        for key in client.scan_iter(match=streams.inbox("*"), count=1000, _type="stream"):
            expire(client, key.decode().removeprefix(streams.inbox("")), older_than_s=self._retention_s)
            streams.trim(client, key.decode(), older_than_s=min(INBOX_RETENTION_S, self._retention_s))

    def _away(self, error: Exception) -> None:
        refused = translate(error, self._client)
        if isinstance(refused, RedisRefused):
            raise refused from error
        if refused is None and isinstance(error, redis.RedisError):
            raise error
        self._reach.lost(error, self._client)
        self._stop.wait(PAUSE_S)

    def _release(self) -> None:
        try:
            with translate_errors(self._client):
                self._lease.release()
        except (AgentBackupError, OSError) as error:
            log.info("the lease “%s” was not released, it runs out by itself: %s", self.name, error)

    def __enter__(self) -> Self:
        def work() -> None:
            try:
                self.run()
            except BaseException as fault:  # noqa: BLE001  # kept for the owner, who asks on leaving
                self.fault = fault

        self._background = threading.Thread(target=work, name=f"execution-manager-{self.name}", daemon=True)
        self._background.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        assert self._background is not None
        self._background.join()
        self._client.close()
        if self.fault is not None and error is None:
            raise self.fault
