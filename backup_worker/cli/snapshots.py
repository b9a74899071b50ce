"""Commands about snapshots that need no Redis: backup, list, show, diff, verify, restore, prune, pin, unpin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from backup_worker.cli import _completion
from backup_worker.cli._common import opened
from backup_worker.cli._completion import IdArgument
from backup_worker.cli._forget import forget
from backup_worker.cli._list import list_
from backup_worker.cli._restore import restore
from backup_worker.units import counted
from em_bridge import clock
from em_bridge.errors import AgentBackupError, NotFound
from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, emit, fail

if TYPE_CHECKING:
    from backup_worker.config import Config
    from backup_worker.history import History
    from backup_worker.snapshots import Manifest, Repository


def add_commands(app: typer.Typer) -> None:
    """Add this group's commands to `app`."""
    for command in (backup, list_, show, diff_, verify, restore, prune, forget, pin, unpin):
        app.command(command.__name__.rstrip("_"))(command)


def backup(
    tier: Annotated[
        str,
        typer.Option(
            "--tier", metavar="T", help="The tier of backup_schedule.json.", autocompletion=_completion.tiers
        ),
    ],
    agents: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[AGENT...]", help="The agents; all if none is named.", autocompletion=_completion.agents
        ),
    ] = None,
    allow_shrink: Annotated[
        bool, typer.Option("--allow-shrink", help="What became smaller was meant to: do not mark it suspect.")
    ] = False,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Back up now, without Redis. Exit code 1 if a backup failed, or is suspect or partial.

    Example: `backup-worker backup z jay --tier weekly`
    """
    from backup_worker.cli._many import back_up

    settings, repo, history = opened(config)
    wanted = settings.tier(tier)
    names = list(dict.fromkeys(agents or settings.agents))
    files = [settings.files_of(name) for name in names]

    def options(now: float) -> dict[str, Any]:
        return {
            "tier": tier, "slot": _slot(settings, tier, now), "include": wanted.include,
            "unchanged": wanted.unchanged, "now": now, "reason": "by hand",
            "limits": settings.snapshot_limits(allow_shrink=allow_shrink),
        }  # fmt: skip

    try:
        made, failed = back_up(repo, history, files, options, quiet=as_json)
    except AgentBackupError as error:
        # Such as a record that cannot be written, because the disk is full.
        _tell_people(settings, tier, [], [{"agent": name, "error": error.message} for name in names])
        raise
    emit({"snapshots": made, "failed": failed}, as_json=as_json, render=_print_backup)
    for failure in failed:
        fail(failure["error"], hint=failure["hint"])
    _tell_people(settings, tier, made, failed)
    if failed or any(row["status"] != "good" for row in made):
        raise typer.Exit(1)


def _tell_people(config: Config, tier: str, made: list[dict[str, Any]], failed: list[dict[str, Any]]) -> None:
    from backup_worker import by_hand
    from backup_worker.runtime import Runtime

    by_hand.tell(Runtime(config), tier, made, failed)


def _slot(config: Config, tier: str, now: float) -> str:
    from backup_worker.schedule import slot_name

    return slot_name(config.tier(tier), config.schedule.timezone, now)


def _print_backup(result: dict[str, Any]) -> None:
    from backup_worker.cli._common import size

    for row in result["snapshots"]:
        unapproved = ", unapproved" if row["approved"] is False else ""
        files = counted(row["files"], "file")
        typer.echo(f"{row['id']}: {row['status']}, {files}, {size(row['bytes'])}{unapproved}")
        for problem in row["problems"]:
            typer.echo(f"  {problem['path']}: {problem['problem']}")
        for warning in row["warnings"]:
            typer.echo(f"  warning: {warning}")


def show(snapshot: IdArgument, config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Show one snapshot: what it says about itself, and every file.

    Example: `backup-worker show weekly/2026-W48/z`
    """
    settings, repo, _ = opened(config)
    manifest = repo.get(snapshot)
    zone = settings.schedule.timezone
    emit(manifest.as_json(), as_json=as_json, render=lambda _: _print_manifest(manifest, zone))


def _print_manifest(manifest: Manifest, zone: str) -> None:
    from backup_worker.cli._common import moment, size
    from backup_worker.snapshots.errors import printable

    approved = {True: f"by {manifest.approved_by or 'somebody'}", False: "by nobody"}
    notes = (["pinned"] if manifest.pinned else []) + (["damaged"] if manifest.damaged else [])
    for name, value in (
        ("snapshot", manifest.id),
        ("status", ", ".join([manifest.status, *notes])),
        ("made", f"{moment(manifest.created_at, zone)} ({manifest.reason})"),
        ("proven", moment(manifest.verified_at, zone)),
        *([("approved", approved[manifest.approved])] if manifest.approved is not None else []),
        ("holds", f"{counted(manifest.files, 'file')}, {size(manifest.bytes)}"),
        ("scope", ", ".join(manifest.scope.include)),
    ):
        typer.echo(f"{name:<9} {value}")
    for problem in manifest.problems:
        typer.echo(f"problem   {printable(problem.path)}: {problem.problem}")
    for warning in manifest.warnings:
        typer.echo(f"warning   {warning}")
    for entry in manifest.entries:
        mark = {"dir": "/", "link": f" -> {printable(entry.target or '')}", "file": ""}[entry.kind]
        bytes_ = size(entry.size) if entry.kind == "file" else ""
        digest = (entry.sha256 or "")[:12]
        typer.echo(f"  {entry.mode:04o} {bytes_:>9} {digest:12} {printable(entry.path)}{mark}")


def diff_(
    old: Annotated[
        str,
        typer.Argument(
            metavar="ID", help="The snapshot to compare from.", autocompletion=_completion.snapshots
        ),
    ],
    new: Annotated[
        str,
        typer.Argument(
            metavar="ID", help="The snapshot to compare with.", autocompletion=_completion.snapshots
        ),
    ],
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Show what changed from one snapshot to another; JSON files key by key.

    Example: `backup-worker diff daily/2026-11-22/z daily/2026-11-23/z`
    """
    from backup_worker.snapshots import diff

    _, repo, _ = opened(config)
    emit(diff(repo, old, new).as_json(), as_json=as_json, render=print_diff)


def print_diff(result: dict[str, Any]) -> None:
    """Print a difference as `diff --json` has it."""
    import json

    from backup_worker.cli._common import plain

    for mark, key in (("+", "added"), ("-", "removed")):
        for path in result[key]:
            typer.echo(f"{mark} {path}")
    for change in result["changed"]:
        sizes = (
            f"{change['old_size']} -> {change['new_size']} bytes"
            if change["what"] == "content"
            else change["what"]
        )
        typer.echo(f"~ {change['path']} ({sizes})")
        for key in change["keys"]:
            old, new = (
                json.dumps(key[side], ensure_ascii=True) if side in key else "—" for side in ("old", "new")
            )
            delta = f" ({key['delta']:+g})" if "delta" in key else ""
            typer.echo(f"    {plain(key['key']) or '(whole)'}: {old} -> {new}{delta}")
    if result["outside"]:
        typer.echo(f"{len(result['outside'])} paths are in the scope of only one of the two")
    if not any(result.values()):
        typer.echo("no difference")


def verify(
    snapshots: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ID...]",
            help="The snapshots; all if none is named.",
            autocompletion=_completion.snapshots,
        ),
    ] = None,
    heal: Annotated[
        bool,
        typer.Option(
            "--heal", help="Replace what is damaged by a sound copy of the same content, if there is one."
        ),
    ] = False,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Read snapshots again, byte by byte, and compare them with their checksums. Exit code 1 if any is (still) bad.

    Example: `backup-worker verify weekly/2026-W48/z --heal`
    """
    _, repo, history = opened(config)
    wanted = list(dict.fromkeys(snapshots)) if snapshots else repo.ids()
    for identifier in wanted:
        if not repo.path(identifier).is_dir():
            raise NotFound(f"there is no snapshot “{identifier}”", hint="see `backup-worker list`")
    result = _read_again(repo, history, wanted, heal=heal, quiet=as_json)
    emit(result, as_json=as_json, render=_print_verified)
    if result["bad"]:
        raise typer.Exit(1)


def _read_again(
    repo: Repository, history: History, wanted: list[str], *, heal: bool, quiet: bool
) -> dict[str, Any]:
    """Prove each snapshot, after mending it with `heal`, and put it on the record; return `ok`, `bad`, and `healed`."""
    from backup_worker.cli._progress import shown
    from backup_worker.snapshots import Sources, heal_snapshot, verify_snapshot
    from backup_worker.snapshots.manifest import split_id

    good: list[str] = []
    bad: list[dict[str, str]] = []
    healed: list[dict[str, str]] = []
    sources = Sources(repo)
    for identifier in shown(wanted, "verifying", quiet=quiet):
        now = clock.now()
        agent = split_id(identifier)[2]
        if heal:
            problems, mended = heal_snapshot(repo, identifier, now, sources)
            for one in mended:
                healed.append({"id": identifier} | one.as_json())
                history.append("heal", now=now, agent=agent, **healed[-1])
        else:
            problems = verify_snapshot(repo, identifier, now)
        if problems:
            bad += [{"id": identifier} | problem.as_json() for problem in problems]
        else:
            good.append(identifier)
        history.append("verify", now=now, id=identifier, agent=agent, ok=not problems)
    return {"ok": good, "bad": bad} | ({"healed": healed} if heal else {})


def _print_verified(result: dict[str, Any]) -> None:
    for problem in result["bad"]:
        typer.echo(f"BAD {problem['id']}: {problem['path']}: {problem['problem']}")
    for one in result.get("healed", ()):
        typer.echo(f"healed {one['id']}: {one['path']}: from {one['from']}")
    damaged = len({problem["id"] for problem in result["bad"]})
    typer.echo(f"{len(result['ok'])} proven, {damaged} bad")


def prune(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be deleted, and why.")
    ] = False,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Apply retention: delete what is no longer to be kept, and the evidence of restores by hand beyond its limits.

    Example: `backup-worker prune --dry-run`
    """
    from backup_worker.recovery import keeping
    from backup_worker.runtime import Runtime
    from backup_worker.snapshots import plan_prune
    from backup_worker.snapshots import prune as delete

    settings, repo, history = opened(config)
    plan = plan_prune(repo, settings.retention(), now=clock.now())
    for identifier in [] if dry_run else delete(repo, plan):
        history.append("prune", now=clock.now(), id=identifier, agent=identifier.rpartition("/")[2])
    if not dry_run:
        keeping.prune(Runtime(settings), clock.now())
    emit(plan.as_json(), as_json=as_json, render=lambda result: _print_plan(result, dry_run))


def _print_plan(result: dict[str, Any], dry_run: bool) -> None:
    word = "would delete" if dry_run else "deleted"
    for decision in result["delete"]:
        typer.echo(f"{word} {decision['id']}: {'; '.join(decision['reasons'])}")
    if dry_run:
        for decision in result["keep"]:
            typer.echo(f"would keep {decision['id']}: {'; '.join(decision['reasons'])}")
    typer.echo(f"{word} {len(result['delete'])}, {'would keep' if dry_run else 'kept'} {len(result['keep'])}")


def pin(snapshot: IdArgument, config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Hold a snapshot: retention never deletes it.

    Example: `backup-worker pin weekly/2026-W48/z`
    """
    _hold(snapshot, config, as_json, held=True)


def unpin(snapshot: IdArgument, config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Let go of a snapshot that was held.

    Example: `backup-worker unpin weekly/2026-W48/z`
    """
    _hold(snapshot, config, as_json, held=False)


def _hold(snapshot: str, config: Any, as_json: bool, *, held: bool) -> None:
    _, repo, history = opened(config)
    if held:
        repo.pin(snapshot)
    else:
        repo.unpin(snapshot)
    history.append(
        "pin" if held else "unpin", now=clock.now(), id=snapshot, agent=snapshot.rpartition("/")[2]
    )
    word = "is pinned: retention never deletes it" if held else "is not pinned"
    emit({"id": snapshot, "pinned": held}, as_json=as_json, render=lambda _: typer.echo(f"{snapshot} {word}"))
