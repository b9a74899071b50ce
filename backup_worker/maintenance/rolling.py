"""How much of a rolling task (scrub, drill) is done in one go: everything within its time, never all at once. Pure.

A thing rests for the first half of its period and has most of the second half to be done. Each run takes a share of
what is due, oldest first, so large that all things, if they became due in the same instant, would be done in time.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass

REST = 0.5
SPREAD = 0.4
"""Shares of the period: how long a thing rests after it was done, and over how long a time the runs spread it then.
What is left is for runs that did not take place."""

RETRY_S = 86400.0
"""When something that failed is tried again, at the latest: what mends it may have come meanwhile."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing: from `due_at` (Unix seconds) on it may be done, and `span_s` later it should have been."""

    key: str
    due_at: float
    span_s: float


def after_success(key: str, done_at: float, period_s: float) -> Item:
    """Return when something that was done well at `done_at` is to be done again."""
    return Item(key, done_at + period_s * REST, period_s * SPREAD)


def after_failure(key: str, tried_at: float, period_s: float) -> Item:
    """Return when something that failed at `tried_at` is to be tried again."""
    pause_s = min(RETRY_S, period_s * REST)
    return Item(key, tried_at + pause_s, pause_s)


def choose(items: Iterable[Item], *, now: float, every_s: float) -> list[str]:
    """Return the keys to do in the run at `now`, the longest due first, if there is a run every `every_s` seconds."""
    everything = list(items)
    # Counts what is not due yet, too: the share must not depend on how the work happens to be spread already.
    load = sum(every_s / max(item.span_s, 1e-9) for item in everything)
    share = max(1, math.ceil(round(load, 6)))
    due = [item for item in everything if item.due_at <= now]
    return [item.key for item in heapq.nsmallest(share, due, key=lambda item: (item.due_at, item.key))]
