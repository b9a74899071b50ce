"""Progress of long work: on stderr, and only where that is a terminal; nobody else sees a byte of it.

Nor does who asked for JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def shown(items: Sequence[T], what: str, *, quiet: bool) -> Iterator[T]:
    """Yield `items`, showing how many of them are done unless `quiet`."""
    yield from counted(items, what, len(items), quiet=quiet)


def counted(items: Iterable[T], what: str, total: int, *, quiet: bool) -> Iterator[T]:
    """Yield what comes out of `items`, of which there will be `total`, showing how many have come unless `quiet`."""
    if quiet or total < 2 or not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(items, total=total, description=what)
