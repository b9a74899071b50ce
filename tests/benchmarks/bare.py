"""What the parts are compared with: RQ as it comes, and a router of ten lines.

`python -m tests.benchmarks.bare worker|router|burst URL [KIND]` runs one.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

QUEUE = "bare"


def copy_folder(source: str, target: str) -> None:
    """Copy a folder and give it its name by a rename: what a backup job does at the very least."""
    building = f"{target}.new"
    shutil.copytree(source, building)
    os.rename(building, target)


def nothing() -> None:
    """Do nothing."""


def burst(url: str, kind: str) -> None:
    """Work off what is in the queue with one kind of RQ worker, and print the seconds."""
    import time

    import redis
    import rq.worker
    from rq import Queue
    from rq.serializers import JSONSerializer

    client = redis.Redis.from_url(url)
    queues = [Queue(QUEUE, connection=client, serializer=JSONSerializer)]
    made = getattr(rq.worker, kind)(queues, connection=client, serializer=JSONSerializer)
    begun = time.perf_counter()
    made.work(burst=True, logging_level="WARNING")
    print(time.perf_counter() - begun)


def worker(url: str) -> None:
    """Run RQ's own forking worker with its defaults, but JSON instead of pickle."""
    import redis
    from rq import Queue, Worker
    from rq.serializers import JSONSerializer

    client = redis.Redis.from_url(url)
    queues = [Queue(QUEUE, connection=client, serializer=JSONSerializer)]
    Worker(queues, connection=client, serializer=JSONSerializer).work(logging_level="WARNING")


def router(url: str) -> None:
    """Route one message and end."""
    import msgpack
    import redis

    client: Any = redis.Redis.from_url(url)
    rows = client.xreadgroup("em-router", "bare", {"em:messages": ">"}, count=500)
    for entry, fields in rows[0][1]:
        client.xadd(f"em:inbox:{msgpack.unpackb(fields[b'body'])['to']}", fields)
        client.xack("em:messages", "em-router", entry)


if __name__ == "__main__":
    {"worker": worker, "router": router, "burst": burst}[sys.argv[1]](*sys.argv[2:])
