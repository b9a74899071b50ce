"""The RQ queues, locked: msgpack instead of pickle, and only this project's own functions.

Importing this module replaces RQ's default serializer for the whole process, so that no code path of RQ (its
callers may forget the `serializer` argument) can reach pickle. `SafeJob` refuses every job that names a function
outside `ALLOWED`, a method of an object, a callback or a webhook; refusing happens before anything is imported.

A job that is refused raises `ForeignJob`: RQ marks it failed, and the worker's failure handler records and alerts it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgpack
import rq.serializers
from rq.intermediate_queue import IntermediateQueue
from rq.job import UNEVALUATED, Job
from rq.queue import Queue
from rq.utils import now as rq_now

from em_bridge.errors import AgentBackupError

if TYPE_CHECKING:
    from redis import Redis

RECOVERY = "recovery"
BACKUP = "backup"
MAINTENANCE = "maintenance"
QUEUES = (RECOVERY, BACKUP, MAINTENANCE)

ALLOWED = frozenset(
    f"backup_worker.jobs.{name}"
    for name in ("backup", "config_change", "agent_state", "incident", "maintenance")
)
"""The only functions that a worker runs, by their full names."""

MAX_JOB_BYTES = 4 * 1024 * 1024
STUCK_AFTER_S = 3.0
"""How long a job may lie between queue and worker before it counts as dropped by a killed worker."""


class ForeignJob(AgentBackupError):
    """A job in our queues that is not one of ours; it was not loaded."""


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

    def restore(self, raw_data: Mapping[bytes, bytes]) -> None:
        """Take over what Redis holds of this job, except what could make a worker run or call something else."""
        super().restore(raw_data)
        self._success_callback_name = self._failure_callback_name = self._stopped_callback_name = None
        self._success_callback = self._failure_callback = self._stopped_callback = UNEVALUATED
        self.webhooks = []


class _HealedIntermediateQueue(IntermediateQueue):
    """RQ waits a minute before it believes that a job was dropped on its way to a worker; we wait seconds."""

    def should_be_cleaned_up(self, job_id: str) -> bool:
        first_seen = self.get_first_seen(job_id)
        return first_seen is not None and (rq_now() - first_seen).total_seconds() > STUCK_AFTER_S

    def remove(self, job_id: str) -> None:
        super().remove(job_id)
        # Otherwise the next time that this id is on its way, it counts as stuck at once.
        self.connection.delete(self.get_first_seen_key(job_id))


class SafeQueue(Queue):
    """A queue of `SafeJob`s in msgpack form."""

    job_class = SafeJob

    @property
    def intermediate_queue(self) -> IntermediateQueue:
        """The list that holds a job between this queue and a worker."""
        return _HealedIntermediateQueue(self.key, connection=self.connection)


def open_queue(name: str, client: Redis) -> SafeQueue:
    """Return the queue `name` (one of `QUEUES`, perhaps with `.<host>` behind it) on `client`."""
    return SafeQueue(name, connection=client, serializer=MsgpackSerializer, job_class=SafeJob)
