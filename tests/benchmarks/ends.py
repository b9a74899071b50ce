"""From one end to the other beside foreign task queues, and what each kind of RQ worker costs a job.

The foreign ones need other versions of redis-py, and each other's absence: each gets an environment of its own, made in
the benchmark's folder. Where that is not possible (no network), it is missing from the table, with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from rq import Queue
from rq.serializers import JSONSerializer

from em_bridge import Agent, ExecutionManager, Publisher
from em_bridge.events import AgentState
from tests.benchmarks import bare, bus, data, foreign
from tests.benchmarks.measure import OURS, BenchError, Settings, Table, environment, in_turn, rates_table
from tests.benchmarks.parts import started, wait_until

PACKAGES = {"faststream": "faststream[redis]", "taskiq-redis": "taskiq-redis", "arq": "arq"}
SELDOM = f"{OURS}, one ack for 50"
COMMITS = 1000
KINDS = ("SimpleWorker", "Worker", "SpawnWorker")


def ends(settings: Settings) -> Iterator[Table]:
    """Messages between two agents, and events to jobs, beside other queues' trivial handlers."""
    count = 1_000 if settings.quick else 5_000
    jobs = 100 if settings.quick else 500
    notes: list[str] = []
    with bus.server(settings, "ends") as (url, client):
        contenders: dict[str, Callable[[], Mapping[str, float]]] = {
            OURS: functools.partial(_ours, settings.folder, url, count, 1, client.flushdb),
            SELDOM: functools.partial(_ours, settings.folder, url, count, 50, client.flushdb),
        }
        for name in PACKAGES:
            python, reason = environment_of(name, settings.folder)
            if python is None:
                notes.append(f"{name} is missing: {reason}")
                continue
            contenders[name] = functools.partial(_foreign, python, name, url, count, client.flushdb)
        results = in_turn(contenders, settings.runs)
        versions = [_version(name, settings.folder) for name in contenders if name in PACKAGES]
        rate = jobs / _jobs(settings, jobs)
    table = rates_table(
        f"End to end, {count:,} messages, trivial handler", results, {"message to handler": count}
    )
    table.notes += [
        ", ".join(versions),
        "ours: from an agent's outbox (each message synced to the disk before `send` returns) through the log and the "
        "router into another agent's inbox, exactly once and in order, each acknowledgement synced, too; theirs: sent "
        "and handled in one process, nothing is on a disk but the server's file, a crash repeats or loses what was "
        f"under way. Bare commits to an SQLite file here: {_commits(settings.folder):,.0f} a second",
        f"an event that becomes a job (a line on the record, in a process of its own): {rate:.0f} a second through the "
        "dispatcher and two forking RQ workers, in one run; jobs carry backups, not messages",
        *notes,
    ]
    yield table


def _commits(folder: Path) -> float:
    """Return how many synced commits a second the disk takes from one program: the floor below each message."""
    with contextlib.closing(sqlite3.connect(folder / "floor.sqlite", isolation_level=None)) as db:
        db.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; CREATE TABLE t(x)")
        begun = time.perf_counter()
        for number in range(COMMITS):
            db.execute("INSERT INTO t VALUES (?)", (number,))
        return COMMITS / (time.perf_counter() - begun)


def environment_of(name: str, folder: Path) -> tuple[Path | None, str]:
    """Return the Python of an environment with the package, or None and why there is none."""
    place = folder / "foreign" / name
    python = place / "bin" / "python"
    if python.exists():
        return python, ""
    venv.create(place, with_pip=True)
    argv = [
        str(python),
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        PACKAGES[name],
        "hiredis",
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return python, ""
    said = [line for line in done.stderr.strip().splitlines() if line.startswith("ERROR")]
    return None, f"pip could not install it ({(said or ['no reason given'])[-1][:200]})"


def _version(name: str, folder: Path) -> str:
    ask = f"from importlib.metadata import version as v; print('{name}', v('{name}'), 'with redis-py', v('redis'))"
    argv = [str(folder / "foreign" / name / "bin" / "python"), "-c", ask]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


def _foreign(
    python: Path, name: str, url: str, count: int, clean: Callable[[], object]
) -> Mapping[str, float]:
    clean()
    argv = [str(python), foreign.__file__, name, url, str(count)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=300, env=environment())
    if done.returncode != 0:
        raise BenchError(f"{name} ended with {done.returncode}: {done.stderr[-400:]}")
    return {"message to handler": float(done.stdout)}


def _ours(
    folder: Path, url: str, count: int, ack_every: int, clean: Callable[[], object]
) -> Mapping[str, float]:
    """Send `count` messages from one agent to another, through an EM; return how many seconds that took.

    An acknowledgement is good for all before it: of a sender's messages each, or one of so many, is acknowledged.
    """
    clean()
    place = folder / f"outboxes-{time.monotonic_ns()}"
    place.mkdir()
    with (
        ExecutionManager(url) as em,
        Agent("z", url, outbox=place / "z") as z,
        Agent("jay", url, outbox=place / "jay") as jay,
    ):
        assert em.wait_until_leading(20)
        time.sleep(0.5)
        begun = time.perf_counter()
        sending = threading.Thread(target=lambda: [z.send("jay", b"x") for _ in range(count)])
        sending.start()
        for number in range(1, count + 1):
            message = jay.receive(30.0)
            if message is None:
                raise BenchError("a message did not arrive")
            if number % ack_every == 0 or number == count:
                jay.ack(message)
        sending.join()
        return {"message to handler": time.perf_counter() - begun}


def _jobs(settings: Settings, count: int) -> float:
    """Publish `count` states, and return the seconds until the job of each is done."""
    folder = settings.folder / "jobs"
    fleet = data.make_small_files(folder / "fleet", agents=1, files=2, mean_bytes=100)
    config = data.write_config(folder, fleet)
    with bus.server(settings, "jobs-valkey") as (url, client):
        commands = [["backup_worker", "dispatcher"]] + [
            ["backup_worker", "worker", "--queue", "maintenance", "--processes", "1"] for _ in range(2)
        ]
        env = {"REDIS_URL": url, "BACKUP_CONFIG": str(config)}
        with started(commands, env, folder / "parts.log"), Publisher(url) as em:
            agent = fleet.agents[0]

            def done() -> int:
                return int(client.zcard("rq:finished:maintenance"))

            em.agent_state(agent, "DEGRADED")
            wait_until(lambda: done() == 1, "the first job")
            time.sleep(1.0)
            begun = time.perf_counter()
            em.publish_many([AgentState(agent, "DEGRADED", f"{n}") for n in range(count)])
            wait_until(lambda: done() == count + 1, "every job")
            return time.perf_counter() - begun


# -- kinds of workers -------------------------------------------------------------------------------------------------


def kinds(settings: Settings) -> Iterator[Table]:
    """RQ's own workers on jobs that do nothing: in the worker's process, in a fork, in a new interpreter."""
    counts = dict.fromkeys(KINDS, 100 if settings.quick else 500) | {
        "SpawnWorker": 10 if settings.quick else 30
    }
    table = Table(
        "What a kind of RQ worker costs a job that does nothing", ("kind", "median ms a job", "least to most")
    )
    with bus.server(settings, "kinds") as (url, client):
        queue = Queue(bare.QUEUE, connection=client, serializer=JSONSerializer)

        def one(kind: str) -> Mapping[str, float]:
            for _ in range(counts[kind]):
                queue.enqueue(bare.nothing)
            done = subprocess.run(
                [sys.executable, "-m", "tests.benchmarks.bare", "burst", url, kind],
                env=environment(), capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode != 0 or queue.count:
                raise BenchError(f"{kind}: {done.stderr[-400:]}")
            return {"burst": float(done.stdout.split()[-1]) / counts[kind]}

        contenders = {kind: functools.partial(one, kind) for kind in KINDS}
        results = in_turn(contenders, settings.runs)["burst"]
    for kind, seconds in results.items():
        spread = f"{min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f}"
        table.add(kind, f"{statistics.median(seconds) * 1e3:.1f}", spread)
    table.notes.append("ours is the forking one (`Worker`): see `backup_worker/worker.py` for the reason")
    yield table
