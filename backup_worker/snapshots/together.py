"""Several works share their waits for the disk, and several processes share the works.

A work is a generator that yields wherever everything that it has written must be on the disk before it goes on. Alone
it syncs there; together with others, one sync of the file system serves them all. Nothing about the order of a work's
own steps changes. A work that fails does not touch the others; when the caller gives up, each cleans up behind itself.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import selectors
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from backup_worker.snapshots import disk
from em_bridge.parent import bind

AT_ONCE = 48
"""Works that wait for the disk together; each has about ten open files, of 1,024 that a process commonly may have."""
WEIGHT_AT_ONCE = 3000
PROCESSES_PER_CORE = 2
"""One works while the other waits for the disk."""
TOKENS = 8192
"""So many shares of the works fit into a pipe (64 KiB, or 32 where a user has many pipes)."""
_ENDING = {signal.SIGINT, signal.SIGTERM}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sync:
    """A request: bring the file system of `fd` to the disk. `weight`: about how many files were written for it."""

    fd: int
    weight: int = 0


Work = Generator[Sync, None, T]


def weight(files: int, size_bytes: int) -> int:
    """Return how many small files' worth of work it is to write files of `size_bytes` in all, and to read them back."""
    return files + size_bytes // 32768


@dataclass(slots=True)
class Outcome:
    """What became of the work number `index`: a result, or the error that ended it."""

    index: int
    result: Any = None
    error: Exception | None = None


def alone(work: Work[T]) -> T:
    """Run one work to its end and return its result."""
    try:
        step = next(work)
        while True:
            try:
                disk.sync_all(step.fd)
            except OSError as error:
                step = work.throw(error)
            else:
                step = next(work)
    except StopIteration as end:
        result: T = end.value
        return result


def together(works: Iterable[tuple[int, Work[Any]]]) -> Iterator[Outcome]:
    """Run works to their ends, a few at a time, and yield their outcomes. None may wait for another one's lock."""
    waiting = iter(works)
    active: list[tuple[int, Work[Any], Sync]] = []
    try:
        while True:
            weight = 0
            for index, work in waiting:
                step = _advance(index, work, None)
                if isinstance(step, Outcome):
                    yield step
                    continue
                active.append((index, work, step))
                weight += step.weight
                if len(active) == AT_ONCE or weight >= WEIGHT_AT_ONCE:
                    break
            if not active:
                return
            while active:
                failures = _sync_each([step.fd for _, _, step in active])
                now, active = active, []
                for position, (index, work, _) in enumerate(now):
                    step = _advance(index, work, failures[position])
                    if isinstance(step, Outcome):
                        yield step
                    else:
                        active.append((index, work, step))
    finally:
        for _, work, _ in active:
            work.close()


def _advance(index: int, work: Work[Any], failure: OSError | None) -> Sync | Outcome:
    try:
        return next(work) if failure is None else work.throw(failure)
    except StopIteration as end:
        return Outcome(index, end.value)
    except Exception as error:  # noqa: BLE001 - handed to whoever asked for this work, the others go on
        return Outcome(index, error=error)


def _sync_each(fds: Sequence[int]) -> list[OSError | None]:
    """Sync each file system once; the oldest descriptor of each tells of every write error since it was opened."""
    failed: dict[int, OSError | None] = {}
    devices = [os.fstat(fd).st_dev for fd in fds]
    for fd, device in zip(fds, devices, strict=True):
        if device not in failed:
            try:
                disk.sync_all(fd)
                failed[device] = None
            except OSError as error:
                failed[device] = error
    return [failed[device] for device in devices]


# -- several processes ----------------------------------------------------------------------------------------------


def shared_out(
    count: int,
    run: Callable[[Iterator[int]], Iterator[tuple[int, Any]]],
    *,
    processes: int | None = None,
) -> Iterator[tuple[int, Any]]:
    """Run the works 0 to `count` - 1 in several processes and yield (number, result) as they end.

    `run` is called in each process with an iterator over the numbers that fall to it, and yields each with a result
    that JSON can hold. A work that a process took and never answered for (it was killed) comes with None. The child
    processes die with this one; they share nothing with it but what was there before. A child's own works are not
    shared out again.
    """
    processes = min(processes or PROCESSES_PER_CORE * len(os.sched_getaffinity(0)), count)
    if processes < 2 or _is_child:
        yield from run(iter(range(count)))
        return
    # All is in the pipe before anybody reads: each token is read once, and in order. (A file with a shared offset would
    # not do: the kernel guards the offset of files on a disk only, and not of one in memory.)
    numbers, tokens = os.pipe()
    step = -(-count // TOKENS)
    children: dict[int, int] = {}
    answered: set[int] = set()
    # The children share this memory as long as nobody writes to it, and looking for circles writes to all of it.
    gc.freeze()
    try:
        with open(tokens, "wb") as file:
            file.write(b"".join(n.to_bytes(4, "little") for n in range(0, count, step)))
        share = partial(_taken, numbers, step, count)
        for _ in range(processes):
            pid, pipe = _start(share, run)
            children[pipe] = pid
        for number, result in _answers(children):
            answered.add(number)
            yield number, result
        for number in range(count):
            if number not in answered:
                yield number, None
    finally:
        gc.unfreeze()
        os.close(numbers)
        for pipe, pid in children.items():
            # Asked, not killed: it removes what it has staged.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            os.close(pipe)
            os.waitpid(pid, 0)


_is_child = False
"""Whether this process is one among several already."""


def _start(
    share: Callable[[], Iterator[int]], run: Callable[[Iterator[int]], Iterator[tuple[int, Any]]]
) -> tuple[int, int]:
    reading, writing = os.pipe()
    parent = os.getpid()
    # Held back until the child has its own handlers: what is sent to it before must neither be lost nor be taken for
    # the parent's.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(writing)
        return pid, reading
    code = 1
    try:
        os.close(reading)
        for one in _ENDING:
            signal.signal(one, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before - _ENDING)
        bind(parent, signal.SIGKILL)
        global _is_child
        _is_child = True
        # It lives for seconds and holds nothing in circles: looking for those took a tenth of its time.
        gc.disable()
        with open(writing, "wb", buffering=0) as pipe:
            for number, result in run(share()):
                pipe.write(json.dumps([number, result]).encode("ascii") + b"\n")
        code = 0
    except (KeyboardInterrupt, BrokenPipeError):
        code = 130
    except BaseException:  # noqa: BLE001 - a fault of ours: said here, because nobody above sees it
        # In one piece: another process may be saying the same.
        os.write(2, traceback.format_exc().encode())
    finally:
        # Nothing of the parent's (buffers, exit handlers, tests) may run a second time in here.
        os._exit(code)


def _taken(numbers: int, step: int, count: int) -> Iterator[int]:
    while taken := os.read(numbers, 4):
        start = int.from_bytes(taken, "little")
        yield from range(start, min(start + step, count))


def _answers(children: dict[int, int]) -> Iterator[tuple[int, Any]]:
    """Yield what the children say, until each has ended."""
    rests = dict.fromkeys(children, b"")
    with selectors.DefaultSelector() as selector:
        for pipe in children:
            selector.register(pipe, selectors.EVENT_READ)
        while rests:
            for key, _ in selector.select():
                pipe = key.fd
                block = os.read(pipe, 1 << 16)
                *lines, rests[pipe] = (rests[pipe] + block).split(b"\n")
                for line in lines:
                    number, result = json.loads(line)
                    yield number, result
                if not block:
                    selector.unregister(pipe)
                    del rests[pipe]
                    os.waitpid(children[pipe], 0)
                    os.close(pipe)
                    del children[pipe]
