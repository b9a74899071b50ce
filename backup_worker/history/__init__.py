"""The record: one JSON line for everything that was done, each line holding the hash of the one before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backup_worker.history.chain import Report
from backup_worker.history.line import HEALED, ORIGIN, Line, Link, digest
from backup_worker.history.record import History, HistoryUnwritable

if TYPE_CHECKING:
    from backup_worker.config.schedule import Schedule

__all__ = [
    "HEALED",
    "ORIGIN",
    "History",
    "HistoryUnwritable",
    "Line",
    "Link",
    "Report",
    "digest",
    "history_of",
]


def history_of(schedule: Schedule) -> History:
    """Return the record of a configuration, with its limit of size and the head that its repository keeps."""
    from backup_worker.history.head import head_file

    return History(
        schedule.history, max_bytes=schedule.limits.history_bytes, head_file=head_file(schedule.repository)
    )
