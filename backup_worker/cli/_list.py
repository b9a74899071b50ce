"""The command `list`: which snapshots there are, and when a restore of each agent was last proven."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from backup_worker.cli import _completion
from backup_worker.cli._common import opened
from em_bridge import clock
from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, emit, fail

if TYPE_CHECKING:
    from backup_worker.snapshots import Head, Repository

LONG = 500
"""From so many snapshots on a list is plain columns: drawing a table of 20,000 takes ten seconds."""
PROOFS_NAMED = 12
"""Of how many agents a list names the last proven restore one by one."""


def list_(
    agent: Annotated[
        str | None,
        typer.Option("--agent", metavar="A", help="Only this agent's.", autocompletion=_completion.agents),
    ] = None,
    tier: Annotated[
        str | None,
        typer.Option("--tier", metavar="T", help="Only this tier's.", autocompletion=_completion.tiers),
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Show the snapshots, oldest first.

    Example: `backup-worker list --agent z --tier daily`
    """

    settings, repo, _ = opened(config)
    heads, unreadable = repo.survey(agent, tier)
    if not heads:
        # What is no longer configured may still have snapshots; what has neither is a slip of the keyboard.
        if agent is not None:
            settings.agent(agent)
        if tier is not None:
            settings.tier(tier)
    zone = settings.schedule.timezone
    emit([head.as_row() for head in heads], as_json=as_json, render=lambda _: _print_list(repo, heads, zone))
    for identifier in unreadable:
        fail(f"snapshot “{identifier}” cannot be read", hint=f"run `backup-worker verify {identifier}`")


def _print_list(repo: Repository, heads: list[Head], zone: str) -> None:
    from backup_worker.cli._common import long_table, new_table, show

    if not heads:
        typer.echo("no snapshots")
        return
    columns = ("snapshot", "made", "status", "files", "size", "proven", "")
    proofs = _proofs(repo, sorted({head.agent for head in heads}))
    if len(heads) >= LONG:
        long_table(columns, [_cells(head, zone) for head in heads])
        typer.echo(proofs)
        return
    table = new_table("", *columns)
    for head in heads:
        table.add_row(*_cells(head, zone))
    show(table, proofs)


def _cells(head: Head, zone: str) -> tuple[str, ...]:
    from backup_worker.cli._common import moment, size

    notes = ["pinned"] * head.pinned + ["unapproved"] * (head.approved is False)
    return (
        head.id, moment(head.created_at, zone), "damaged" if head.damaged else head.status, str(head.files),
        size(head.bytes), moment(head.verified_at, zone), ", ".join(notes),
    )  # fmt: skip


def _proofs(repo: Repository, agents: list[str]) -> str:
    """Say when a restore of each agent was last proven by a drill; of many, only of how many, and the oldest."""
    from backup_worker.cli._common import age
    from backup_worker.restoring.proofs import note_of

    now = clock.now()
    notes = {agent: note_of(repo, agent) for agent in agents}
    proven = {agent: note.proven_at for agent, note in notes.items() if note and note.proven_at is not None}
    if len(agents) > PROOFS_NAMED:
        oldest = f", the oldest {age(now - min(proven.values()))} ago" if proven else ""
        return f"restore proven: {len(proven)} of {len(agents)} agents{oldest}"
    ages = (f"{a} {age(now - proven[a])} ago" if a in proven else f"{a} never" for a in agents)
    return f"restore proven: {', '.join(ages)}"
