"""Following the chain: what is proven, where it breaks first, and what no chain of hashes can prove."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from backup_worker.history.head import Head
from backup_worker.history.line import Link, fault, link_of


@dataclass(frozen=True, slots=True)
class Broken:
    """The first line that breaks the chain: its number as it is counted, and what is wrong with it."""

    line: int
    problem: str


@dataclass(frozen=True, slots=True)
class Report:
    """What `verify` found: `ok` only if every line proves the one before it and the noted head is among them.

    `lines` are proven; `first_broken` is the line's number, counted through all files, and `file` the name of the one
    it is in. `head` is the hash of the last proven line, `noted` the line that the repository vouches for.
    """

    ok: bool
    lines: int
    first_broken: int | None
    problem: str | None
    head: str
    unproven: tuple[str, ...]
    file: str | None = None
    noted: Head | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the report as a map for `--json`."""
        return {**asdict(self), "unproven": list(self.unproven)}


def follow(lines: Iterable[bytes], start: Link = Link()) -> Iterator[Link | Broken]:  # noqa: B008  # frozen
    """Yield a link for each line that proves the one before it, then, once and last, what breaks the chain."""
    behind = start
    for raw in lines:
        problem = fault(raw, behind)
        if problem:
            yield Broken(behind.seq + 1, problem)
            return
        behind = link_of(raw)
        yield behind


def unproven(noted: Head | None, last: Link) -> tuple[str, ...]:
    """Return what stays without proof, in words."""
    if noted is None:
        cut = (
            "that no lines were cut off the end: no head is noted in the repository; note this one elsewhere"
        )
    elif noted.seq < last.seq:
        cut = f"that no lines were cut off the end: the repository vouches for line {noted.seq}, not for later ones"
    elif noted.seq > last.seq:
        cut = f"anything behind line {last.seq}: the repository vouches for line {noted.seq}, which was not reached"
    else:
        cut = "that no lines were cut off the end since the last backup, whose line is the last one"
    return (
        cut,
        "that the record and the noted head were not written anew, both, by somebody who can write them",
    )
