"""The restore wizard: what would change and what would be lost, then why, then the agent's name, then it is done.

What is carried out is what was shown: the form carries a mark of it, and if the files have changed meanwhile, the new
picture is shown instead. A living agent is never overwritten; an incident is offered instead, which stops it first.
"""

from __future__ import annotations

import hashlib
import json
import socket
from concurrent.futures import TimeoutError as StillRunning
from dataclasses import asdict, dataclass, field
from typing import Any

from flask import Blueprint, flash, g, redirect, render_template, request, url_for

from backup_worker.console.actions import needed_reason, note
from backup_worker.console.live import View, live, view
from backup_worker.restores import Restore, running
from backup_worker.runtime import Runtime
from backup_worker.snapshots import Changes, RestorePlan, compare
from backup_worker.snapshots.together import alone
from em_bridge.errors import AgentBackupError, UsageError

blueprint = Blueprint("restores", __name__)

WAIT_S = 3.0
"""How long a page waits for a restore; one that takes longer goes on by itself."""

KINDS = ("added", "changed", "removed", "lost")


@dataclass(frozen=True, slots=True)
class Sight:
    """What the wizard knows: the plan with what it would change, or why there is none; and who runs."""

    restore: Restore
    plan: RestorePlan | None
    changes: Changes = field(default_factory=Changes)
    problem: AgentBackupError | None = None
    alive: tuple[str, ...] = ()
    blocked: str = ""

    @property
    def mark(self) -> str:
        """What stands for exactly this: it differs as soon as anything about it does."""
        facts = [self.restore.from_id, self.restore.paths, asdict(self.changes)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    @property
    def is_needed(self) -> bool:
        """Whether anything would change."""
        return bool(self.changes.added or self.changes.changed or self.changes.removed)


def _sight(here: View, identifier: str, agent: str, paths: tuple[str, ...]) -> Sight:
    config = here.config
    root = config.agent(agent).root
    restore = Restore(
        config, here.runtime.repository, agent, root, True, None, identifier, paths, lambda error: None
    )
    try:
        plan = restore.plan()
        changes = compare(plan, root)
    except AgentBackupError as error:
        return Sight(restore, None, problem=error)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        return Sight(restore, None, problem=AgentBackupError(f"“{root}” cannot be read: {reason}"))
    blocked = ""
    alive: tuple[str, ...] = ()
    host = config.agent(agent).host
    if host and host != socket.gethostname():
        blocked = f"it lives on “{host}”, and this console does not: give the command there"
    else:
        try:
            alive = tuple(str(one) for one in running(config, agent))
        except AgentBackupError as error:
            blocked = error.message
    return Sight(restore, plan, changes, alive=alive, blocked=blocked)


@blueprint.get("/snapshots/<tier>/<slot>/<agent>/restore")
def wizard(tier: str, slot: str, agent: str) -> str:
    """Show what a restore from this snapshot would do."""
    identifier = f"{tier}/{slot}/{agent}"
    paths = tuple(path for path in request.args.getlist("path") if path)
    return _page(_sight(view(), identifier, agent, paths), identifier)


def _page(sight: Sight, identifier: str) -> str:
    manifest = view().runtime.repository.get(identifier)
    return render_template("restore.html", sight=sight, snapshot=manifest, kinds=KINDS)


@blueprint.post("/snapshots/<tier>/<slot>/<agent>/restore")
def start(tier: str, slot: str, agent: str) -> Any:
    """Restore, if it is what was shown."""
    here, identifier = view(), f"{tier}/{slot}/{agent}"
    paths = tuple(path for path in request.form.getlist("path") if path)
    reason = needed_reason("a restore")
    if request.form.get("name", "").strip() != agent:
        raise UsageError(
            f"the name that was typed is not “{agent}”", hint="nothing was done; go back and try again"
        )
    sight = _sight(here, identifier, agent, paths)
    if sight.plan is None or sight.alive or sight.blocked:
        return _page(sight, identifier), 409
    if request.form.get("mark") != sight.mark:
        flash("The agent's files have changed since this was shown. Nothing was done; look again.", "warn")
        return _page(sight, identifier), 409
    note(here, "restore", id=identifier, agent=agent, paths=list(paths), reason=reason)
    runtime, who = here.runtime, g.who
    work = live().works.start(f"restore/{agent}", lambda: _carry_out(runtime, sight.restore, who, reason))
    try:
        result = work.result(WAIT_S)
    except StillRunning:
        flash(f"{agent} is being restored; the record will say what came of it.", "info")
    else:
        if result["ok"]:
            flash(
                f"{agent} is restored: {result['files']} files. What stood there is in {result['evidence']}",
                "good",
            )
        else:
            flash(f"{agent} was not restored: {result['error']}", "bad")
    return redirect(url_for("pages.snapshot_page", tier=tier, slot=slot, agent=agent))


def _carry_out(runtime: Runtime, restore: Restore, who: str, reason: str) -> dict[str, Any]:
    try:
        result = alone(restore.work()).as_json()
    except AgentBackupError as error:
        result = {"agent": restore.name, "from": [restore.from_id], "ok": False, "error": error.message}
    runtime.record("restore", **result, by=who, via="console", reason=reason)
    return result
