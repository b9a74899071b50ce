"""Several agents at a time, with results in the order that was asked for."""

from __future__ import annotations

import threading

import pytest

from backup_worker.cli._common import side_by_side
from em_bridge import clock


def test_results_come_in_the_order_of_the_items_though_the_first_takes_longest() -> None:
    last_done = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert last_done.wait(10), "the others do not run beside the first"
        elif item == 3:
            last_done.set()
        return item * 10

    assert list(side_by_side(work, range(4))) == [0, 10, 20, 30]


def test_what_has_not_begun_when_one_fails_does_not_begin() -> None:
    begun = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 0:
            raise RuntimeError("no space")
        clock.sleep(0.01)

    with pytest.raises(RuntimeError, match="no space"):
        list(side_by_side(work, range(1000)))
    assert len(begun) < 1000
