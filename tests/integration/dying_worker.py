"""A worker that is killed at a chosen moment of a recovery."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Callable
from typing import Any

from backup_worker.recovery import processes
from backup_worker.recovery.incident import IncidentStore
from backup_worker.runtime import Runtime
from backup_worker.snapshots import evidence, swap
from em_bridge.connection import connect
from tests.living_fleet import Fleet


def die_at(number: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a wrapper that ends this process for good right before (odd) or right after (even) a call."""
    calls = itertools.count(1)

    def wrapper(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **options)
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    return wrapper


POINTS = {
    "a write of the incident": (IncidentStore, "save"),
    "the record": (Runtime, "record"),
    "the fence": (processes, "fence"),
    "copying evidence": (evidence, "_copy_evidence"),
    "keeping evidence": (evidence, "_appear"),
    "the swap": (swap, "swap"),
    "the start": (processes, "_write_record"),
}


def worker_that_dies(fleet: Fleet, incident: str, point: str, number: int) -> bool:
    """Advance the incident in a process that is killed at the `number`th moment of `point`; False if it never was."""
    child = os.fork()
    if child == 0:
        owner, name = POINTS[point]
        setattr(owner, name, die_at(number)(getattr(owner, name)))
        code = 1
        with contextlib.suppress(BaseException):
            mine = Fleet.__new__(Fleet)
            mine.__dict__ |= fleet.__dict__ | {"client": connect(fleet.url)}
            mine.drive(incident, pause_s=0.3)
            code = 0
        os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "the worker failed by itself"
    return False
