"""The RQ queues, locked: msgpack instead of pickle, and only this project's own functions.

Importing this module replaces RQ's default serializer for the whole process, so that no code path of RQ (its
callers may forget the `serializer` argument) can reach pickle. `SafeJob` refuses every job that names a function
outside `ALLOWED`, a method of an object, a callback or a webhook; refusing happens before anything is imported.

A job that is refused raises `ForeignJob`: RQ marks it failed, and the worker's failure handler records and alerts it.
What cannot even be read as a job is dropped with a line in the log: it must not bring down one worker after another.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgpack
import redis.exceptions
import rq.serializers
from rq.exceptions import DeserializationError, NoSuchJobError
from rq.intermediate_queue import IntermediateQueue
from rq.job import UNEVALUATED, Job, JobStatus
from rq.queue import Queue
from rq.utils import now as rq_now
from rq.utils import utcformat

from em_bridge import clock
from em_bridge.errors import AgentBackupError
from em_bridge.scripts import Script

if TYPE_CHECKING:
    from redis import Redis
    from rq.queue import EnqueueData
    from rq.worker import BaseWorker

log = logging.getLogger(__name__)

RECOVERY = "recovery"
BACKUP = "backup"
MAINTENANCE = "maintenance"
QUEUES = (RECOVERY, BACKUP, MAINTENANCE)
OF_A_HOST = (RECOVERY, BACKUP)
"""The kinds of queues that a host may have for itself: jobs that touch an agent's files or its process."""

ALLOWED = frozenset(
    f"backup_worker.jobs.{name}"
    for name in ("backup", "config_change", "agent_state", "incident", "restore", "maintenance")
)
"""The only functions that a worker runs, by their full names."""

MAX_JOB_BYTES = 4 * 1024 * 1024
STUCK_AFTER_S = 3.0
"""How long a job may lie between queue and worker before it counts as dropped by a killed worker."""

SEEN_TTL_S = 10
"""How long it is remembered that a job was seen there: soon forgotten, because the same id may come that way again."""

_FIELDS_OF_ONE_JOB = frozenset({"created_at", "enqueued_at", "description", "data"})

MAINTENANCE_LOCK_S = 10
"""How long a worker killed in the middle of cleaning a queue keeps the others from it; RQ would have it 15 minutes."""


class ForeignJob(AgentBackupError, DeserializationError):
    """A job in our queues that is not one of ours; it was not loaded. RQ takes it as a job that it cannot read."""


class MsgpackSerializer:
    """RQ's serializer interface over msgpack, bounded in size."""

    @staticmethod
    def dumps(obj: Any) -> bytes:
        """Return `obj` (maps, lists, text, bytes, numbers, booleans, None) as msgpack."""
        return bytes(msgpack.packb(obj, use_bin_type=True))

    @staticmethod
    def loads(data: bytes) -> Any:
        """Return the object in `data`; raises ValueError if it is too large or not msgpack."""
        if len(data) > MAX_JOB_BYTES:
            raise ValueError(f"{len(data)} bytes are more than a job may have")
        return msgpack.unpackb(data, raw=False, strict_map_key=False)


for _name in ("DefaultSerializer", "PickleSerializer"):
    setattr(rq.serializers, _name, MsgpackSerializer)
rq.serializers.SERIALIZER_ALIASES["pickle"] = MsgpackSerializer


class SafeJob(Job):
    """A job that can only be one of `ALLOWED`, without callbacks and webhooks."""

    pause_s = 0.0
    """How long to wait before it runs again, if its failure asks for that."""

    def retry(self, queue: Queue, pipeline: Any) -> None:
        """Put the failed job back, at once or behind `pause_s`; see `backup_worker.queueing.retries`."""
        if not self.pause_s:
            super().retry(queue, pipeline)
            return
        assert self.retries_left
        self.retries_left -= 1
        self.set_status(JobStatus.SCHEDULED, pipeline=pipeline)
        pipeline.hset(self.key, "retries_left", self.retries_left)
        pipeline.zadd(f"rq:scheduled:{queue.name}", {self.id: clock.now() + self.pause_s})

    @classmethod
    def fetch(cls, id: str, connection: Redis | None = None, serializer: Any = None) -> Job:
        """Return the job `id`; raises NoSuchJobError also for what is no job at all."""
        try:
            return super().fetch(id, connection=connection, serializer=serializer)
        except (ValueError, redis.exceptions.ResponseError) as error:
            # Anything else than NoSuchJobError ends RQ's worker, and the next one would meet the same job again.
            log.error("%.80r in our queues is no job: %s", id, error)
            raise NoSuchJobError(f"{id!r} is no job") from error

    def restore(self, raw_data: Mapping[bytes, bytes]) -> None:
        """Take over what Redis holds of this job, except what could make a worker run or call something else."""
        try:
            # RQ unpacks what it finds there without a limit, once more what was unpacked here, and an `exc_info` that
            # only an RQ before streams has written.
            fields = {name: value for name, value in raw_data.items() if name != b"exc_info"}
            super().restore(fields | {b"data": b""} if b"data" in fields else fields)
            self.data = _unpacked(fields[b"data"])
        except NoSuchJobError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever somebody wrote there, it is judged as a job of theirs
            log.error("job %s cannot be read: %s", self.id, error)
            self.data, self.retries_left = b"", None
        self._success_callback_name = self._failure_callback_name = self._stopped_callback_name = None
        self._success_callback = self._failure_callback = self._stopped_callback = UNEVALUATED
        self.webhooks = []

    def _deserialize_data(self) -> None:
        try:
            name, instance, args, kwargs = MsgpackSerializer.loads(self.data)
        except Exception as error:
            raise ForeignJob(f"job “{self.id}” is not in msgpack form, so it is not ours") from error
        if not isinstance(name, str) or name not in ALLOWED:
            raise ForeignJob(
                f"job “{self.id}” names “{str(name)[:80]}”, which is not one of this project's job functions",
                hint="somebody else writes into this Redis: give it a password and an ACL",
            )
        if instance is not None or not isinstance(args, list) or not isinstance(kwargs, dict):
            raise ForeignJob(f"job “{self.id}” does not have the form of our jobs")
        self._func_name, self._instance, self._args, self._kwargs = name, None, args, kwargs


def _unpacked(data: bytes) -> bytes:
    """Return a job's data as they were before RQ has packed them, but never more than `MAX_JOB_BYTES`."""
    inflating = zlib.decompressobj()
    try:
        plain = inflating.decompress(data, MAX_JOB_BYTES)
    except zlib.error:
        return data
    if inflating.unconsumed_tail:
        raise ValueError(f"its data are more than {MAX_JOB_BYTES} bytes")
    return plain


# A job that has ended, or waits in the queue again, only left its trace here.
_PUT_BACK = Script("""
if redis.call('LREM', KEYS[1], 1, ARGV[1]) == 0 then return 0 end
redis.call('DEL', KEYS[3])
local status = redis.call('HGET', KEYS[4], 'status')
if status == 'finished' or status == 'failed' or status == 'stopped' then return 0 end
if redis.call('LPOS', KEYS[2], ARGV[1]) then return 0 end
redis.call('LPUSH', KEYS[2], ARGV[1])
return 1
""")


class _HealedIntermediateQueue(IntermediateQueue):
    """Where a job lies between the queue and a worker. One dropped there by a killed worker goes back into the queue.

    RQ waits a minute before it believes that, and then counts it as a failure of the job, which never began.
    """

    def get_job_ids(self) -> list[str]:
        """Return the ids of what lies here; what is no text comes back as an id that does not exist."""
        found: Any = self.connection.lrange(self.key, 0, -1)
        return [raw.decode(errors="replace") for raw in found]

    def cleanup(self, worker: BaseWorker, queue: Queue) -> None:
        """Put back what lies here for longer than `STUCK_AFTER_S` and that nobody runs."""
        found = self.get_job_ids()
        running = set(queue.started_job_registry.get_job_ids(cleanup=False)) if found else ()
        for job_id in found:
            if job_id in running:
                continue
            try:
                SafeJob.fetch(job_id, connection=self.connection)
            except NoSuchJobError:
                self.remove(job_id)
                continue
            if not self.set_first_seen(job_id) and self._is_stuck(job_id):
                keys = (self.key, queue.key, self.get_first_seen_key(job_id), Job.key_for(job_id))
                if _PUT_BACK(self.connection, keys, (job_id,)):
                    log.warning("job %s was dropped on its way to a worker; it is back in its queue", job_id)

    def set_first_seen(self, job_id: str) -> bool:
        """Note that the job was seen here; return whether that is news."""
        key = self.get_first_seen_key(job_id)
        return bool(self.connection.set(key, rq_now().timestamp(), nx=True, ex=SEEN_TTL_S))

    def _is_stuck(self, job_id: str) -> bool:
        first_seen = self.get_first_seen(job_id)
        return first_seen is not None and (rq_now() - first_seen).total_seconds() > STUCK_AFTER_S


class SafeQueue(Queue):
    """A queue of `SafeJob`s in msgpack form."""

    job_class = SafeJob

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fields_alike: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    @classmethod
    def lmove(cls, connection: Redis, queue_key: str, timeout: int | None) -> Any:
        """Take the next job, as RQ does. A read that ended because the server became a replica is one that was cut."""
        try:
            return super().lmove(connection, queue_key, timeout)
        except redis.exceptions.ResponseError as error:
            if str(error).startswith("UNBLOCKED"):
                raise redis.exceptions.ConnectionError(str(error)) from error
            raise

    @property
    def intermediate_queue(self) -> IntermediateQueue:
        """The list that holds a job between this queue and a worker."""
        return _HealedIntermediateQueue(self.key, connection=self.connection)

    def push_many(self, wanted: Iterable[EnqueueData], pipeline: Any) -> None:
        """Queue plain jobs (no dependencies, no callbacks) through `pipeline`, in half the time of `enqueue_many`.

        RQ makes an object, three commands and thirty fields for each. Most of the fields are alike in all jobs of one
        function: RQ is asked for them once, and each job is one command, its id in the queue a part of another.
        """
        pipeline.sadd(self.redis_queues_keys, self.key)
        at = utcformat(rq_now())
        ids = []
        for data in wanted:
            # RQ compresses it, which costs more than it saves with so little, and reads it either way.
            call = MsgpackSerializer.dumps((data.func, None, data.args, {}))
            own = ("created_at", at, "enqueued_at", at, "description", data.description, "data", call)
            pipeline.execute_command("HSET", Job.key_for(data.job_id), *own, *self._alike(data))
            ids.append(data.job_id)
        pipeline.rpush(self.key, *ids)

    def _alike(self, data: EnqueueData) -> tuple[Any, ...]:
        """Return the fields, as RQ writes them, that the job shares with others of its function and limits."""
        retries_left = data.retry.max if data.retry else None
        key = (data.func, data.timeout, data.result_ttl, data.failure_ttl, retries_left)
        if key not in self._fields_alike:
            job = self.create_job(
                data.func,
                timeout=data.timeout,
                result_ttl=data.result_ttl,
                failure_ttl=data.failure_ttl,
                retry=data.retry,
            )
            self._prepare_for_queue(job)
            fields = job.to_dict()
            shared = [name for name in fields if name not in _FIELDS_OF_ONE_JOB]
            self._fields_alike[key] = tuple(part for name in shared for part in (name, fields[name]))
        return self._fields_alike[key]

    def acquire_maintenance_lock(self) -> bool:
        """Return whether this worker may clean the queue now; nobody else does for `MAINTENANCE_LOCK_S`."""
        return bool(self.connection.set(self.registry_cleaning_key, 1, nx=True, ex=MAINTENANCE_LOCK_S))


def kind(name: str) -> str:
    """Return which of `QUEUES` the queue `name` is, whatever host it belongs to."""
    return name.partition(".")[0]


def name_of(kind: str, host: str | None) -> str:
    """Return the name of the queue `kind` of `host`, or of all hosts."""
    return f"{kind}.{host}" if host and kind in OF_A_HOST else kind


def open_queue(name: str, client: Redis) -> SafeQueue:
    """Return the queue `name` (one of `QUEUES`, perhaps with `.<host>` behind it) on `client`."""
    return SafeQueue(name, connection=client, serializer=MsgpackSerializer, job_class=SafeJob)
