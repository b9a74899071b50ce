"""RQ workers that are killed, and jobs that somebody else has put into our queues."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import socket
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import psutil
import pytest
from redis import Redis
from rq.job import JobStatus

from backup_worker import alerts, backups, jobs
from backup_worker import worker as worker_module
from backup_worker.dispatcher import Job as Planned
from backup_worker.dispatcher import rq_job
from backup_worker.queueing import queues, retries
from backup_worker.worker import BackupWorker, make_worker
from em_bridge.connection import connect
from tests.integration.conftest import ValkeyServer
from tests.integration.parts import Part
from tests.small_fleet import SmallFleet, until

pytestmark = pytest.mark.valkey

SLOT = "2026-11-23"


@pytest.fixture
def fleet(tmp_path: Path) -> SmallFleet:
    return SmallFleet(tmp_path)


def backup_of(agent: str, *, queue: str = queues.BACKUP) -> Planned:
    args = {"tier": "daily", "slot": SLOT, "agent": agent, "at": 0.0}
    return Planned(queue, "backup", args, f"daily_{SLOT}_{agent}", f"daily backup of {agent}")


def enqueue(client: Redis, job: Planned) -> str:
    queues.open_queue(job.queue, client).enqueue_many([rq_job(job)])
    return job.id


def status(client: Redis, job_id: str) -> str | None:
    raw: Any = client.hget(f"rq:job:{job_id}", "status")
    return raw.decode() if raw else None


def work_off(valkey: ValkeyServer, fleet: SmallFleet, queue: str = queues.BACKUP) -> BackupWorker:
    """Run what is in the queue in this process, as the worker does; the jobs run in its children."""
    jobs.prepare(fleet.config_dir)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    worker = make_worker(queue, connect(valkey.url), jobs.report_failure)
    try:
        worker.work(burst=True, logging_level="WARNING")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return worker


def start_worker(parts: list[Part], valkey: ValkeyServer, fleet: SmallFleet) -> Part:
    words = ("worker", "--queue", "backup", "--processes", "1")
    part = Part(fleet.folder, *words, "--config", str(fleet.config_dir), "--redis-url", valkey.url)
    parts.append(part)
    part.says("working on backup")
    return part


def child_of(parts: list[Part]) -> tuple[Part, psutil.Process]:
    """Wait until one of the workers runs a job, and return it with its child."""

    def found() -> Any:
        return next(((part, below[0]) for part in parts if (below := part.family())), None)

    answer: tuple[Part, psutil.Process] = until(found)
    return answer


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def failures(client: Redis) -> list[str]:
    return [alert.key for alert in alerts.open_alerts(client)]


def test_a_job_is_run_and_is_on_the_record_once(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet
) -> None:
    for _ in range(2):
        enqueue(client, backup_of("z"))
        work_off(valkey, fleet)
    assert fleet.snapshots == [f"daily/{SLOT}/z"]
    assert len(fleet.history("backup")) == 1


def test_a_job_whose_worker_and_child_are_killed_runs_again_within_ten_seconds(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet, parts: list[Part]
) -> None:
    workers = [start_worker(parts, valkey, fleet) for _ in range(2)]
    with fleet.repository.lock("take.daily.z"):
        enqueue(client, backup_of("z"))
        busy, child = child_of(workers)
        until(lambda: status(client, f"daily_{SLOT}_z") == "started")
        busy.process.kill()
        child.kill()
        killed_at = time.monotonic()
        other = next(worker for worker in workers if worker is not busy)
        until(other.family, 12)
        assert time.monotonic() - killed_at < 10
    until(lambda: status(client, f"daily_{SLOT}_z") == "finished")
    assert fleet.snapshots == [f"daily/{SLOT}/z"]
    assert len(fleet.history("backup")) == 1


def test_the_child_of_a_killed_worker_dies_with_it(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet, parts: list[Part]
) -> None:
    worker = start_worker(parts, valkey, fleet)
    with fleet.repository.lock("take.daily.z"):
        enqueue(client, backup_of("z"))
        _, child = child_of([worker])
        # Not before the child has left the few instructions in which it may still be the worker's copy.
        until(lambda: status(client, f"daily_{SLOT}_z") == "started")
        worker.process.kill()
        worker.process.wait()
        until(lambda: has_ended(child), 2)


def test_sigterm_lets_the_running_job_finish(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet, parts: list[Part]
) -> None:
    worker = start_worker(parts, valkey, fleet)
    with fleet.repository.lock("take.daily.z"):
        enqueue(client, backup_of("z"))
        child_of([worker])
        worker.process.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        assert worker.process.poll() is None
        assert fleet.snapshots == []
    assert worker.process.wait(10) == 0
    assert fleet.snapshots == [f"daily/{SLOT}/z"]
    assert status(client, f"daily_{SLOT}_z") == "finished"


def test_a_worker_that_is_stopped_while_its_server_is_gone_does_not_wait_for_it(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet, parts: list[Part]
) -> None:
    # As when everything is stopped at once: its child would try to reach the server for minutes.
    worker = start_worker(parts, valkey, fleet)
    with fleet.repository.lock("take.daily.z"):
        enqueue(client, backup_of("z"))
        _, child = child_of([worker])
        until(lambda: status(client, f"daily_{SLOT}_z") == "started")
        worker.process.send_signal(signal.SIGTERM)
        valkey.kill()
        assert worker.process.wait(10) == 0
        assert has_ended(child)
    valkey.start()
    start_worker(parts, valkey, fleet)
    until(lambda: status(client, f"daily_{SLOT}_z") == "finished", 12)


def test_a_job_whose_children_are_killed_again_and_again_fails_loudly(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet, parts: list[Part]
) -> None:
    # RQ asks no exception handler about a child that was killed: its job would fail in silence.
    worker = start_worker(parts, valkey, fleet)
    seen: set[int] = set()

    def next_child() -> psutil.Process | None:
        fresh = [one for one in worker.family() if one.pid not in seen]
        return fresh[0] if fresh else None

    with fleet.repository.lock("take.daily.z"):
        enqueue(client, backup_of("z"))
        for _ in range(4):
            child = until(next_child)
            seen.add(child.pid)
            child.kill()
        until(lambda: status(client, f"daily_{SLOT}_z") == "failed")
    assert failures(client) == ["failed/daily/z"]
    (line,) = fleet.history("backup-failed")
    assert (line["agent"], line["tier"]) == ("z", "daily")
    assert "signal 9" in line["error"]
    assert worker.process.poll() is None


def test_a_lasting_error_is_told_at_once_and_not_tried_again(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet
) -> None:
    job_id = enqueue(client, backup_of("nobody"))
    work_off(valkey, fleet)
    assert status(client, job_id) == "failed"
    (line,) = fleet.history("backup-failed")
    assert "nobody" in line["error"]
    assert failures(client) == ["failed/daily/nobody"]


def test_an_expected_failure_is_one_line_in_the_log(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet, parts: list[Part]
) -> None:
    part = start_worker(parts, valkey, fleet)
    job_id = enqueue(client, backup_of("nobody"))
    until(lambda: status(client, job_id) == "failed")
    part.says("there is no agent “nobody”")
    assert "Traceback" not in part.log


def waits_until(client: Redis) -> float:
    """Return when the only job that waits for its next try gets it."""
    rows: Any = client.zrange("rq:scheduled:backup", 0, -1, withscores=True)
    ((_, due_at),) = rows
    return float(due_at)


class Busy:
    """While the file is there, no snapshot can be taken; each try leaves its time in it."""

    def __init__(self, fleet: SmallFleet, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = fleet.folder / "busy"
        self.path.touch()
        take_snapshot = backups.take_snapshot

        def take(*args: Any, **options: Any) -> Any:
            if self.path.exists():
                with self.path.open("a") as file:
                    file.write("x")
                raise OSError(errno.EBUSY, "somebody else uses it")
            return take_snapshot(*args, **options)

        monkeypatch.setattr(backups, "take_snapshot", take)

    @property
    def tries(self) -> int:
        return len(self.path.read_text())


def test_a_passing_fault_waits_without_a_worker_and_the_job_succeeds_when_it_has_passed(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = Busy(fleet, monkeypatch)
    job_id = enqueue(client, backup_of("z"))
    began = time.time()
    work_off(valkey, fleet)
    assert (status(client, job_id), busy.tries) == ("scheduled", 1)
    work_off(valkey, fleet)
    assert (retries.wake(client, began), busy.tries) == (0, 1)
    due_at = waits_until(client)
    assert retries.PAUSES_S[0] <= due_at - began < retries.PAUSES_S[0] + 5
    busy.path.unlink()
    assert retries.wake(client, due_at) == 1
    work_off(valkey, fleet)
    assert status(client, job_id) == "finished"
    assert fleet.snapshots == [f"daily/{SLOT}/z"]
    assert failures(client) == []


def test_a_passing_fault_that_does_not_pass_is_tried_a_bounded_number_of_times_and_told_once(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = Busy(fleet, monkeypatch)
    job_id = enqueue(client, backup_of("z"))
    pauses = []
    work_off(valkey, fleet)
    while status(client, job_id) == "scheduled":
        due_at = waits_until(client)
        pauses.append(due_at - time.time())
        assert failures(client) == []
        retries.wake(client, due_at)
        work_off(valkey, fleet)
    assert status(client, job_id) == "failed"
    assert busy.tries == len(pauses) + 1 == len(retries.PAUSES_S) + 1
    assert pauses == sorted(pauses)
    assert failures(client) == ["failed/daily/z"]
    assert len(fleet.history("backup-failed")) == 1


def test_a_dispatcher_wakes_a_job_whose_pause_has_ended(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet, parts: list[Part]
) -> None:
    words = ("dispatcher", "--config", str(fleet.config_dir), "--redis-url", valkey.url)
    parts.append(Part(fleet.folder, *words))
    job_id = enqueue(client, backup_of("z"))
    client.lpop("rq:queue:backup")
    client.hset(f"rq:job:{job_id}", "status", "scheduled")
    client.zadd("rq:scheduled:backup", {job_id: time.time() + 0.5})
    until(lambda: client.lrange("rq:queue:backup", 0, -1) == [job_id.encode()])


def test_a_job_that_hangs_is_stopped_at_its_time_limit_and_told(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet
) -> None:
    ours = packed("backup_worker.jobs.backup", {"tier": "daily", "slot": SLOT, "agent": "z"})
    with fleet.repository.lock("take.daily.z"):
        plant(client, ours, {"timeout": "1", "retries_left": "3"})
        work_off(valkey, fleet)
    assert status(client, "planted") == "failed"
    assert failures(client) == ["failed/daily/z"]


def test_a_job_that_no_alarm_reaches_is_killed_behind_its_time_limit_and_not_run_again(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "HANG_GRACE_S", 0.5)
    ours = packed("backup_worker.jobs.backup", {"tier": "daily", "slot": SLOT, "agent": "z"})
    frozen: list[int] = []
    others = set(psutil.Process().children())

    def freeze() -> None:
        until(lambda: status(client, "planted") == "started")
        (child,) = set(psutil.Process().children()) - others
        child.suspend()
        frozen.append(child.pid)

    with fleet.repository.lock("take.daily.z"):
        plant(client, ours, {"timeout": "1", "retries_left": "3"})
        freezing = threading.Thread(target=freeze)
        freezing.start()
        work_off(valkey, fleet)
        freezing.join()
    assert len(frozen) == 1
    assert status(client, "planted") == "failed"
    (line,) = fleet.history("backup-failed")
    assert "did not stop at its time limit of 1 s" in line["error"]
    assert failures(client) == ["failed/daily/z"]


def plant(client: Redis, data: bytes, fields: dict[Any, Any], job_id: str = "planted") -> str:
    """Put a job into the backup queue as somebody would who can write into this Redis."""
    values: dict[str, Any] = {"data": data, "origin": "backup", "created_at": "2026-11-23T10:00:00.000000Z"}
    client.hset(f"rq:job:{job_id}", mapping=values | {"status": "queued", "timeout": "60"} | fields)
    client.rpush("rq:queue:backup", job_id)
    return job_id


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def packed(function: str, *args: Any) -> bytes:
    return queues.MsgpackSerializer.dumps((function, None, list(args), {}))


def test_states_of_an_agent_that_is_not_configured_are_one_alert_however_often_they_come(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet
) -> None:
    # An EM that watches more agents than are backed up says so with every state it publishes.
    for turn, state in enumerate(["ALIVE", "DEAD", "ALIVE"]):
        args = {"agent": "moe", "state": state, "reason": "", "at": float(turn)}
        enqueue(client, Planned(queues.MAINTENANCE, "agent_state", args, f"agent-state_{turn}-0", "moe"))
    work_off(valkey, fleet, queues.MAINTENANCE)
    (alert,) = alerts.open_alerts(client)
    assert (alert.key, alert.count) == ("job/agent_state/moe", 3)


@pytest.mark.parametrize("case", ["os.system", "pickle", "meta", "garbage", "fields", "method", "zip bomb"])
def test_a_foreign_job_is_failed_recorded_and_alerted_without_being_loaded(
    case: str, valkey: ValkeyServer, client: Redis, fleet: SmallFleet
) -> None:
    trace = fleet.folder / "executed"
    bomb = pickle.dumps(Bomb(trace))
    ours = packed("backup_worker.jobs.backup", {"tier": "daily", "slot": SLOT, "agent": "nobody"})
    cases: dict[str, tuple[bytes, dict[Any, Any]]] = {
        "os.system": (packed("os.system", f"touch {trace}"), {}),
        "pickle": (bomb, {}),
        "meta": (packed("backup_worker.jobs.prepare", "x"), {"meta": bomb, "result": bomb, "exc_info": bomb}),
        "garbage": (b"\xc1\xff\x00", {}),
        "fields": (ours, {"status": "dancing", "timeout": "soon", b"\xff": b"\xff", "retries_left": "x"}),
        "method": (
            queues.MsgpackSerializer.dumps(("backup_worker.jobs.backup", "x", [str(trace)], {})),
            {},
        ),
        "zip bomb": (zlib.compress(bytes(queues.MAX_JOB_BYTES * 4)), {}),
    }
    plant(client, *cases[case])
    enqueue(client, backup_of("z"))
    work_off(valkey, fleet)
    assert not trace.exists()
    assert status(client, "planted") == "failed"
    (line,) = fleet.history("job-failed")
    assert line["job"] == "planted"
    assert failures(client) == ["job/planted"]
    assert fleet.snapshots == [f"daily/{SLOT}/z"]  # the worker went on


def test_a_foreign_callback_or_webhook_on_a_job_of_ours_is_not_called(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet
) -> None:
    ours = packed("backup_worker.jobs.backup", {"tier": "daily", "slot": SLOT, "agent": "z"})
    with socket.create_server(("127.0.0.1", 0)) as ear:
        ear.settimeout(0.3)
        url = f"http://127.0.0.1:{ear.getsockname()[1]}/"
        hook = f'[{{"url": "{url}", "job_status": "finished"}}, {{"url": "{url}", "job_status": "failed"}}]'
        names = {
            f"{when}_callback_name": "tests.integration.test_worker.leave_trace"
            for when in ("success", "failure", "stopped")
        }
        plant(client, ours, names | {"webhooks": hook})
        plant(client, packed("os.system", "true"), names | {"webhooks": hook}, "other")
        os.environ["LEFT_TRACE"] = str(fleet.folder / "trace")
        work_off(valkey, fleet)
        with pytest.raises(TimeoutError):
            ear.accept()
    assert not (fleet.folder / "trace").exists()
    assert (status(client, "planted"), status(client, "other")) == ("finished", "failed")


def leave_trace(*_: Any) -> None:
    Path(os.environ["LEFT_TRACE"]).touch()


@pytest.mark.parametrize("case", ["bad id", "not text", "wrong type", "no data"])
def test_what_is_no_job_at_all_does_not_stop_the_workers(
    case: str, valkey: ValkeyServer, client: Redis, fleet: SmallFleet
) -> None:
    # An unforeseen error while a job is fetched ends RQ's worker, and the next one meets the same job again.
    if case == "wrong type":
        client.set("rq:job:odd", "text")
    elif case == "no data":
        client.hset("rq:job:odd", "status", "queued")
    client.rpush("rq:queue:backup", {"bad id": b"a b:c", "not text": b"\xff\xfe"}.get(case, b"odd"))
    enqueue(client, backup_of("z"))
    for _ in range(2):
        work_off(valkey, fleet)
    assert fleet.snapshots == [f"daily/{SLOT}/z"]


def test_a_job_dropped_between_queue_and_worker_is_put_back_and_costs_it_nothing(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet, parts: list[Part]
) -> None:
    job_id = enqueue(client, backup_of("z"))
    # What a worker leaves behind that is killed right behind its BLMOVE.
    client.lmove("rq:queue:backup", "rq:queue:backup:intermediate")
    client.hset(f"rq:job:{job_id}", "retries_left", 0)
    start_worker(parts, valkey, fleet)
    until(lambda: status(client, job_id) == "finished", 10)
    assert client.llen("rq:queue:backup:intermediate") == 0


def test_a_worker_killed_while_it_cleans_does_not_stop_the_cleaning(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet
) -> None:
    # RQ's lock would keep everybody from it for 15 minutes.
    queue = queues.open_queue(queues.BACKUP, client)
    assert queue.acquire_maintenance_lock()
    assert not queue.acquire_maintenance_lock()
    assert 0 < client.ttl(queue.registry_cleaning_key) <= 10


def test_a_busy_worker_outlives_a_server_that_is_killed_and_restarted(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet, parts: list[Part]
) -> None:
    worker = start_worker(parts, valkey, fleet)
    with fleet.repository.lock("take.daily.z"):
        job_id = enqueue(client, backup_of("z"))
        child_of([worker])
        until(lambda: status(client, job_id) == "started")
        valkey.kill()
        time.sleep(2.5)
        assert worker.process.poll() is None
        valkey.start()
    until(lambda: status(client, job_id) == JobStatus.FINISHED.value, 15)
    assert worker.process.poll() is None
    assert len(fleet.history("backup")) == 1
