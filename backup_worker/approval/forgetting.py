"""How long the inbox remembers: records of changes that are over are forgotten, by age, number and size.

Promise: a change that can still be approved, or is approved and waits to be applied, is kept until it is too old for
both; what came in within the last day is kept, for a job may still be at it. What is forgotten stays on the record (the
history), and nothing can come of it any more: an application under its name finds no approval.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from backup_worker.approval import approvals, changes
from backup_worker.approval.changes import APPLIED, EXPIRED, REJECTED, Change, Rules

if TYPE_CHECKING:
    from redis import Redis

KEEP_S = 90 * 86400.0
"""What was heard of last before that is forgotten; later, if proposals may be approved for longer."""

MOST, MOST_BYTES = 2000, 64 * 1024 * 1024
"""So many changes that are over are kept, the newest, and so many bytes of proposed content of them."""

FRESH_S = 86400.0
_OVER = (APPLIED, REJECTED, EXPIRED)


def to_forget(known: Iterable[Change], now: float, *, keep_s: float = KEEP_S) -> list[str]:
    """Return the names of the changes to forget at `now` (Unix seconds); `known` are settled. Pure."""
    forgotten, number, size = [], 0, 0
    for one in sorted(known, key=changes.last_at, reverse=True):
        age_s = now - changes.last_at(one)
        if one.state in _OVER:
            number += 1
            size += sum(map(len, (one.proposed or {}).values()))
        too_many = one.state in _OVER and (number > MOST or size > MOST_BYTES)
        if age_s > keep_s or (too_many and age_s > FRESH_S):
            forgotten.append(one.change)
    return forgotten


def forget(client: Redis, rules: Rules, now: float) -> int:
    """Forget what is to be forgotten; return how many changes that were."""
    found = changes.all_changes(client, rules)
    known = {one.change: changes.last_at(one) for one in found}
    names = to_forget(found, now, keep_s=max(KEEP_S, 2 * (rules.expire_s or 0.0)))

    def attempt(pipe: Any) -> int:
        records = map(changes.record_of, pipe.hmget(changes.RECORDS, names))
        # Something may have been heard of one meanwhile.
        same = [
            one.change for one in records if one is not None and changes.last_at(one) == known[one.change]
        ]
        pipe.multi()
        if same:
            pipe.hdel(changes.RECORDS, *same)
            pipe.hdel(approvals.BOUND, *same)
        return len(same)

    if not names:
        return 0
    watching: Any = client
    return int(watching.transaction(attempt, changes.RECORDS, value_from_callable=True))
