"""The locked queues: what RQ itself can be brought to do with them."""

from __future__ import annotations

import pickle
import zlib
from typing import Any

import fakeredis
import pytest
import rq
import rq.serializers
from rq.exceptions import NoSuchJobError
from rq.serializers import resolve_serializer
from rq.utils import str_to_date

from backup_worker.dispatcher import Job, rq_job
from backup_worker.queueing import queues
from backup_worker.queueing.queues import ForeignJob, MsgpackSerializer, SafeJob, open_queue


@pytest.fixture
def client() -> Any:
    return fakeredis.FakeRedis()


def job_of(client: Any, data: bytes, **fields: Any) -> SafeJob:
    client.hset("rq:job:a", mapping={"data": data, "origin": "backup"} | fields)
    job = SafeJob.fetch("a", connection=client, serializer=MsgpackSerializer)
    assert isinstance(job, SafeJob)
    return job


@pytest.mark.parametrize("name", [None, "pickle", rq.serializers.PickleSerializer])
def test_no_way_of_asking_rq_for_a_serializer_leads_to_pickle(name: Any) -> None:
    assert resolve_serializer(name) is MsgpackSerializer


def test_a_plain_rq_queue_in_this_process_writes_and_reads_msgpack(client: Any) -> None:
    # Some callers within RQ forget to pass the serializer on.
    job = rq.Queue("backup", connection=client).enqueue("backup_worker.jobs.backup", {"tier": "daily"})
    stored: Any = client.hget(f"rq:job:{job.id}", "data")
    assert MsgpackSerializer.loads(zlib.decompress(stored))[0] == "backup_worker.jobs.backup"
    assert rq.Queue("backup", connection=client).fetch_job(job.id).args == [{"tier": "daily"}]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "call",
    [
        ("os.system", None, ["true"], {}),
        ("backup_worker.jobs.prepare", None, ["/"], {}),
        ("backup_worker.jobs.backup.__globals__", None, [], {}),
        ("backup_worker.jobs.backup ", None, [], {}),
        ("backup_worker.jobs.backup", "object", [], {}),
        ("backup_worker.jobs.backup", None, "text", {}),
        ("backup_worker.jobs.backup", None, [], []),
        (7, None, [], {}),
        ("backup_worker.jobs.backup", None, []),
        {"func": "backup_worker.jobs.backup"},
        None,
    ],
)
def test_only_a_call_of_an_allowed_function_in_our_form_is_a_job(client: Any, call: Any) -> None:
    job = job_of(client, MsgpackSerializer.dumps(call))
    for ask in ("func_name", "instance", "args", "kwargs"):
        with pytest.raises(ForeignJob):
            getattr(job, ask)
    with pytest.raises(ForeignJob):
        job.perform()


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x00", pickle.dumps({"a": 1}), b"\x91" * 100_000])
def test_what_is_not_msgpack_is_a_foreign_job(client: Any, data: bytes) -> None:
    with pytest.raises(ForeignJob, match="not in msgpack form"):
        _ = job_of(client, data).func_name


def test_more_than_the_limit_is_not_unpacked() -> None:
    with pytest.raises(ValueError, match="more than a job may have"):
        MsgpackSerializer.loads(bytes(queues.MAX_JOB_BYTES + 1))


def test_what_was_packed_twice_and_errors_that_rq_keeps_elsewhere_are_not_unpacked(client: Any) -> None:
    large = bytes(queues.MAX_JOB_BYTES * 4)
    packed = zlib.compress(large)
    job = job_of(client, zlib.compress(packed), exc_info=packed)
    assert job.data == packed
    assert job._exc_info is None


def test_callbacks_and_webhooks_of_a_job_are_dropped_when_it_is_read(client: Any) -> None:
    ours = MsgpackSerializer.dumps(("backup_worker.jobs.backup", None, [], {}))
    hooks = '[{"url": "http://127.0.0.1/", "job_status": "finished"}]'
    names = {f"{when}_callback_name": "os.getpid" for when in ("success", "failure", "stopped")}
    job = job_of(client, ours, webhooks=hooks, **names)
    assert (job.success_callback, job.failure_callback, job.stopped_callback) == (None, None, None)
    assert job.webhooks == []
    assert job.func_name == "backup_worker.jobs.backup"


@pytest.mark.parametrize("job_id", ["a b", "a:b", "", "../x", "ä"])
def test_an_id_that_no_job_can_have_is_no_job(client: Any, job_id: str) -> None:
    with pytest.raises(NoSuchJobError):
        SafeJob.fetch(job_id, connection=client, serializer=MsgpackSerializer)


def drop(client: Any, queue: queues.SafeQueue, job_id: str, status: str = "queued") -> None:
    """Leave `job_id` where a worker leaves it that is killed right behind its BLMOVE."""
    client.hset(
        f"rq:job:{job_id}",
        mapping={"data": MsgpackSerializer.dumps(None), "origin": "backup", "status": status},
    )
    client.rpush(queue.intermediate_queue.key, job_id)


def clean(queue: queues.SafeQueue) -> None:
    worker: Any = None
    queue.intermediate_queue.cleanup(worker, queue)


def waiting(client: Any, queue: queues.SafeQueue) -> tuple[list[bytes], list[bytes]]:
    return client.lrange(queue.key, 0, -1), client.lrange(queue.intermediate_queue.key, 0, -1)


def test_a_dropped_job_goes_back_to_the_head_of_its_queue_once(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = open_queue("backup", client)
    client.rpush(queue.key, "later")
    drop(client, queue, "a")
    clean(queue)
    assert waiting(client, queue) == ([b"later"], [b"a"])  # it may just be on its way
    monkeypatch.setattr(queues, "STUCK_AFTER_S", -1)
    clean(queue)
    clean(queue)
    assert waiting(client, queue) == ([b"a", b"later"], [])


@pytest.mark.parametrize("status", ["finished", "failed", "stopped"])
def test_what_has_ended_is_not_put_back(client: Any, monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    queue = open_queue("backup", client)
    drop(client, queue, "a", status)
    clean(queue)
    monkeypatch.setattr(queues, "STUCK_AFTER_S", -1)
    clean(queue)
    assert waiting(client, queue) == ([], [])


def test_what_waits_in_the_queue_again_is_not_put_back_a_second_time(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = open_queue("backup", client)
    drop(client, queue, "a")
    client.rpush(queue.key, "a")
    clean(queue)
    monkeypatch.setattr(queues, "STUCK_AFTER_S", -1)
    clean(queue)
    assert waiting(client, queue) == ([b"a"], [])


def test_many_jobs_pushed_at_once_are_to_the_field_what_rq_itself_writes(client: Any) -> None:
    # An RQ that writes another field, or another form of one, must not go unnoticed.
    wanted = [
        rq_job(Job("backup", function, {"agent": "z", "at": 1.5}, f"{function}-{n}", f"job {n}"))
        for n, function in enumerate(("backup", "config_change", "maintenance", "backup"))
    ]
    written: list[dict[str, dict[bytes, bytes]]] = []
    for fast in (True, False):
        client.flushdb()
        queue = open_queue("backup", client)
        with client.pipeline(transaction=True) as pipeline:
            queue.push_many(wanted, pipeline) if fast else queue.enqueue_many(wanted, pipeline=pipeline)
            pipeline.execute()
        assert queue.get_job_ids() == [data.job_id for data in wanted]
        assert client.smembers("rq:queues") == {b"rq:queue:backup"}
        assert {client.ttl(f"rq:job:{data.job_id}") for data in wanted} == {-1}
        written.append({data.job_id: client.hgetall(f"rq:job:{data.job_id}") for data in wanted})
    ours, theirs = written
    for job_id, fields in theirs.items():
        times = {name: str_to_date(ours[job_id].pop(name)) for name in (b"created_at", b"enqueued_at")}
        assert all(
            abs((str_to_date(fields.pop(name)) - at).total_seconds()) < 5 for name, at in times.items()
        )
        assert ours[job_id].pop(b"data") == zlib.decompress(fields.pop(b"data"))
    assert ours == theirs


def test_a_job_pushed_with_many_is_read_like_any_other(client: Any) -> None:
    wanted = rq_job(Job("backup", "backup", {"agent": "z", "slot": "x" * 10_000}, "one", "a backup"))
    with client.pipeline(transaction=True) as pipeline:
        open_queue("backup", client).push_many([wanted], pipeline)
        pipeline.execute()
    job = SafeJob.fetch("one", connection=client, serializer=MsgpackSerializer)
    assert (job.func_name, job.args, job.kwargs) == ("backup_worker.jobs.backup", wanted.args, {})
    assert (job.timeout, job.retries_left, job.get_status()) == (3600, 5, "queued")
