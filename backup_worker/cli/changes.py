"""The approval inbox: changes, changes show, approve, reject."""

from __future__ import annotations

import getpass
import inspect
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from em_bridge.errors import UsageError
from em_bridge.terminal import DEFAULT_CONFIG, ConfigOption, JsonOption, RedisUrlOption, emit, group

if TYPE_CHECKING:
    from backup_worker.approval.changes import Change, Rules
    from backup_worker.approval.proposals import FileChange

ChangeArgument = Annotated[str, typer.Argument(help="The change's id.")]
ByOption = Annotated[
    str | None,
    typer.Option(
        "--by",
        metavar="WHO",
        help="Who decides: where allowed_signers exists, a name in it; default: the user you are logged in as.",
    ),
]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why, for the record.")]


def add_commands(app: typer.Typer) -> None:
    """Add this group's commands to `app`."""
    inbox = group(app, "changes", inspect.cleandoc(list_changes.__doc__ or ""))
    inbox.callback(invoke_without_command=True)(list_changes)
    inbox.command()(show)
    app.command()(approve)
    app.command()(reject)


def list_changes(
    context: typer.Context,
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also those that are decided, applied or expired.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the changes that wait for a human; `changes show CHANGE` shows what one of them would change.

    Example: `backup-worker changes --all`
    """
    if context.invoked_subcommand is not None:
        if config != DEFAULT_CONFIG:
            os.environ["BACKUP_CONFIG"] = str(config)
        if redis_url:
            os.environ["REDIS_URL"] = redis_url
        return
    from backup_worker.approval import approvals, changes
    from backup_worker.cli._common import open_runtime

    runtime = open_runtime(config, redis_url)
    found = [
        change.summary()
        for change in changes.all_changes(runtime.redis, approvals.rules(runtime.config))
        if everything or change.state == changes.PROPOSED
    ]
    zone = runtime.config.schedule.timezone
    emit(found, as_json=as_json, render=lambda rows: _print(rows, zone))


def _print(rows: list[dict[str, Any]], zone: str) -> None:
    from backup_worker.cli._common import moment, new_table, show

    if not rows:
        typer.echo("no change waits for a decision")
        return
    table = new_table("", "change", "state", "agent", "paths", "asked by", "since", "decided by", "why")
    for row in rows:
        since = moment(row["proposed_at"] or row["applied_at"], zone)
        table.add_row(
            row["change"], row["state"], row["agent"], ", ".join(row["paths"]), row["by"], since,
            row["decided_by"], row["reason"],
        )  # fmt: skip
    show(table)


def show(
    change: ChangeArgument,
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one change: who asks for it, why, since when, and the difference to the newest backup.

    Numbers are a table old -> new with the delta, text is a unified difference.

    Example: `backup-worker changes show c1`
    """
    from backup_worker.approval import approvals, changes, proposals
    from backup_worker.cli._common import open_runtime

    runtime = open_runtime(config, redis_url)
    rules = approvals.rules(runtime.config)
    known = changes.get(runtime.redis, change, rules)
    heads = runtime.repository.snapshots(known.agent) if known.agent else []
    files = proposals.compare(known, runtime.repository, heads)
    result = known.summary() | {"difference": [one.as_json() for one in files]}
    zone = runtime.config.schedule.timezone
    emit(result, as_json=as_json, render=lambda _: _print_change(known, files, rules, zone))


def _print_change(known: Change, files: list[FileChange], rules: Rules, zone: str) -> None:
    from backup_worker.cli._common import moment, plain

    why = f": {plain(known.reason)}" if known.reason else ", and does not say why"
    asked = f"asked for by {known.by or 'nobody'} at {moment(known.proposed_at, zone)}{why}"
    typer.echo(f"change {known.change} of {known.agent or '-'}: {known.state}, {asked}")
    if known.decision:
        how = ", signed" if known.signed else ""
        reason = f": {plain(known.decided_reason)}" if known.decided_reason else ""
        decided_at = moment(known.decided_at, zone)
        typer.echo(f"{known.decision} by {known.decided_by}{how} at {decided_at}{reason}")
    for refused in known.refused:
        typer.echo(f"does not count: {plain(refused)}")
    for one in files:
        _print_file(one, known.sha256.get(one.path))
    if known.state == "proposed":
        command = f"backup-worker approve {known.change} --proposal {known.proposal}"
        typer.echo(f"\napprove it before {moment(known.expires_at, zone)}: {command}")
        if rules.need_signature:
            typer.echo(f"with a signature of somebody in {rules.signers}: --by NAME --key FILE")


def _print_file(one: FileChange, sha256: str | None) -> None:
    from backup_worker.cli._common import coloured, new_table
    from backup_worker.cli._common import show as show_on_terminal

    where = f"{one.path}  (beside {one.base})" if one.base else one.path
    typer.secho(f"\n{where}", bold=True)
    if one.kind == "json":
        table = new_table("", "key", "old", "new", "delta")
        for key in one.keys:
            delta = "" if key.delta is None else f"{key.delta:+g}"
            old = "—" if key.kind == "added" else str(key.old)
            table.add_row(key.key, old, "—" if key.kind == "removed" else str(key.new), delta)
        show_on_terminal(table)
    elif one.kind in ("text", "new"):
        colours = {"+": "green", "-": "red", "@": "cyan"}
        for mark, line in one.lines:
            show_on_terminal(coloured(mark + line, colours.get(mark, "")))
    else:
        said = {
            "none": "proposed without its content: whoever approves it has seen nothing, and the approval is bound "
            "to the first content that is applied",
            "same": "is so already",
            "opaque": f"{one.size} bytes that are not text, or too many to show",
        }
        typer.echo(said[one.kind])
    if sha256:
        typer.echo(f"sha256 {sha256}")


def approve(
    change: ChangeArgument,
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    by: ByOption = None,
    reason: ReasonOption = "",
    key: Annotated[
        Path | None,
        typer.Option(
            "--key",
            metavar="FILE",
            envvar="BACKUP_SIGNING_KEY",
            help="Sign with this SSH key; a public key is signed with by your ssh-agent.",
        ),
    ] = None,
    signature: Annotated[
        Path | None,
        typer.Option("--signature", metavar="FILE", help="A signature that was made elsewhere; - is stdin."),
    ] = None,
    proposal: Annotated[
        str | None,
        typer.Option(
            "--proposal", metavar="ENTRY", help="Only if it is still this one, as `changes show` prints it."
        ),
    ] = None,
    statement: Annotated[
        bool, typer.Option("--statement", help="Print the bytes to be signed elsewhere, and decide nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say yes to a proposed change; the EM may then apply exactly these bytes.

    Where config/allowed_signers exists, only a signature of somebody in it counts.

    Example: `backup-worker approve c1 --by kari --key ~/.ssh/id_ed25519 --reason "tested on staging"`

    To sign elsewhere: `backup-worker approve c1 --by kari --statement > c1`, there
    `ssh-keygen -Y sign -f KEY -n agent-backup c1`, then `backup-worker approve c1 --by kari --signature c1.sig`
    """
    if sum((key is not None and not statement, signature is not None, statement)) > 1:
        raise UsageError("--key, --signature and --statement exclude each other")
    given = None
    if signature is not None:
        given = sys.stdin.read() if str(signature) == "-" else signature.read_text("utf-8", "replace")
    _decide(
        change,
        config,
        redis_url,
        by,
        reason,
        as_json,
        yes=True,
        key=key,
        given=given,
        proposal=proposal,
        only_statement=statement,
    )


def reject(
    change: ChangeArgument,
    config: ConfigOption = DEFAULT_CONFIG,
    redis_url: RedisUrlOption = None,
    by: ByOption = None,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Say no to a proposed change.

    Example: `backup-worker reject c1 --by kari --reason "too steep"`
    """
    _decide(change, config, redis_url, by, reason, as_json, yes=False)


def _decide(
    change: str,
    config: Path,
    redis_url: str | None,
    by: str | None,
    reason: str,
    as_json: bool,
    *,
    yes: bool,
    key: Path | None = None,
    given: str | None = None,
    proposal: str | None = None,
    only_statement: bool = False,
) -> None:
    from backup_worker.approval import approvals, changes, signatures
    from backup_worker.cli._common import open_runtime

    runtime = open_runtime(config, redis_url)
    rules = approvals.rules(runtime.config)
    who = by or getpass.getuser()
    if only_statement or (key is not None and given is None):
        known = changes.get(runtime.redis, change, rules)
        approvals.check_decision(known, who, yes=yes, rules=rules, proposal=proposal)
        signed = changes.statement(known, who)
        if only_statement:
            sys.stdout.buffer.write(signed)
            return
        assert key is not None
        given = signatures.sign(signed, key.expanduser())
    entry = approvals.decide(
        runtime.redis, change, who, yes=yes, rules=rules, reason=reason, signature=given, proposal=proposal
    )
    word = "approved" if yes else "rejected"
    how = ", signed" if given and rules.need_signature else ""
    result = {"change": change, "decision": word, "by": who, "entry": entry, "signed": bool(how)}
    emit(result, as_json=as_json, render=lambda _: typer.echo(f"change {change} {word} by {who}{how}"))
