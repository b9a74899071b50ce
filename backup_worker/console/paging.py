"""Long lists in parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from flask import request

PER_PAGE = 50
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Page(Generic[Row]):
    """A part of a long list."""

    rows: Sequence[Row]
    number: int
    last: int
    total: int


def paged(rows: Sequence[Row], per_page: int = PER_PAGE, named: str = "page") -> Page[Row]:
    """Return the part of `rows` that the argument `named` asks for, the nearest if there is no such part."""
    last = max(1, -(-len(rows) // per_page))
    number = min(max(1, request.args.get(named, 1, int)), last)
    return Page(rows[(number - 1) * per_page : number * per_page], number, last, len(rows))
