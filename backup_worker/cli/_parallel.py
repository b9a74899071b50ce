"""Several agents at a time, each in one of a few processes: one interpreter would use one core.

Promise: `in_processes` returns one result for each item, in their order, or raises. A process that is killed is an
error, not a missing result; the processes end with this one, and what has not begun when one raises does not begin.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from backup_worker.supervisor import die_with_parent
from em_bridge.errors import AgentBackupError

T = TypeVar("T")
Result = dict[str, Any]


def in_processes(work: Callable[[T], Result], items: Sequence[T]) -> list[Result]:
    """Return `work(item)`, a map that JSON can hold, for each item.

    Raises what `work` raises, if that is an AgentBackupError (with its message, hint and exit code), else
    AgentBackupError after the traceback.
    """
    # Two a core: while one waits for the disk, the other computes.
    count = min(len(items), 2 * (os.cpu_count() or 1))
    if count < 2:
        return [work(item) for item in items]
    results: dict[int, Result] = {}
    with _forked(work, items, count) as pipes:
        for line in _lines(pipes):
            position, result, error = json.loads(line)
            if error is not None:
                raise _rebuilt(*error)
            results[position] = result
    if len(results) < len(items):
        raise AgentBackupError(
            f"{len(items) - len(results)} of {len(items)} agents were not finished: a process was killed",
            hint="look into the system's log (out of memory?), and run the command again",
        )
    return [results[position] for position in range(len(items))]


@contextlib.contextmanager
def _forked(work: Callable[[T], Result], items: Sequence[T], count: int) -> Iterator[list[int]]:
    """Run `count` children, and yield the pipes that their results come through."""
    sys.stdout.flush()
    sys.stderr.flush()
    pipes: list[int] = []
    children: list[int] = []
    try:
        for number in range(count):
            ours, theirs = os.pipe()
            pipes.append(ours)
            tie = die_with_parent(signal.SIGTERM)
            child = os.fork()
            if child == 0:
                tie()
                for pipe in pipes:
                    os.close(pipe)
                _live(work, items, range(number, len(items), count), theirs)
            children.append(child)
            os.close(theirs)
        yield pipes
    finally:
        # A child whose result nobody reads any more stops at its next one.
        for pipe in pipes:
            os.close(pipe)
        for child in children:
            os.waitpid(child, 0)


def _live(work: Callable[[T], Result], items: Sequence[T], mine: Sequence[int], pipe: int) -> NoReturn:
    """Work, tell, and end without what the parent would do at its end."""
    try:
        for position in mine:
            result, error = None, None
            try:
                result = work(items[position])
            except AgentBackupError as failure:
                error = (failure.message, failure.hint, failure.exit_code)
            except Exception:  # noqa: BLE001  # it ends the child all the same, and the parent has to know
                traceback.print_exc()
                error = ("an unforeseen error: see the traceback above", None, 1)
            data = json.dumps([position, result, error]).encode() + b"\n"
            while data:
                data = data[os.write(pipe, data) :]
    except (KeyboardInterrupt, BrokenPipeError):
        pass
    finally:
        os._exit(0)


def _lines(pipes: Sequence[int]) -> Iterator[bytes]:
    """Yield the whole lines that come through `pipes`, until all are closed."""
    with selectors.DefaultSelector() as waiting:
        begun = dict.fromkeys(pipes, b"")
        for pipe in pipes:
            waiting.register(pipe, selectors.EVENT_READ)
        while waiting.get_map():
            for key, _ in waiting.select():
                data = os.read(key.fd, 65536)
                if not data:
                    waiting.unregister(key.fd)
                *whole, begun[key.fd] = (begun[key.fd] + data).split(b"\n")
                yield from whole


def _rebuilt(message: str, hint: str | None, exit_code: int) -> AgentBackupError:
    kind = type("Reported", (AgentBackupError,), {"exit_code": exit_code})
    error: AgentBackupError = kind(message, hint=hint)
    return error
