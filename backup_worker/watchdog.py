"""Watches the one agent that nobody else watches: the EM itself.

Any number of watchdogs may run; one holds the lease and watches, another takes over within `LEASE_S` of its death. The
EM is DEAD after its `dead_after` seconds of silence by the server's clock; while Redis or the watchdog itself was away
nobody watched, so the EM gets a fresh grace. The death is published like every other, so the EM is recovered like
every other agent. Nothing is watched while agents.json has no agent `em`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from backup_worker.alerts import refused_urls
from backup_worker.config import ConfigWatch
from backup_worker.running.services import every, stopped_by_signals
from em_bridge import connection, streams
from em_bridge.detector import Detector, Transition
from em_bridge.errors import InvalidEvent
from em_bridge.events import DEAD, EM, AgentState, Heartbeat, decode
from em_bridge.lease import Lease, new_holder, process_is_gone
from em_bridge.monitor import write_record

log = logging.getLogger(__name__)

TICK_S = 0.5
LEASE_S = 5.0


class Watchdog:
    """One watcher; `step` is to be called every `TICK_S`."""

    def __init__(self, client: Any, watch: ConfigWatch) -> None:
        self.client = client
        self.watch = watch
        self.lease = Lease(client, "watchdog", holder=new_holder(), ttl_s=LEASE_S)
        self._detector: Detector | None = None
        self._cursor = "0-0"
        self._unpublished: list[Transition] = []

    def step(self) -> float:
        """Hold the lease or wait for it; read the EM's heartbeats, and publish its death. Returns the pause."""
        self.watch.refresh()
        if self.lease.epoch is None or not self.lease.renew():
            self._detector, self._unpublished = None, []
            if self.lease.acquire(gone=process_is_gone) is None:
                return TICK_S
            log.info("watching the EM (epoch %s)", self.lease.epoch)
        if EM not in self.watch.current.agents:
            self._detector, self._unpublished = None, []
            return TICK_S
        now = streams.server_time(self.client)
        detector = self._detector or self._begin(now)
        self._read_beats(detector, now)
        changes = detector.tick(now)
        for change in changes:
            level = logging.ERROR if change.state == DEAD else logging.INFO
            log.log(level, "em is %s: %s", change.state, change.reason)
        # The detector tells of each change once: what a full or failing server does not take now is published later.
        self._unpublished += changes
        sight = detector.sight(EM)
        if sight is not None and sight.state is not None:
            self.client.hset(streams.STATES, EM, write_record(sight))
        while self._unpublished:
            self._publish(self._unpublished[0])
            self._unpublished.pop(0)
        return TICK_S

    def _publish(self, change: Transition) -> None:
        event = AgentState(EM, change.state, change.reason, change.at, change.incarnation)
        # Once for this epoch and change: a lost reply must not open a second incident.
        once = f"watchdog/{self.lease.epoch}/{change.state}/{change.at}"
        streams.append_once(self.client, event, once=once)

    def _begin(self, now: float) -> Detector:
        """Start watching, with a full grace from `now` for an EM of which nothing is known."""
        self._detector = Detector(self._limit)
        self._detector.watch(EM, now)
        self._cursor = streams.last_id(self.client, streams.HEARTBEATS)
        return self._detector

    def _limit(self, agent: str) -> float:
        return self.watch.current.agents[agent].heartbeat.dead_after

    def _read_beats(self, detector: Detector, now: float) -> None:
        for entry_id, fields in streams.read_range(self.client, streams.HEARTBEATS, start=f"({self._cursor}"):
            self._cursor = entry_id
            try:
                beat = decode(fields, stream=streams.HEARTBEATS)
            except InvalidEvent:
                # The EM's monitor reports such entries.
                continue
            if isinstance(beat, Heartbeat) and beat.agent == EM:
                # Ids do not go back when the server's clock does: they would lie in the future for as long.
                at = min(streams.entry_time(entry_id), now)
                detector.observe(EM, beat.incarnation, at, status=beat.status, entry=entry_id, pid=beat.pid)


def run(config_dir: Path, url: str | None) -> None:
    """Watch until SIGTERM."""
    watchdog = Watchdog(connection.connect(url), ConfigWatch(config_dir, check_alerts=refused_urls))
    with stopped_by_signals() as stop:
        every(stop, "watchdog", watchdog.client, watchdog.step)
        watchdog.lease.release()
