"""The RQ dashboard at /rq on real workers and jobs: each fault of rq-dashboard 0.9 that is mended has its test."""

from __future__ import annotations

import pickle
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from redis import Redis
from rq.job import Job, JobStatus
from rq.registry import FailedJobRegistry

from backup_worker.console import create_app
from backup_worker.console.roles import APPROVER
from backup_worker.queueing import queues
from tests.console_fleet import PASSWORD, Visitor, World, make_world, until, worker
from tests.integration.conftest import ValkeyServer

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    server = ValkeyServer(tmp_path_factory.mktemp("valkey"))
    yield server
    server.close()


@pytest.fixture
def world(server: ValkeyServer, tmp_path: Path) -> World:
    server.client().flushall()
    return make_world(tmp_path / "w", server.url, ("em", "z"))


@pytest.fixture
def client(world: World) -> Redis:
    return world.runtime.redis


@pytest.fixture
def visitor(world: World) -> Visitor:
    return Visitor(create_app(world.runtime))


def enqueue(client: Redis, job_id: str, queue: str = "backup", **args: Any) -> Job:
    slot = {"tier": "daily", "slot": "2026-01-01", "agent": "z", **args}
    return queues.open_queue(queue, client).enqueue_call(
        "backup_worker.jobs.backup", args=(slot,), job_id=job_id, description=f"backup {HOSTILE}"
    )


def listed(visitor: Visitor, registry: str, queue: str = "backup") -> list[dict[str, Any]]:
    answer = visitor.get(f"/rq/0/data/jobs/{queue}/{registry}/20/asc/1.json")
    assert answer.status_code == 200, answer.text
    return list(answer.json["jobs"])


def shown(visitor: Visitor, job_id: str) -> dict[str, Any]:
    assert visitor.get(f"/rq/0/view/job/{job_id}").status_code == 200
    answer = visitor.get(f"/rq/0/data/job/{job_id}.json")
    assert answer.status_code == 200, answer.text
    return dict(answer.json)


def status(client: Redis, job_id: str) -> JobStatus:
    return queues.SafeJob.fetch(job_id, connection=client, serializer=queues.MsgpackSerializer).get_status()


def test_jobs_are_shown_from_waiting_to_finished_and_failed(
    world: World, client: Redis, visitor: Visitor
) -> None:
    enqueue(client, "good")
    enqueue(client, "bad", agent="nobody")
    assert [job["id"] for job in listed(visitor, "queued")] == ["good", "bad"]
    with worker(world):
        until(
            lambda: status(client, "good") == JobStatus.FINISHED and status(client, "bad") == JobStatus.FAILED
        )
    assert [job["id"] for job in listed(visitor, "finished")] == ["good"]
    assert shown(visitor, "good")["result"] == {"snapshot": "daily/2026-01-01/z", "status": "good"}
    failed = listed(visitor, "failed")
    assert [job["id"] for job in failed] == ["bad"]
    assert "nobody" in failed[0]["exc_info"]
    counts = {queue["name"]: queue for queue in visitor.get("/rq/0/data/queues.json").json["queues"]}
    assert (counts["backup"]["count"], counts["backup"]["failed_job_registry_count"]) == (0, 1)


def test_a_busy_worker_is_shown_with_its_job(world: World, client: Redis, visitor: Visitor) -> None:
    repository = world.runtime.repository
    repository.prepare()
    with worker(world), repository.lock("take.daily.z"):
        enqueue(client, "busy", note=b"\xff\x00")
        until(lambda: status(client, "busy") == JobStatus.STARTED)
        assert visitor.get("/rq/0/view/workers").status_code == 200
        found = visitor.get("/rq/0/data/workers.json").json["workers"]
        assert [(one["queues"], one["current_job"]["job_id"]) for one in found] == [(["backup"], "busy")]
        assert "backup_worker.jobs.backup" in found[0]["current_job"]["call_string"]
        assert [job["id"] for job in listed(visitor, "started")] == ["busy"]
        # Its record expires while it works: the worker is shown all the same.
        client.delete("rq:job:busy")
        assert visitor.get("/rq/0/data/workers.json").json["workers"][0]["current_job"] == "idle"


def test_scheduled_and_deferred_jobs_are_shown_with_what_they_wait_for(
    client: Redis, visitor: Visitor
) -> None:
    from datetime import timedelta

    queue = queues.open_queue("backup", client)
    first = enqueue(client, "first")
    queue.enqueue_call("backup_worker.jobs.backup", args=({},), job_id="second", depends_on=first)
    queue.enqueue_in(timedelta(hours=1), "backup_worker.jobs.backup", {}, job_id="later")
    assert [job["id"] for job in listed(visitor, "deferred")] == ["second"]
    assert [job["id"] for job in listed(visitor, "scheduled")] == ["later"]
    assert shown(visitor, "second")["depends_on"] == ["first"]
    assert shown(visitor, "second")["depends_on_status"] == ["active"]


def test_bytes_and_odd_values_in_a_job_do_not_break_its_page(client: Redis, visitor: Visitor) -> None:
    job = enqueue(client, "odd", blob=b"\xff\x00", number=float("nan"))
    job.meta = {"blob": b"\xfe", 1: [float("inf")]}
    job.save_meta()
    assert shown(visitor, "odd")["metadata"] == '{"blob": "\\\\xfe", "1": ["inf"]}'


def test_an_unknown_job_is_404_and_looking_changes_nothing(client: Redis, visitor: Visitor) -> None:
    for path in ("/rq/0/view/job/nothing", "/rq/0/data/job/nothing.json"):
        assert visitor.get(path).status_code == 404, path
    enqueue(client, "lost")
    client.delete("rq:job:lost")
    assert listed(visitor, "queued") == []
    assert client.lrange("rq:queue:backup", 0, -1) == [b"lost"]
    assert visitor.post("/rq/job/nothing/requeue").status_code == 404


def test_compacting_takes_out_lost_jobs_and_no_others(client: Redis, visitor: Visitor) -> None:
    assert visitor.post("/rq/queue/backup/compact").status_code == 200, "an empty queue"
    for job_id in ("one", "lost", "two"):
        enqueue(client, job_id)
    client.delete("rq:job:lost")
    assert visitor.post("/rq/queue/backup/compact").status_code == 200
    assert client.lrange("rq:queue:backup", 0, -1) == [b"one", b"two"]


EXPLOSIONS: list[str] = []


def explode(what: str) -> None:
    EXPLOSIONS.append(what)


class Bomb:
    """What must never be loaded."""

    def __reduce__(self) -> Any:
        return explode, ("loaded",)


def test_nothing_is_ever_unpickled(client: Redis, visitor: Visitor) -> None:
    bomb = pickle.dumps(Bomb())
    enqueue(client, "planted")
    client.hset("rq:job:planted", mapping={"meta": bomb, "result": bomb, "data": zlib.compress(bomb)})
    client.xadd("rq:results:planted", {"type": "1", "return_value": bomb.hex()})
    enqueue(client, "foreign")
    alien = msgpack.packb(("os.system", None, ["true"], {}))
    client.hset("rq:job:foreign", mapping={"data": zlib.compress(alien), "meta": bomb})
    for path in ("/rq/", "/rq/0/view/jobs", "/rq/0/view/workers", "/rq/0/data/queues.json"):
        assert visitor.get(path).status_code == 200
    assert {job["id"] for job in listed(visitor, "queued")} == {"planted", "foreign"}
    for job_id in ("planted", "foreign"):
        assert "unreadable" in shown(visitor, job_id)["metadata"]
    FailedJobRegistry("backup", connection=client).add(
        queues.SafeJob.fetch("planted", connection=client, serializer=queues.MsgpackSerializer), 60
    )
    visitor.post("/rq/job/planted/requeue")
    visitor.post("/rq/job/planted/delete")
    assert EXPLOSIONS == []
    pickle.loads(bomb)
    assert EXPLOSIONS == ["loaded"], "the bomb of this test does not work"
    EXPLOSIONS.clear()


def test_requeueing_keeps_the_job_as_it_is_and_a_worker_runs_it(
    world: World, client: Redis, visitor: Visitor
) -> None:
    enqueue(client, "again", agent="nobody")
    with worker(world):
        until(lambda: status(client, "again") == JobStatus.FAILED)
    data, meta = client.hget("rq:job:again", "data"), msgpack.packb({"why": "tested"})
    client.hset("rq:job:again", "meta", meta)
    answer = visitor.post("/rq/job/again/requeue")
    assert answer.json == {"status": "OK"}
    assert client.hget("rq:job:again", "meta") == meta
    assert zlib.decompress(client.hget("rq:job:again", "data")) == zlib.decompress(data)
    assert [job["id"] for job in listed(visitor, "queued")] == ["again"]
    assert visitor.post("/rq/job/again/requeue").status_code == 409, "it waits already"
    with worker(world):
        until(lambda: status(client, "again") == JobStatus.FAILED and client.llen("rq:queue:backup") == 0)


def test_changes_need_post_and_the_sessions_token(client: Redis, visitor: Visitor) -> None:
    enqueue(client, "kept")
    paths = ("/rq/requeue/backup", "/rq/job/kept/delete", "/rq/job/kept/requeue", "/rq/queue/backup/queued/empty",
             "/rq/queue/backup/compact")  # fmt: skip
    for path in paths:
        assert visitor.get(path).status_code == 405, path
        assert visitor.post(path, token="wrong").status_code == 403, path
    assert status(client, "kept") == JobStatus.QUEUED
    headers = {**visitor.headers, "X-CSRFToken": visitor.token()}
    assert visitor.client.post("/rq/queue/backup/queued/empty", headers=headers).status_code == 200
    assert listed(visitor, "queued") == []


@pytest.mark.parametrize(
    "registry", ["failed", "finished", "deferred", "scheduled", "started", "canceled", "queued"]
)
def test_every_list_can_be_emptied_and_requeued(client: Redis, visitor: Visitor, registry: str) -> None:
    job = enqueue(client, "one")
    if registry != "queued":
        client.lrem("rq:queue:backup", 0, "one")
        key = {"failed": "failed", "finished": "finished", "deferred": "deferred", "scheduled": "scheduled",
               "started": "wip", "canceled": "canceled"}[registry]  # fmt: skip
        client.zadd(f"rq:{key}:backup", {"one": time.time() + 600})
        job.set_status(JobStatus(registry))
    assert [found["id"] for found in listed(visitor, registry)] == ["one"]
    if registry == "failed":
        assert visitor.post("/rq/requeue/backup").json == {"count": 1, "status": "OK"}
        assert [found["id"] for found in listed(visitor, "queued")] == ["one"]
        return
    assert visitor.post(f"/rq/queue/backup/{registry}/empty").status_code == 200
    assert listed(visitor, registry) == []


def test_what_is_done_there_stands_in_the_record_under_the_users_name(world: World, client: Redis) -> None:
    world.users.add("kari", PASSWORD, role=APPROVER)
    visitor = Visitor(create_app(world.runtime))
    visitor.log_in("kari")
    enqueue(client, "one")
    visitor.post("/rq/job/one/delete")
    visitor.post("/rq/job/one/requeue")
    done = [(line["action"], line["by"], line.get("job_id")) for line in world.runtime.history.read("action")]
    assert done == [("login", "kari", None), ("rq-delete-job", "kari", "one")]


@pytest.mark.parametrize(
    "path",
    [
        "/rq/1/view/queues", "/rq/0/view/jobs/backup/nothing/8/asc/1", "/rq/0/data/jobs/backup/nothing/8/asc/1.json",
        "/rq/0/data/jobs/backup/queued/0/asc/1.json", "/rq/0/data/jobs/backup/queued/x/asc/1.json",
        "/rq/0/data/jobs/backup/queued/8/asc/0.json", "/rq/0/data/jobs/backup/queued/99999/asc/1.json",
        "/rq/0/view/jobs/backup/queued/8/sideways/1", "/rq/0/view/jobs/%27%3Balert(1)/queued/8/asc/1",
    ],
)  # fmt: skip
def test_addresses_that_make_no_sense_are_404(visitor: Visitor, path: str) -> None:
    answer = visitor.get(path)
    assert answer.status_code == 404
    assert "Traceback" not in answer.text


def test_its_pages_run_no_script_but_those_with_this_answers_nonce(client: Redis, visitor: Visitor) -> None:
    enqueue(client, "one")
    first, second = visitor.get("/rq/0/view/jobs"), visitor.get("/rq/0/view/jobs")
    policies = [dict(rule.split(" ", 1) for rule in answer.headers["Content-Security-Policy"].split("; "))
                for answer in (first, second)]  # fmt: skip
    scripts = [policy["script-src"] for policy in policies]
    assert scripts[0] != scripts[1]
    assert all("unsafe" not in rule for policy in policies for rule in policy.values())
    assert " style=" not in first.text
    nonce = scripts[0].split("'nonce-")[1].rstrip("'")
    assert first.text.count(f'<script nonce="{nonce}">') == 1
    assert "underscore" not in first.text, "its templates need eval"
    for path in ("/rq/0/view/job/one", "/rq/0/view/workers"):
        assert HOSTILE not in visitor.get(path).text
