"""The phases of a recovery, what may follow what, and why: one table, of which `docs/recovery.md` shows the drawing.

An incident is open in exactly one phase, and begins in `confirm`, or in `fence` if a human opened it. Any phase may end
in `escalated`, so the table names only the reasons that are a phase's own. Nothing but the table decides which
transitions there are: an incident refuses every other one.
"""

from __future__ import annotations

from dataclasses import dataclass

CONFIRM, FENCE, SELECT, RESTORE = "confirm", "fence", "select", "restore"
DEPEND, START, PROVE = "depend", "start", "prove"
OPEN, RECOVERED, ESCALATED = "open", "recovered", "escalated"


@dataclass(frozen=True, slots=True)
class Phase:
    """What is done in a phase, and for each phase or end that may follow, when it does."""

    name: str
    work: str
    then: tuple[tuple[str, str], ...]
    waits: bool = False
    """Nothing is done in it until a heartbeat or a deadline comes; no worker is held meanwhile."""


TABLE = (
    Phase(
        CONFIRM,
        "ask for the second witness of the death",
        (
            (FENCE, "its process is gone, or a second silence is over, or a human says so"),
            (RECOVERED, "it beats after all, and nothing is changed"),
            (ESCALATED, "it falls silent again and again"),
        ),
        waits=True,
    ),
    Phase(
        FENCE,
        "unless recovery is paused, end the old process and prove it gone",
        (
            (SELECT, "nothing of it is left"),
            (RECOVERED, "it came back while recovery was paused"),
            (ESCALATED, "something survives, or a breaker trips"),
        ),
    ),
    Phase(
        SELECT,
        "find the newest state that can be trusted and was not tried",
        (
            (RESTORE, "it is in a backup"),
            (DEPEND, "it is the one on disk"),
            (ESCALATED, "there is none"),
        ),
    ),
    Phase(
        RESTORE,
        "keep evidence, stage, verify, swap",
        (
            (DEPEND, "the files stand"),
            (SELECT, "the state turned out to be damaged"),
            (ESCALATED, "there is no space"),
        ),
    ),
    Phase(
        DEPEND,
        "wait until all that the agent needs is proven alive",
        (
            (START, "all of it lives, or the agent may start without"),
            (ESCALATED, "nothing was heard of it, and nobody recovers it"),
        ),
        waits=True,
    ),
    Phase(
        START,
        "start the new process",
        ((PROVE, "it was started"), (FENCE, "it cannot be started, and the next older state follows")),
    ),
    Phase(
        PROVE,
        "wait for heartbeats in a row of the new process, and for its health",
        (
            (RECOVERED, "they came"),
            (FENCE, "it ended or was too late, and the next older state follows"),
            (ESCALATED, "that was the last attempt"),
        ),
        waits=True,
    ),
)

PHASES = tuple(phase.name for phase in TABLE)
NEXT = {phase.name: frozenset(name for name, _ in phase.then if name in PHASES) for phase in TABLE}
"""What may follow a phase; an incident may be closed from every phase."""


def drawing() -> str:
    """Return the table as a state diagram of mermaid."""
    lines = ["stateDiagram-v2", f"    [*] --> {CONFIRM}: word of a death", f"    [*] --> {FENCE}: by hand"]
    for phase in TABLE:
        lines += [
            f"    {phase.name}: {phase.name}<br>{phase.work}{' (no worker waits)' if phase.waits else ''}"
        ]
        lines += [f"    {phase.name} --> {name}: {when}" for name, when in phase.then]
    return "\n".join([*lines, f"    {RECOVERED} --> [*]", f"    {ESCALATED} --> [*]"]) + "\n"


def table() -> str:
    """Return the table in Markdown."""
    lines = ["| phase | what is done in it | what follows |", "| --- | --- | --- |"]
    for phase in TABLE:
        after = " · ".join(f"**{name}**: {when}" for name, when in phase.then)
        lines.append(f"| `{phase.name}` | {phase.work} | {after} |")
    return "\n".join(lines) + "\n"
