"""One program for each foreign task queue: send `COUNT` things to a handler that only counts, and say how long it took.

`python foreign.py faststream|taskiq-redis|arq URL COUNT`, in an environment of its own that has the package (see
`ends`). Sender and handler share one process and one event loop, as their own examples have it. Prints seconds.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any


class Counter:
    """Counts what was handled; `full` is set with the last one."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.full = asyncio.Event()

    def take(self) -> None:
        """Count one."""
        self.left -= 1
        if self.left == 0:
            self.full.set()


async def _send(count: int, send: Callable[[int], Awaitable[Any]], counter: Counter) -> float:
    begun = time.perf_counter()
    for number in range(count):
        await send(number)
    await counter.full.wait()
    return time.perf_counter() - begun


async def faststream(url: str, count: int) -> float:
    """A stream with a consumer group."""
    from faststream.redis import RedisBroker, StreamSub

    counter = Counter(count)
    broker = RedisBroker(url, logger=None)

    @broker.subscriber(stream=StreamSub("bench", group="bench", consumer="one", max_records=100))
    async def handle(number: int) -> None:
        counter.take()

    async with broker:
        await broker.start()
        await asyncio.sleep(0.5)
        return await _send(count, lambda number: broker.publish(number, stream="bench"), counter)


async def taskiq_redis(url: str, count: int) -> float:
    """Its stream broker, which acknowledges."""
    from taskiq.api import run_receiver_task
    from taskiq_redis import RedisStreamBroker

    counter = Counter(count)
    broker = RedisStreamBroker(url)

    @broker.task
    async def handle(number: int) -> None:
        counter.take()

    await broker.startup()
    running = asyncio.create_task(run_receiver_task(broker))
    await asyncio.sleep(0.5)
    assert not running.done()
    return await _send(count, handle.kiq, counter)


async def arq(url: str, count: int) -> float:
    """Its worker with its defaults, but looking for jobs all the time, and a hundred at once."""
    from arq import create_pool
    from arq.connections import RedisSettings
    from arq.worker import Worker, func

    counter = Counter(count)

    async def handle(context: dict[str, Any], number: int) -> None:
        counter.take()

    settings = RedisSettings.from_dsn(url)
    pool = await create_pool(settings)
    worker = Worker(
        functions=[func(handle, name="handle")], redis_settings=settings, handle_signals=False,
        poll_delay=0.01, max_jobs=100,
    )  # fmt: skip
    running = asyncio.create_task(worker.async_run())
    await asyncio.sleep(0.5)
    assert not running.done()
    return await _send(count, lambda number: pool.enqueue_job("handle", number), counter)


PROGRAMS = {"faststream": faststream, "taskiq-redis": taskiq_redis, "arq": arq}

if __name__ == "__main__":

    async def main() -> None:
        """Print what it took, and end without the farewell of the worker, which is nobody's time."""
        print(await PROGRAMS[sys.argv[1]](sys.argv[2], int(sys.argv[3])), flush=True)
        os._exit(0)

    asyncio.run(main())
