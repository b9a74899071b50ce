"""The kinds of alerts: for each, how bad it is at worst, what it says, what ends it, and where to look.

The first part of an alert's key is its kind (`missing/daily/z` is of the kind `missing`), and the kind's name is its
anchor in the runbook. Every alert that a human gets carries that link and the command with which to look at it. A
test walks this table, and fails for a kind that nothing raises or ends, and for an alert whose kind is not in it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from backup_worker.config import Severity

RUNBOOK: Final = "docs/runbook.md"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of alert.

    `severity` is the worst it comes with; `ends` says what closes it; `look` is the command to begin with, in which
    `{agent}`, `{tier}` and `{rest}` (of the key) are filled in. One that is `by_name_only` is silenced only by a
    silence that names it; one that is `for_all` goes to every receiver, whatever severities it takes; one that is
    `once` is over as soon as it was told. What is `part_of` something is told together with all that is: of fifty
    deaths at once, nobody wants a page of their silence, one of the deaths, and one of what became of them.
    """

    name: str
    severity: Severity
    title: str
    ends: str
    look: str
    by_name_only: bool = False
    for_all: bool = False
    once: bool = False
    part_of: str = ""

    @property
    def group(self) -> str:
        """What alerts of this kind are told together with."""
        return self.part_of or self.name

    def command(self, key: str, agent: str | None) -> str:
        """Return the command to look at the alert `key` with."""
        _, _, rest = key.partition("/")
        tier, _, last = rest.partition("/")
        found = {"rest": rest, "tier": tier, "agent": agent or last or tier}
        # Somebody will copy it into a shell.
        return self.look.format(**{name: shlex.quote(value) for name, value in found.items()})

    def link(self, runbook: str = RUNBOOK) -> str:
        """Return the place in the runbook (a path or URL) where this kind is explained."""
        return f"{runbook}#{self.name}"


_DEATHS: Final = "deaths"
_A_WEEK: Final = "it is a notice, told once and forgotten after a week"

_TABLE: Final = (
    Kind("failed", "critical", "a backup failed",
         "the next snapshot of the agent in that tier", "backup-worker history --agent {agent} --kind backup-failed"),
    Kind("suspect", "critical", "a snapshot is suspect or partial",
         "the next good snapshot of the agent in that tier", "backup-worker list --agent {agent} --tier {tier}"),
    Kind("missing", "critical", "a scheduled backup is missing",
         "the slot is filled, by schedule or by hand", "backup-worker list --agent {agent} --tier {tier}"),
    Kind("stale", "critical", "the newest good snapshot is too old",
         "a good snapshot of the agent in that tier", "backup-worker list --agent {agent} --tier {tier}"),
    Kind("rot", "critical", "a snapshot is damaged (bit rot)",
         "the snapshot is proven whole, is healed, or is deleted", "backup-worker verify {rest}"),
    Kind("damage", "warning", "a backup came upon damage in what it shares with the one before it",
         "the next backup of the agent in that tier finds none", "backup-worker verify"),
    Kind("healed", "info", "damage in a snapshot was healed", _A_WEEK, "backup-worker show {rest}"),
    Kind("scrub-overdue", "warning", "the verification of snapshots is overdue",
         "every snapshot was read again in time", "backup-worker status"),
    Kind("drill", "critical", "restoring an agent does not work",
         "a drill of the agent works", "backup-worker drill {agent}"),
    Kind("drill-overdue", "warning", "restoring an agent was not proven in time",
         "a drill of the agent works", "backup-worker drill {agent}"),
    Kind("recovery", "warning", "an agent is dead and is being recovered",
         "it is recovered, or its recovery is given up", "backup-worker incidents", part_of=_DEATHS),
    Kind("attempt", "critical", "a critical agent did not come back, and its recovery goes on",
         "it is recovered, or its recovery is given up", "backup-worker incidents", part_of=_DEATHS),
    Kind("escalation", "critical", "an agent could not be recovered",
         "a later recovery of the agent succeeds", "backup-worker incidents", by_name_only=True, part_of=_DEATHS),
    Kind("recovery-paused", "critical", "recovery is paused: dead agents stay dead",
         "`backup-worker resume-recovery`, or the end of its time", "backup-worker status", by_name_only=True),
    Kind("mass-silence", "critical", "much of the fleet fell silent at once",
         "no recovery is going on any more", "backup-worker incidents", by_name_only=True, part_of=_DEATHS),
    Kind("dead-letter", "warning", "events could not be handled",
         "the entry is retried, dropped, or trimmed from the stream", "backup-worker dead-letters list"),
    Kind("lag", "critical", "events wait and nobody takes them",
         "the oldest event has waited for less than a minute", "em-bridge lag"),
    Kind("stuck", "critical", "messages wait and the EM does not route them",
         "the oldest message has waited for less than a minute", "em-bridge lag"),
    Kind("unserved", "critical", "jobs wait in a queue where nobody works",
         "a worker of the queue is there, or the queue is empty", "backup-worker status"),
    Kind("standstill", "critical", "the dispatchers or the workers stand still",
         "the regular look at everything runs again", "backup-worker status", by_name_only=True),
    Kind("unapproved", "critical", "a change was made without an approval",
         "the change is approved, or the last approved state is back", "backup-worker changes"),
    Kind("guard", "warning", "an agent's files cannot be compared with what was approved",
         "they can be read again", "backup-worker history --agent {agent}"),
    Kind("change", "info", "a change waits for approval",
         "it is approved, rejected or applied", "backup-worker changes"),
    Kind("space", "critical", "the repository's disk is full, or nearly so",
         "there is room for the next backups again", "backup-worker doctor"),
    Kind("record", "critical", "the record is broken, or cannot be written",
         "the record is proven, and no line waits", "backup-worker history verify"),
    Kind("memory", "critical", "Redis is nearly out of memory",
         "enough of its memory is free again", "backup-worker status"),
    Kind("redis", "critical", "Redis cannot be reached, or takes nothing",
         "Redis is back", "backup-worker doctor", by_name_only=True),
    Kind("config", "critical", "the configuration is broken; the last good one stays in force",
         "the files can be read again", "backup-worker doctor"),
    Kind("job", "critical", "a job failed for good",
         "the same work succeeds, or the failed job is removed", "backup-worker history --kind job-failed"),
    Kind("ping", "warning", "the dead man's switch cannot be reached",
         "a ping of the tier arrives", "backup-worker history --kind ping"),
    Kind("digest", "info", "the daily digest", "it was told", "backup-worker status", once=True),
    Kind("test", "info", "a test page", "it was told", "backup-worker alerts test", for_all=True, once=True),
)  # fmt: skip

KINDS: Final[Mapping[str, Kind]] = {kind.name: kind for kind in _TABLE}
"""Every kind by its name, in the order in which the runbook tells of them."""


def name_of(key: str) -> str:
    """Return the name of the kind of the alert `key`."""
    return key.partition("/")[0]


def of(key: str) -> Kind:
    """Return the kind of the alert `key`; one that is not in the table is treated as the worst."""
    name = name_of(key)
    return KINDS.get(name) or Kind(name, "critical", name, "nothing", "backup-worker alerts")
