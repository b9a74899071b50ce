"""A child does not outlive its parent: the kernel sends it a signal when the thread that started it ends (prctl(2)).

A child whose parent died before that took effect ends at once. Where the system has no prctl, children are not bound.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Final

_PR_SET_PDEATHSIG: Final = 1

# Loaded before the fork: a child must not import anything.
_prctl: Final = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)


def bind(parent: int, signum: int) -> None:
    """Have this process get `signum` when `parent` ends; to be called in the child, with the parent's process id."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signum)
        if os.getppid() != parent:
            os._exit(1)


def die_with_parent(signum: int = signal.SIGTERM) -> Callable[[], None]:
    """Return a `preexec_fn` that binds the child to this process."""
    return partial(bind, os.getpid(), signum)
