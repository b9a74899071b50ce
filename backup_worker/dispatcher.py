"""Turns every event on the streams into exactly one RQ job, or into a dead letter with the reason.

Promise: an event whose publish call returned is pending in its stream, or was handed to one job, or is a dead letter.
The hand-off of a batch is one transaction: enqueue the jobs, mark their ids as handed off, acknowledge the entries. The
marks are watched, so that of two dispatchers with the same entries only one gets through, and they outlive the events,
so that a second delivery makes no second job. A crash before the transaction repeats it; after it there is nothing left
to do. A lost reply looks like a failure here, and the marks tell on the next reading.

A stream is not read while the queue that its events go to is full; see `backpressure`.

What a dead dispatcher left pending is claimed once it has been idle for `CLAIM_IDLE_S`. An entry that was delivered
`MAX_DELIVERIES` times is a dead letter, so that one which kills its reader cannot do so for ever; one that was left
before is claimed and handed off by itself, so that it takes no other with it.

While Redis is away, loading, read-only or full the dispatcher waits and goes on. Anything else ends it, loudly.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import redis.exceptions
from rq.job import Retry
from rq.queue import EnqueueData, Queue

from backup_worker.config.schedule import Limits
from backup_worker.queueing import backpressure, due, queues, retries
from em_bridge import clock, connection, events, streams
from em_bridge.errors import AgentBackupError, InvalidEvent, RedisRefused

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger(__name__)

STREAMS = (streams.AGENT_STATE, streams.CONFIG_CHANGE, due.STREAM)
GROUP = streams.DISPATCHER_GROUP
BATCH = 100
BLOCK_MS = 1000
CLAIM_IDLE_S = 4.0
CLAIM_EVERY_S = 1.0
MAX_DELIVERIES = 5
MARK_TTL_S = 30 * 24 * 3600
"""How long a job id counts as handed off, at the least; `mark_ttl_s` has it outlive every entry."""
DUE_MARK_TTL_S = 24 * 3600
"""The same for what comes round again by itself, some thousand times a day, and does no harm if it comes twice."""
HELD_LOOK_S = 0.1
"""How often a dispatcher looks whether a queue that was full has room again."""

TIME_LIMITS_S = {
    "backup": 3600, "config_change": 3600, "agent_state": 1800, "incident": 1800, "restore": 1800, "maintenance": 3600,
}  # fmt: skip
"""How long each job function may run. A recovery copies no more than one agent's files and never waits for it."""
DELIVERY_LIMIT_S = 300
"""The same for `DELIVERIES`."""
DELIVERIES = frozenset(("deliver", "ping"))
"""The maintenance that waits for other people's servers."""
RESULT_TTL_S = 3600
FAILURE_TTL_S = 7 * 24 * 3600

_DEFAULTS = Limits()

# KEYS: the marks. ARGV: of each, its entry and its life in seconds. One command for a batch, of which the client makes,
# and reads the answers of, a hundred otherwise.
_MARK = """
for at, mark in ipairs(KEYS) do redis.call('SET', mark, ARGV[2 * at - 1], 'EX', ARGV[2 * at]) end
"""

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,255}")
"""What RQ takes as a job id."""


@dataclass(frozen=True, slots=True)
class Job:
    """What an event becomes: a function of `backup_worker.jobs`, its arguments, and the queue."""

    queue: str
    function: str
    args: Mapping[str, Any]
    id: str
    description: str


def plan(
    stream: str, entry_id: str, event: events.Event, hosts: Mapping[str, str] = MappingProxyType({})
) -> Job:
    """Return the one job that `event` becomes. Pure; raises InvalidEvent for an event nobody here handles.

    `hosts` says of agents where they are, if not everywhere.
    """
    job_id = _job_id(stream, entry_id)
    at = streams.entry_time(entry_id)
    match event:
        case events.AgentState(agent=agent, state=state):
            queue = queues.name_of(
                queues.RECOVERY if state == events.DEAD else queues.MAINTENANCE, hosts.get(agent)
            )
            args = {"agent": agent, "state": state, "reason": event.reason, "entry": entry_id, "at": at}
            return Job(queue, "agent_state", args, job_id, f"{agent} is {state}")
        case events.ConfigApplied(agent=agent, change=change):
            args = {"entry": entry_id, "type": event.type, "agent": agent, "change": change, "at": at}
            queue = queues.name_of(queues.BACKUP, hosts.get(agent))
            return Job(queue, "config_change", args, job_id, f"change {change} of {agent} applied")
        case events.ConfigProposed() | events.ConfigApproved() | events.ConfigRejected():
            args = {"entry": entry_id, "type": event.type, "change": event.change, "at": at}
            # Whose change was decided only its record knows: such a job is passed on by the worker (see `hosts`).
            queue = queues.name_of(queues.BACKUP, hosts.get(getattr(event, "agent", "")))
            return Job(queue, "config_change", args, job_id, f"{event.type} {event.change}")
        case due.BackupDue(tier=tier, slot=slot, agent=agent):
            args = {"tier": tier, "slot": slot, "agent": agent, "at": at, "attempt": event.attempt}
            name = f"{tier}_{slot}_{agent}"
            if not _JOB_ID.fullmatch(name):
                raise InvalidEvent(f"{event.type}: the tier or the slot of “{name[:80]}” cannot be one")
            # A further try is another job: the first one's name is taken by a failed one.
            job_id = job_id if event.attempt else name
            queue = queues.name_of(queues.BACKUP, hosts.get(agent))
            return Job(queue, "backup", args, job_id, f"{tier} backup of {agent}")
        case due.IncidentDue(incident=incident):
            return Job(queues.RECOVERY, "incident", {"incident": incident}, job_id, f"advance {incident}")
        case due.MaintenanceDue(task=task):
            return Job(queues.MAINTENANCE, "maintenance", {"task": task}, job_id, f"maintenance: {task}")
    raise InvalidEvent(f"{event.type}: is not handled here")


@dataclass(frozen=True, slots=True)
class Entry:
    """A stream entry in our hands: its fields as they were read, and how often it was delivered."""

    stream: str
    id: str
    fields: Mapping[bytes, bytes]
    deliveries: int = 1


class Dispatcher:
    """One reader of the streams. Any number may run side by side."""

    def __init__(
        self,
        client: Redis,
        *,
        consumer: str | None = None,
        limits: Callable[[], Limits] = lambda: _DEFAULTS,
        hosts: Callable[[], Mapping[str, str]] = lambda: MappingProxyType({}),
    ) -> None:
        self.client = client
        self.hosts = hosts
        self.limits = limits
        self.consumer = consumer or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._queues: dict[str, queues.SafeQueue] = {}
        self._next_claim = 0.0
        self._reread = False
        self._held: dict[str, str] = {}
        self._known: list[str] = list(queues.QUEUES)
        self._waiting: dict[str, int] | None = None

    def prepare(self) -> None:
        """Create the consumer group on every stream, from the beginning."""
        for stream in STREAMS:
            streams.ensure_group(self.client, stream, GROUP)

    def run(self, stop: threading.Event) -> None:
        """Dispatch until `stop` is set; Redis being away is waited out."""
        reachable = True
        pause_s = 0.2
        while not stop.is_set():
            try:
                if not reachable or self._next_claim == 0.0:
                    self.prepare()
                self.step()
                if not reachable:
                    log.info("redis is back; dispatching goes on")
                reachable, pause_s = True, 0.2
            except redis.exceptions.RedisError as error:
                if str(error).startswith("NOGROUP"):
                    # The server lost its data. The streams are new, and so must be the groups.
                    self._next_claim = 0.0
                    continue
                translated = connection.translate(error, self.client)
                if translated is None:
                    raise
                if isinstance(translated, RedisRefused):
                    raise translated from error
                if reachable:
                    log.warning("waiting: %s", translated.message)
                reachable = False
                self._reread = True
                stop.wait(pause_s)
                pause_s = min(5.0, pause_s * 2)

    def step(self, block_ms: int = BLOCK_MS) -> int:
        """Hand off what is there, waiting up to `block_ms` for something new; return how many entries."""
        if self._reread:
            # A transaction whose reply was lost: its entries are acknowledged, or still pending for us.
            self._hand_off(self._read("0", block_ms=None))
            self._reread = False
        now = clock.monotonic()
        if now >= self._next_claim:
            self._next_claim = now + CLAIM_EVERY_S
            self._known = backpressure.names(self.client)
            claimed = sum(self._hand_off(entries) for entries in self._claim())
            if claimed:
                log.info("claimed %d entries that another dispatcher left", claimed)
        open_ = self._open_streams()
        if len(open_) < len(STREAMS):
            block_ms = min(block_ms, int(HELD_LOOK_S * 1000))
        if not open_:
            clock.sleep(block_ms / 1000)
            return 0
        return self._hand_off(self._read(">", block_ms=block_ms, of=open_))

    def _open_streams(self) -> list[str]:
        """Return the streams whose events have room in their queues."""
        # The last hand-off has brought the lengths along; without one there is time to ask.
        waiting = self._waiting or backpressure.lengths(self.client, self._known)
        self._waiting = None
        held = backpressure.held(waiting, self.limits().queue_jobs)
        for stream in held.keys() - self._held.keys():
            log.warning("%s is not read: the %s queue is full", stream, held[stream])
        for stream in self._held.keys() - held.keys():
            log.info("%s is read again", stream)
        self._held = held
        return [stream for stream in STREAMS if stream not in held]

    def _read(self, position: str, *, block_ms: int | None, of: Sequence[str] = STREAMS) -> list[Entry]:
        answer: Any = self.client.xreadgroup(
            GROUP, self.consumer, dict.fromkeys(of, position), count=BATCH, block=block_ms
        )
        return [
            # No fields: it is pending for us, and somebody has removed it from the stream.
            Entry(stream.decode(), entry_id.decode(), fields or {})
            for stream, entries in answer or ()
            for entry_id, fields in entries
        ]

    def _claim(self) -> Iterator[list[Entry]]:
        """Yield what to hand off together of that which others left pending, each part claimed when it is asked for."""
        idle_ms = int(CLAIM_IDLE_S * 1000)
        with self.client.pipeline(transaction=False) as asking:
            for stream in STREAMS:
                asking.xpending_range(stream, GROUP, min="-", max="+", count=1, idle=idle_ms)
            answers = asking.execute(raise_on_error=False)
        for stream, left in zip(STREAMS, answers, strict=True):
            if isinstance(left, Exception):
                raise left
            more = bool(left)
            while more:
                pending: Any = self.client.xpending_range(
                    stream, GROUP, min="-", max="+", count=BATCH, idle=idle_ms
                )
                more = len(pending) == BATCH
                delivered = {row["message_id"]: row["times_delivered"] for row in pending}
                # Left more than once: perhaps by a reader that it killed.
                alone = [[entry_id] for entry_id, times in delivered.items() if times >= 2]
                together = [entry_id for entry_id, times in delivered.items() if times < 2]
                for ids in [together, *alone] if together else alone:
                    rows: Any = self.client.xclaim(stream, GROUP, self.consumer, idle_ms, ids)
                    yield [
                        Entry(stream, entry_id.decode(), fields, delivered[entry_id] + 1)
                        for entry_id, fields in rows
                        if fields
                    ]

    def _hand_off(self, entries: Sequence[Entry]) -> int:
        """Hand off `entries` in one transaction; return how many there were."""
        if not entries:
            return 0
        hosts = self.hosts()
        planned = [(entry, _plan(entry, hosts)) for entry in entries]
        marks = [_mark(entry, job) for entry, job in planned]
        with self.client.pipeline(transaction=True) as pipeline:
            watch: Callable[..., Any] = pipeline.watch
            while True:
                try:
                    watch(*marks)
                    seen: Any = pipeline.mget(marks)
                    pipeline.multi()
                    self._write(pipeline, planned, marks, seen)
                    backpressure.ask(pipeline, self._known)
                    self._take_answers(pipeline.execute(raise_on_error=False))
                    return len(entries)
                except redis.exceptions.WatchError:
                    # Another dispatcher handed one of these off in between: look again, and leave that one out.
                    continue

    def _take_answers(self, answers: Sequence[Any]) -> None:
        """Raise the first error of the hand-off itself; keep what it told about the queues."""
        split = len(answers) - len(self._known)
        for answer in answers[:split]:
            if isinstance(answer, Exception):
                raise answer
        self._waiting = backpressure.told(self._known, answers[split:])

    def _write(
        self,
        pipeline: Any,
        planned: Sequence[tuple[Entry, Job | str]],
        marks: Sequence[str],
        seen: Sequence[bytes | None],
    ) -> None:
        jobs: dict[str, dict[str, Job]] = {}
        limits = self.limits()
        new_marks: list[str] = []
        facts: list[str | int] = []
        for (entry, job), mark, already in zip(planned, marks, seen, strict=True):
            if already is None:
                new_marks.append(mark)
                facts += (entry.id, mark_ttl_s(job, limits))
                if isinstance(job, Job):
                    # Keyed by id: the same slot may have been announced twice within this batch.
                    jobs.setdefault(job.queue, {})[job.id] = job
                else:
                    letter = streams.dead_letter(entry.stream, entry.id, job, entry.fields, clock.now())
                    pipeline.xadd(streams.DEAD_LETTER, events.encode(letter))
                    log.warning("dead letter: %s %s: %s", entry.stream, entry.id, job)
        # Not by its hash: a script that the server does not know would fail alone, in the middle of the transaction.
        pipeline.eval(_MARK, len(new_marks), *new_marks, *facts)
        for name, batch in jobs.items():
            self._queue(name).push_many(map(rq_job, batch.values()), pipeline)
        for stream in {entry.stream for entry, _ in planned}:
            ids = [entry.id for entry, _ in planned if entry.stream == stream]
            pipeline.xack(stream, GROUP, *ids)

    def _queue(self, name: str) -> queues.SafeQueue:
        if name not in self._queues:
            self._queues[name] = queues.open_queue(name, self.client)
            # Asked for now: RQ would otherwise ask in the middle of our transaction.
            self._queues[name].get_redis_server_version()
        return self._queues[name]


def mark_ttl_s(job: Job | str, limits: Limits) -> int:
    """Return for how many seconds the hand-off of `job`, or of a dead letter, is remembered. Pure.

    A mark must outlive its entry, which may stay `log_days` and be pending before that; twice that is enough.
    """
    if isinstance(job, Job) and job.function in ("incident", "maintenance"):
        return DUE_MARK_TTL_S
    return max(MARK_TTL_S, int(limits.log_days * 2 * 24 * 3600))


def _plan(entry: Entry, hosts: Mapping[str, str]) -> Job | str:
    """Return the entry's job, or the reason why it is a dead letter."""
    if entry.deliveries > MAX_DELIVERIES:
        return f"delivered {entry.deliveries} times without being handed off"
    try:
        return plan(entry.stream, entry.id, events.decode(entry.fields, stream=entry.stream), hosts)
    except AgentBackupError as error:
        return error.message


def _mark(entry: Entry, job: Job | str) -> str:
    # A dead letter and the job of the same event share the mark: there is never both.
    return "backup:handed-off:" + (job.id if isinstance(job, Job) else _job_id(entry.stream, entry.id))


def _job_id(stream: str, entry_id: str) -> str:
    return f"{stream.removeprefix('em:')}_{entry_id}"


def time_limit_s(job: Job) -> int:
    """Return how many seconds `job` may run before it is stopped."""
    if job.args.get("task") in DELIVERIES:
        return DELIVERY_LIMIT_S
    return TIME_LIMITS_S[job.function]


def rq_job(job: Job) -> EnqueueData:
    """Return `job` as RQ's `enqueue_many` takes it."""
    pattern = _pattern(f"backup_worker.jobs.{job.function}", time_limit_s(job))
    return pattern._replace(args=[dict(job.args)], description=job.description, job_id=job.id)


@functools.cache
def _pattern(function: str, timeout_s: int) -> EnqueueData:
    return Queue.prepare_data(
        function,
        timeout=timeout_s,
        result_ttl=RESULT_TTL_S,
        failure_ttl=FAILURE_TTL_S,
        retry=Retry(max=len(retries.PAUSES_S)),
    )
