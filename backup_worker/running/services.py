"""The long-running parts. Each function here is one part's whole life: it returns when it is asked to stop.

Every part waits out a Redis that is away and goes on by itself, with one log line a change of state; a configuration
that does not load at the start is an error, one that breaks later is alerted while the last good one stays in force.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import redis.exceptions

from backup_worker import alerts, jobs, schedule, slots
from backup_worker.approval import guard_rounds
from backup_worker.approval.hints import Hints
from backup_worker.config import Config, ConfigWatch
from backup_worker.dispatcher import Dispatcher
from backup_worker.maintenance import lookout, maintain, notices
from backup_worker.queueing import backpressure, hosts, queues, retries
from backup_worker.queueing.due import BackupDue, MaintenanceDue
from backup_worker.recovery.pacemaker import IDLE_TICK_S, Pacemaker
from backup_worker.running.absence import Absence
from backup_worker.running.health import Mark
from backup_worker.runtime import Runtime
from backup_worker.worker import make_worker, patience
from em_bridge import clock, connection, streams
from em_bridge.errors import AgentBackupError, RedisRefused, RedisUnavailable

log = logging.getLogger(__name__)

TICK_S = 1.0
PATIENCE_TRIES = 60
"""How often a worker tries a command again while Redis is away: for about two minutes."""
SLOT_TTL_S = 45 * 24 * 3600
"""How long a slot counts as announced: longer than the longest usual period of a tier, a month."""
FORGET_ANNOUNCED_S = 60.0
STANDSTILL_S = 5 * maintain.EVERY_S["watch"]
"""How long the regular look at everything may be missing before the scheduler raises its own voice."""
UNSERVED_AFTER_S = 30.0
"""For how long jobs may wait in a queue without any worker: as long as a restart of the workers takes."""
UNSERVED_LOOK_S = 5.0
NOTICES_LOOK_S = 10.0
"""How often the scheduler looks whether the digest or the test page is due."""
HINTS_APART_S = 10.0
"""However much is written, guarded files are looked at no more often than this."""


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and SIGINT set."""
    stop = threading.Event()

    def ask(*_: object) -> None:
        stop.set()

    before = {signum: signal.signal(signum, ask) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def every(
    stop: threading.Event,
    name: str,
    client: Any,
    step: Callable[[], float],
    *,
    absence: Absence | None = None,
) -> None:
    """Call `step` until `stop` is set, each time after as many seconds as it returned.

    A Redis that is away, loading or full is waited out; one that refuses us raises RedisRefused. With `absence`, people
    are told of either.
    """
    away = False
    told: str | None = None
    mark = Mark(client, name)
    while not stop.is_set():
        try:
            pause_s = step()
            mark.renew()
            if away:
                log.info("%s: redis is back", name)
            away = False
            if absence is not None:
                absence.back()
        except redis.exceptions.RedisError as error:
            translated = connection.translate(error, client)
            if translated is None:
                raise
            if absence is not None:
                absence.away(translated.message, at_once=isinstance(translated, RedisRefused))
            if isinstance(translated, RedisRefused):
                raise translated from error
            if not away:
                log.warning("%s: waiting: %s", name, translated.message)
            away, pause_s = True, TICK_S
        except AgentBackupError as error:
            if error.message != told:
                log.error("%s: %s", name, error.message)
            told, pause_s = error.message, TICK_S
        else:
            told = None
        stop.wait(pause_s)


def enter(url: str | None) -> Any:
    """Return a client for `url`. Raises UsageError for a wrong one, RedisRefused if the server does not let us in.

    A server that is away may come back, and is waited for by whoever uses the client.
    """
    client = connection.connect(url)
    try:
        with connection.translate_errors(client):
            client.ping()
    except RedisRefused:
        raise
    except RedisUnavailable as error:
        log.warning("waiting: %s", error.message)
    return client


def publish_fleet(client: Any, config: Config) -> None:
    """Tell the EM which agents there are and after how many seconds of silence each is dead (`em:fleet`)."""
    wanted = {
        name: msgpack.packb({"dead_after": agent.heartbeat.dead_after})
        for name, agent in config.agents.items()
    }
    gone = {name.decode() for name in client.hkeys(streams.FLEET)} - wanted.keys()
    with client.pipeline(transaction=True) as pipeline:
        pipeline.hset(streams.FLEET, mapping=wanted)
        if gone:
            pipeline.hdel(streams.FLEET, *gone)
        pipeline.execute()


def dispatcher(config_dir: Path, url: str | None) -> None:
    """Hand events to the workers, and wake what waits: incidents, and jobs that are tried again."""
    watch = ConfigWatch(config_dir, check_alerts=alerts.refused_urls)
    # Never retried by the client: a transaction whose reply was lost is found again through its marks.
    handing_off = Dispatcher(
        connection.connect(url, retrying=False),
        limits=lambda: watch.current.schedule.limits,
        hosts=lambda: hosts.hosts_of(watch.current),
    )
    waking = connection.connect(url)
    with stopped_by_signals() as stop, ThreadPoolExecutor(1, "pacemaker") as beside:
        pacing = beside.submit(_pace, stop, waking, watch)
        # One without the other would look alive and leave half of the work undone.
        pacing.add_done_callback(lambda _: stop.set())
        log.info("dispatching as %s", handing_off.consumer)
        try:
            handing_off.run(stop)
        finally:
            stop.set()
        pacing.result()


def _pace(stop: threading.Event, client: Any, watch: ConfigWatch) -> None:
    pacemaker = Pacemaker(client)
    fleet_due = 0.0

    def step() -> float:
        nonlocal fleet_due
        now = clock.monotonic()
        if watch.refresh() or now >= fleet_due:
            publish_fleet(client, watch.current)
            # Again now and then: a server that lost its data needs it anew.
            fleet_due = now + 30.0
        retries.wake(client, clock.now())
        if alerts.take_due(client, clock.now()):
            # A crash right here loses no message: the scheduler asks for a delivery now and then.
            streams.append(client, MaintenanceDue("deliver"))
        return min(IDLE_TICK_S, pacemaker.tick(watch.current, streams.server_time(client)))

    every(stop, "dispatcher", client, step)


class Scheduler:
    """Announces what is due. Any number may run: each slot and each round of maintenance is announced once."""

    def __init__(self, client: Any, watch: ConfigWatch) -> None:
        self.client = client
        self.watch = watch
        self.hints = Hints()
        self._announced: set[tuple[str, str, str]] = set()
        self._rounds: dict[str, str] = {}
        self._forget_at = 0.0
        self._config_ok = False
        self._stood_still = True
        self._unserved: dict[str, float] = {}
        self._look_at = 0.0
        self._notices_at = 0.0

    def step(self) -> float:
        """Announce what is due now; return how many seconds to wait."""
        self.watch.refresh()
        self._tell_of_broken_edit()
        now = clock.now()
        if clock.monotonic() >= self._forget_at:
            # The announcements in Redis are what counts; what we remember only saves asking. A server that lost its
            # data is told again.
            self._announced.clear()
            self._rounds.clear()
            self._forget_at = clock.monotonic() + FORGET_ANNOUNCED_S
        for late in schedule.due(self.watch.current, self._announced, now):
            event = BackupDue(late.tier, late.slot, late.agent, late.fire_at)
            once = lookout.slot_announcement(late)
            streams.append_once(self.client, event, once=once, ttl_s=SLOT_TTL_S)
            self._announced.add((late.tier, late.slot, late.agent))
        if slots.waiting(self.client):
            newest = schedule.due(self.watch.current, (), now)
            slots.announce(self.client, newest, now, ttl_s=SLOT_TTL_S)
        for task, every_s in maintain.periods(self.watch.current).items():
            once = f"maintenance/{task}/{int(now // every_s)}"
            if self._rounds.get(task) != once:
                streams.append_once(self.client, MaintenanceDue(task), once=once, ttl_s=every_s * 2)
                self._rounds[task] = once
        if clock.monotonic() >= self._notices_at:
            self._notices_at = clock.monotonic() + NOTICES_LOOK_S
            notices.announce(self.client, self.watch.current.schedule, now)
        self.hints.follow(self.watch.current)
        if self.hints.due(now):
            once = f"maintenance/{guard_rounds.TASK}/hint/{int(now // HINTS_APART_S)}"
            streams.append_once(
                self.client, MaintenanceDue(guard_rounds.TASK), once=once, ttl_s=HINTS_APART_S * 2
            )
        self._tell_of_standstill(now)
        if clock.monotonic() >= self._look_at:
            self._look_at = clock.monotonic() + UNSERVED_LOOK_S
            self._tell_of_unserved_queues(now)
        return TICK_S

    def _tell_of_broken_edit(self) -> None:
        runtime = Runtime(self.watch.current, self.client)
        broken = self.watch.take_error()
        if broken is not None:
            runtime.record("config", ok=False, error=broken.message)
            title = "the configuration is broken; the last good one stays in force"
            runtime.alert("config", "critical", title, broken.message)
            self._config_ok = False
        elif self.watch.error is None and not self._config_ok:
            # Only at the change to good: another scheduler may not have read the broken files yet.
            runtime.resolve("config")
            self._config_ok = True

    def _tell_of_unserved_queues(self, now: float) -> None:
        """Alert jobs that wait where nobody works: the host of an agent is down, or its name is misspelt."""
        waiting = backpressure.lengths(self.client)
        unserved = hosts.unserved(self.client, waiting)
        self._unserved = {queue: self._unserved.get(queue, now) for queue in unserved}
        runtime = Runtime(self.watch.current, self.client)
        for queue, since in self._unserved.items():
            if now - since >= UNSERVED_AFTER_S:
                body = f"jobs waiting there: {waiting[queue]}; start `backup-worker worker` on that host"
                runtime.alert(f"unserved/{queue}", "critical", f"nobody works on the queue {queue}", body)
        for alert in alerts.open_alerts(self.client):
            kind, _, queue = alert.key.partition("/")
            if kind == "unserved" and queue not in unserved:
                runtime.resolve(alert.key)

    def _tell_of_standstill(self, now: float) -> None:
        """Alert that the watch over everything else does not run, and deliver that from here.

        All other alerts take the way of every event. If the dispatchers or the workers stand still, none arrives, and
        that nothing is said must not look as if nothing were wrong.
        """
        watched: Any = self.client.get(maintain.WATCHED_AT)
        if watched is None:
            # A new server: from now on it counts.
            self.client.set(maintain.WATCHED_AT, now, nx=True)
            return
        silent_s = now - float(watched)
        runtime = Runtime(self.watch.current, self.client)
        if silent_s > STANDSTILL_S:
            title = "the dispatchers or the workers stand still"
            body = f"nothing has looked for missing backups and stuck events for {silent_s:.0f} s"
            runtime.alert("standstill", "critical", title, body)
            maintain.run(runtime, "deliver", now=clock.now())
            self._stood_still = True
        elif self._stood_still:
            runtime.resolve("standstill")
            self._stood_still = False


def scheduler(config_dir: Path, url: str | None) -> None:
    """Announce scheduled backups and maintenance."""
    announcing = Scheduler(connection.connect(url), ConfigWatch(config_dir, check_alerts=alerts.refused_urls))
    with stopped_by_signals() as stop:
        log.info("scheduling from %s", config_dir)
        every(stop, "scheduler", announcing.client, announcing.step, absence=Absence(announcing.watch))


def worker(config_dir: Path, url: str | None, queue: str) -> None:
    """Run the jobs of one queue until SIGTERM; a running job is finished first."""
    watch = jobs.prepare(config_dir)
    # Jobs start agents, which get this address.
    os.environ["REDIS_URL"] = url or os.environ.get("REDIS_URL") or connection.DEFAULT_URL
    client = enter(url)
    # A worker that gives up while Redis is away would run a finished job again.
    client.set_retry(patience(PATIENCE_TRIES, longest_s=2.0))
    log.info("working on %s with %d agents", queue, len(watch.current.agents))
    make_worker(queue, client, jobs.report_failure).work(logging_level="WARNING")


def default_processes(config: Config, host: str) -> dict[str, int]:
    """Return how many worker processes each queue gets by default on `host`, with those of its own agents."""
    # Two for maintenance: a page must not wait behind a long scrub or drill.
    plain = {queues.RECOVERY: 2, queues.BACKUP: 2, queues.MAINTENANCE: 2}
    return plain | {queue: plain[queues.kind(queue)] for queue in hosts.queues_of(config, host)}
