"""Which failed jobs run again, and when."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis.exceptions
from rq.exceptions import AbandonedJobError
from rq.timeouts import JobTimeoutException

from backup_worker.history import HistoryUnwritable
from backup_worker.queueing import retries
from backup_worker.queueing.queues import ForeignJob
from backup_worker.queueing.retries import PAUSES_S, RUNS_OF_KILLED, is_passing, pause_before_next, wake
from em_bridge.errors import AgentBackupError, NotFound, RedisRefused, RedisUnavailable

BUSY = OSError(errno.EBUSY, "busy")


def caused_by(cause: BaseException) -> AgentBackupError:
    error = AgentBackupError("cannot be copied")
    error.__cause__ = cause
    return error


@pytest.fixture
def locked_database(tmp_path: Path) -> sqlite3.OperationalError:
    path = tmp_path / "a.db"
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(sqlite3.OperationalError) as caught:
        sqlite3.connect(path, timeout=0).execute("CREATE TABLE a (b)")
    holder.close()
    return caught.value


PASSING = [
    redis.exceptions.ConnectionError("gone"), redis.exceptions.TimeoutError("slow"), RedisUnavailable("gone"),
    HistoryUnwritable("full"), BUSY, BlockingIOError(errno.EAGAIN, "again"), OSError(errno.EMFILE, "too many"),
    caused_by(BUSY), AbandonedJobError(),
]  # fmt: skip
LASTING = [
    NotFound("no such agent"), ValueError("bad"), redis.exceptions.AuthenticationError("wrong"), RedisRefused("no"),
    ForeignJob("foreign"), OSError(errno.ENOSPC, "full"), PermissionError(errno.EACCES, "no"),
    FileNotFoundError(errno.ENOENT, "no"), caused_by(OSError(errno.ENOSPC, "full")), caused_by(ValueError("bad")),
    JobTimeoutException("hung"), sqlite3.OperationalError("no such table"), SystemError("bug"),
]  # fmt: skip


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_a_fault_that_may_mend_itself_is_tried_again(error: BaseException) -> None:
    assert is_passing(error)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_a_fault_that_would_only_come_again_is_not(error: BaseException) -> None:
    assert not is_passing(error)
    assert pause_before_next(error, len(PAUSES_S)) is None


def test_a_database_that_somebody_else_has_locked_passes(locked_database: sqlite3.OperationalError) -> None:
    assert is_passing(locked_database)


def pauses(error: BaseException, left: int = len(PAUSES_S)) -> list[float]:
    """Return the pauses of a job that fails by `error` until it fails for good."""
    found: list[float] = []
    while (pause := pause_before_next(error, left)) is not None:
        found.append(pause)
        left -= 1
        assert len(found) < 100, "for ever"
    return found


def test_the_pauses_grow_and_end() -> None:
    found = pauses(BUSY)
    assert found == sorted(set(found)) == list(PAUSES_S)
    assert found[0] > 0


def test_a_job_whose_worker_was_killed_runs_again_at_once_and_less_often() -> None:
    assert pauses(AbandonedJobError()) == [0.0] * RUNS_OF_KILLED
    assert len(PAUSES_S) > RUNS_OF_KILLED


def test_a_job_that_claims_a_million_tries_gets_no_more_than_others() -> None:
    assert pause_before_next(BUSY, 10**6) == PAUSES_S[0]
    assert pause_before_next(BUSY, -1) is None


@pytest.fixture
def client() -> Any:
    return fakeredis.FakeRedis()


def waiting(client: Any, queue: str, job_id: str, until: float, status: str = "scheduled") -> None:
    client.sadd("rq:queues", f"rq:queue:{queue}")
    client.hset(f"rq:job:{job_id}", "status", status)
    client.zadd(f"rq:scheduled:{queue}", {job_id: until})


def test_what_waited_long_enough_goes_to_its_own_queue_once(client: Any) -> None:
    waiting(client, "backup", "a", 10.0)
    waiting(client, "recovery.one", "b", 10.5)
    waiting(client, "backup", "c", 11.5)
    assert [wake(client, 9.9), wake(client, 11.0), wake(client, 11.0)] == [0, 2, 0]
    assert client.lrange("rq:queue:backup", 0, -1) == [b"a"]
    assert client.lrange("rq:queue:recovery.one", 0, -1) == [b"b"]
    assert client.hget("rq:job:a", "status") == b"queued"
    assert client.zrange("rq:scheduled:backup", 0, -1) == [b"c"]


@pytest.mark.parametrize("status", ["canceled", "finished", "queued", None])
def test_what_no_longer_waits_is_not_woken(client: Any, status: str | None) -> None:
    waiting(client, "backup", "a", 10.0, status or "scheduled")
    if status is None:
        client.delete("rq:job:a")
    assert wake(client, 11.0) == 0
    assert client.llen("rq:queue:backup") == 0
    assert client.zcard("rq:scheduled:backup") == 0


def test_many_that_are_due_at_once_are_woken_in_parts(client: Any) -> None:
    for number in range(250):
        waiting(client, "backup", f"a{number}", 10.0)
    moved = [wake(client, 11.0) for _ in range(4)]
    assert sum(moved) == 250
    assert max(moved) <= 100
    assert retries.wake(client, 12.0) == 0
