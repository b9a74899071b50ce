"""The RQ worker of this project: one queue a process, and a killed worker's job runs again within seconds.

Kind: RQ's forking worker. A job in a child of its own can be killed at its time limit (the in-process kind has only an
alarm, which foreign code and a hanging disk do not hear), and a crash in it does not take the worker along. A job that
does nothing takes 5 ms in-process, 14 ms in a fork and 210 ms in a new interpreter (`make bench`, “kinds”; more on a
busy machine): 9 ms for that safety are little beside a synced snapshot of 30 ms and more. The spawning kind has no
more to offer, ignores the job class, and shows the server's password in its arguments.

RQ by itself waits 90 s to 12 min before it believes that a worker is dead. Here a running job's lease is
`LEASE_S`, renewed every `MONITOR_S`, and every idle worker looks for expired leases every `MAINTENANCE_S`. If the
worker is killed but its child is not, the kernel ends the child (PR_SET_PDEATHSIG): otherwise the job would run
twice at once. What a job that fails means is decided in `FailurePolicy`: a passing fault is run again after a pause, a
lasting one is not, and the last failure is recorded and alerts.

A job that runs beyond its time limit is stopped by an alarm in its child, and fails for good; a child that the alarm
does not reach (it is stopped, or deep in foreign code) is killed `HANG_GRACE_S` later.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import redis.exceptions
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry
from rq.exceptions import AbandonedJobError, StopRequested
from rq.job import Job
from rq.queue import Queue
from rq.timeouts import JobTimeoutException
from rq.worker import Worker

from backup_worker.queueing import queues, retries
from backup_worker.running.health import Mark
from em_bridge import clock, parent
from em_bridge.errors import AgentBackupError

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger(__name__)

MONITOR_S = 1
LEASE_S = 5
MAINTENANCE_S = 1
BLOCK_S = 2
"""How long one blocking read for a job lasts: shorter than the client's socket timeout, and a worker that waits looks
for abandoned jobs in between."""

CLEAN_S = 30.0
"""How often what is neither lost nor waited for is cleaned: old results, failures that have expired, gone workers."""

HANG_GRACE_S = 5.0
"""How long behind its time limit a child that did not stop by itself is killed."""

STOPPING_TRIES = 6
"""How often a worker that is asked to stop tries to reach Redis: for about two seconds."""

_WAITED_OUT = (
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.OutOfMemoryError,
)
"""What RQ's worker must not see while there is hope: all but the first two would end it."""

Failure = Callable[[Job, BaseException], None]


def patience(tries: int, *, longest_s: float) -> Retry:
    """Return how a worker's client tries again while Redis is away, fails over or is full."""
    return Retry(ExponentialWithJitterBackoff(base=0.1, cap=longest_s), tries, supported_errors=_WAITED_OUT)


class BackupWorker(Worker):
    """An RQ worker that is told of failures through `exception_handlers`; see `make_worker`."""

    queue_class = queues.SafeQueue
    job_class = queues.SafeJob
    _mark: Mark | None = None
    _look_at = _clean_at = 0.0
    _overran: str | None = None
    """The job whose child was killed because it did not stop at its time limit."""

    @property
    def dequeue_timeout(self) -> int:
        """Seconds that one blocking read lasts."""
        return BLOCK_S

    def get_heartbeat_ttl(self, job: Job) -> int:
        """Return how many seconds a running job is ours without a renewal."""
        return LEASE_S

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """Renew RQ's mark of this worker, and that of the part."""
        super().heartbeat(timeout, pipeline)
        if pipeline is None:
            if self._mark is None:
                self._mark = Mark(self.connection, "worker")
            self._mark.renew()

    @property
    def should_run_maintenance_tasks(self) -> bool:
        """Whether it is time to look for what killed workers left."""
        return clock.monotonic() >= self._look_at

    def run_maintenance_tasks(self) -> None:
        """Put back what killed workers left; now and then do all that RQ does here, which asks three times as much."""
        now = clock.monotonic()
        self._look_at = now + MAINTENANCE_S
        if now >= self._clean_at:
            self._clean_at = now + CLEAN_S
            clean_all: Any = super().run_maintenance_tasks
            clean_all()
            return
        for queue in self.queues:
            if queue.acquire_maintenance_lock():
                queue.started_job_registry.cleanup(exception_handlers=self._exc_handlers)
                queue.intermediate_queue.cleanup(self, queue)
                release: Any = queue.release_maintenance_lock
                release()

    def request_stop(self, signum: Any, frame: Any) -> None:
        """Stop when the running job has ended; from now on nobody waits long for a Redis that is away."""
        self._be_patient(STOPPING_TRIES)
        stop: Any = super().request_stop
        stop(signum, frame)

    def teardown(self) -> None:
        """Sign off; a Redis that is gone as well is not waited for."""
        self._be_patient(0)
        sign_off: Any = super().teardown
        with contextlib.suppress(redis.exceptions.ConnectionError, redis.exceptions.TimeoutError):
            sign_off()

    def maintain_heartbeats(self, job: Job) -> None:
        """Renew the lease of the running job, RQ's mark of this worker, and that of the part."""
        limit_s = job.timeout
        if limit_s and limit_s > 0 and self.current_job_working_time > limit_s + HANG_GRACE_S:
            log.warning("job %s did not stop at its time limit; killing it", job.id)
            self._overran = job.id
            self.kill_horse()
            return
        try:
            super().maintain_heartbeats(job)
            self.heartbeat()
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError):
            if not self._stop_requested:
                raise
            log.warning("stopping, and redis is gone: job %s is left to be run again", job.id)
            self.kill_horse()
            self.wait_for_horse()
            raise StopRequested from None

    def _be_patient(self, tries: int) -> None:
        self.connection.set_retry(patience(tries, longest_s=0.5))

    def handle_job_failure(
        self, job: Job, queue: Queue, started_job_registry: Any = None, exc_string: str = ""
    ) -> None:
        """Do RQ's bookkeeping of a failure, and have the failure judged also where RQ asks nobody.

        RQ asks its exception handlers in the child, about what was raised there. A child that was killed (by the
        kernel for its memory, or by us for hanging) is seen by the parent, which would fail its job in silence.
        """
        if not self.is_horse:
            if self._stopped_job_id == job.id:
                job.retries_left = 0
            error: BaseException = AbandonedJobError(exc_string.strip(" ;"))
            if self._overran == job.id:
                error = JobTimeoutException(f"it did not stop at its time limit of {job.timeout} s")
                self._overran = None
            for judge in self._exc_handlers:
                judge(job, type(error), error, None)
        super().handle_job_failure(job, queue, started_job_registry, exc_string)

    def main_work_horse(self, job: Job, queue: Queue) -> None:
        """Run the job in the child that was forked for it; does not return."""
        assert self.pid is not None, "RQ notes it when it makes a worker"
        parent.bind(self.pid, signal.SIGKILL)
        super().main_work_horse(job, queue)

    def handle_exception(self, job: Job, *exc_info: Any) -> None:
        """Have a failed job judged. Of an error that was raised on purpose, the policy's one line says it all."""
        if isinstance(exc_info[1], AgentBackupError):
            for handler in self._exc_handlers:
                handler(job, *exc_info)
        else:
            super().handle_exception(job, *exc_info)


class FailurePolicy:
    """RQ's exception handler: says whether and when a failed job runs again, and tells `on_last` of one that does not.

    The rules are in `backup_worker.queueing.retries`.
    """

    def __init__(self, on_last: Failure) -> None:
        self.on_last = on_last

    def __call__(
        self, job: Job, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> bool:
        """Decide; always returns True, so that RQ goes on with its own bookkeeping."""
        # Whatever somebody wrote there, it is not more than a job of ours gets.
        job.retries_left = min(job.retries_left or 0, len(retries.PAUSES_S))
        pause_s = retries.pause_before_next(error, job.retries_left)
        if pause_s is None:
            job.retries_left = 0
            log.error("job %s failed: %s: %s", job.id, kind.__name__, error)
            self.on_last(job, error)
        else:
            if isinstance(job, queues.SafeJob):
                job.pause_s = pause_s
            log.warning("job %s failed and runs again in %.0f s: %s", job.id, pause_s, error)
        return True


def make_worker(
    queue: str, client: Redis, on_last_failure: Failure, *, name: str | None = None
) -> BackupWorker:
    """Return a worker of the one queue `queue`."""
    return BackupWorker(
        [queues.open_queue(queue, client)],
        name=name,
        connection=client,
        serializer=queues.MsgpackSerializer,
        exception_handlers=[FailurePolicy(on_last_failure)],
        job_monitoring_interval=MONITOR_S,
        worker_ttl=60,
        log_job_description=False,
    )
