"""The command `forget`: let go of every snapshot of an agent that is no more."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from backup_worker.cli._common import opened
from em_bridge import clock
from em_bridge.errors import NotFound, UsageError
from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, emit


def forget(
    agent: Annotated[str, typer.Argument(metavar="AGENT", help="An agent that is not configured any more.")],
    yes: Annotated[
        bool, typer.Option("--yes", help="Also if the agent is configured: its backups begin anew.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Delete every snapshot of an agent. What is pinned, or being read, stays, and makes the exit code 1.

    With the last one goes what else is kept of it: the date of its last drill, and what was approved of its files. An
    agent that is taken out of the configuration keeps its snapshots until then.

    Example: `backup-worker forget leroy --dry-run`
    """
    from backup_worker.forgetting import kept_besides, remove
    from backup_worker.snapshots import RetentionPlan
    from backup_worker.snapshots.retention import forget as delete
    from backup_worker.snapshots.retention import plan_forget

    settings, repo, history = opened(config)
    besides = kept_besides(repo, agent, configured=agent in settings.agents)
    try:
        plan = plan_forget(repo, agent)
    except NotFound:
        if not besides:
            raise
        plan = RetentionPlan()
    if agent in settings.agents and not (yes or dry_run):
        raise UsageError(
            f"“{agent}” is configured; forgetting it deletes the backups of an agent that may need them",
            hint="take it out of agents.json first, or say --yes",
        )
    result: dict[str, Any] = plan.as_json()
    if not dry_run:
        for identifier in (deleted := delete(repo, agent, plan)):
            history.append("forget", now=clock.now(), id=identifier, agent=agent)
        stayed = [decision for decision in result["delete"] if decision["id"] not in deleted]
        result["delete"] = [decision for decision in result["delete"] if decision["id"] in deleted]
        result["keep"] += [{"id": decision["id"], "reasons": ["in use, or gone"]} for decision in stayed]
    result["also"] = [] if result["keep"] else besides
    if not dry_run and result["also"]:
        remove(repo, agent, besides)
        history.append("forget", now=clock.now(), agent=agent, also=besides)
    emit({"agent": agent, **result}, as_json=as_json, render=lambda found: _print(found, dry_run))
    if result["keep"]:
        raise typer.Exit(1)


def _print(result: dict[str, Any], dry_run: bool) -> None:
    word = "would delete" if dry_run else "deleted"
    for decision in result["delete"]:
        typer.echo(f"{word} {decision['id']}")
    for decision in result["keep"]:
        typer.echo(f"kept {decision['id']}: {'; '.join(decision['reasons'])}")
    for what in result["also"]:
        typer.echo(f"{word} {what}")
    typer.echo(f"{word} {len(result['delete'])}, kept {len(result['keep'])}")
