"""The watch over the record itself: a broken chain, a cut end, or lines that find no room reach a human.

The whole record is proven every few hours; that lines wait is looked at with everything else. Either alert ends when it
is no longer so. A record that cannot be read is broken, too.
"""

from __future__ import annotations

from typing import Any

from backup_worker.history import kept
from backup_worker.runtime import Runtime

TASK = "record"
EVERY_S = 6 * 3600.0


def write_kept(runtime: Runtime, now: float) -> int:
    """Write the lines that wait, alert those that still do, and return how many that is."""
    kept.write(runtime.redis, runtime.history, now)
    waiting = kept.waiting(runtime.redis)
    if waiting:
        path = runtime.config.schedule.history
        body = f"{waiting} lines wait in Redis, where {kept.MOST} have room; see the disk of {path}"
        runtime.alert("record/unwritten", "critical", "the record cannot be written", body)
    else:
        runtime.resolve("record/unwritten")
    return waiting


def run(runtime: Runtime, now: float) -> dict[str, Any]:
    """Prove the whole record; alert where it breaks."""
    try:
        report = runtime.history.verify()
    except FileNotFoundError:
        return {"lines": 0, "problem": None}
    except OSError as error:
        problem = f"it cannot be read: {(error.strerror or str(error)).lower()}"
        runtime.alert("record/broken", "critical", "the record is broken", problem)
        return {"lines": 0, "problem": problem}
    if report.ok:
        runtime.resolve("record/broken")
    else:
        body = (
            f"at line {report.first_broken}: {report.problem}; the {report.lines} lines before it are proven"
        )
        runtime.alert("record/broken", "critical", "the record is broken", body)
    return {"lines": report.lines, "problem": report.problem}
