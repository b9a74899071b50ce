"""The one place that asks the machine what time it is.

Functions that decide something take the time as an argument, so that a test can put them anywhere in time; only the
outermost loops call this module.
"""

from __future__ import annotations

import time


def now() -> float:
    """Return the wall clock in Unix seconds."""
    return time.time()


def since_boot() -> float:
    """Return the seconds since this machine was started, those of its sleep included: no clock that can be set."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def monotonic() -> float:
    """Return seconds that never go backwards; only differences mean something."""
    return time.monotonic()


def sleep(seconds: float) -> None:
    """Block this thread for `seconds`."""
    time.sleep(seconds)
