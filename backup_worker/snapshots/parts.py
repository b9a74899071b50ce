"""The many files of one agent, shared out in parts over the processors.

They are cut into parts, which as many processes as there are processors take one by one. What a part's work raises as
OSError is raised here; a part whose process died is done again here, so a work must be harmless to repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from backup_worker.snapshots.together import shared_out

FROM = 2000
"""Fewer files than this are done sooner than processes are started."""
PART = 250

T = TypeVar("T")


def in_parts(
    items: Sequence[T], work: Callable[[Sequence[T]], Any], *, processes: int | None = None
) -> Iterator[tuple[Sequence[T], Any]]:
    """Yield each part of `items` with what `work` returned for it (which JSON must be able to hold), in any order.

    `work` may run in a process of its own: only what it returns and what it does to the disk is seen here.
    """
    parts = [items[start : start + PART] for start in range(0, len(items), PART)]

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
