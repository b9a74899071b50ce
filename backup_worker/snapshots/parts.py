"""The many or large files of one agent, shared out in parts over the processors.

They are cut into parts of about the same work, which several processes take one by one. What a part's work raises as
OSError is raised here; a part whose process died is done again here, so a work must be harmless to repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from backup_worker.snapshots.together import shared_out, weight

FROM = 2000
"""Files of less weight than this are done sooner than processes are started."""
PART = 250
"""The weight of a part."""

T = TypeVar("T")


def are_worth_it(sizes: Sequence[int]) -> bool:
    """Tell whether files of these sizes (in bytes) are done sooner by several processes."""
    return len(sizes) > 1 and weight(len(sizes), sum(sizes)) >= FROM


def in_parts(
    items: Sequence[T],
    sizes: Sequence[int],
    work: Callable[[Sequence[T]], Any],
    *,
    processes: int | None = None,
) -> Iterator[tuple[Sequence[T], Any]]:
    """Yield each part of `items` with what `work` returned for it (which JSON must be able to hold), in any order.

    `sizes` are the bytes of each item. `work` may run in a process of its own: only what it returns and what it does to
    the disk is seen here.
    """
    parts = list(_cut(items, sizes))

    def run(numbers: Iterator[int]) -> Iterator[tuple[int, Any]]:
        for number in numbers:
            try:
                yield number, {"result": work(parts[number])}
            except OSError as error:
                yield number, {"errno": error.errno, "why": error.strerror, "path": error.filename}

    for number, answer in shared_out(len(parts), run, processes=processes):
        if answer is None:
            answer = {"result": work(parts[number])}
        if "result" not in answer:
            raise OSError(answer["errno"], answer["why"], answer["path"])
        yield parts[number], answer["result"]


def _cut(items: Sequence[T], sizes: Sequence[int]) -> Iterator[Sequence[T]]:
    start = heavy = 0
    for number, size in enumerate(sizes):
        heavy += weight(1, size)
        if heavy >= PART:
            yield items[start : number + 1]
            start, heavy = number + 1, 0
    if start < len(items):
        yield items[start:]
