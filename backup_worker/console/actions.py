"""What people do here. Every action is a POST with the session's token, has a command that does the same, and is a
line of the record with the name of the user.
"""

from __future__ import annotations

import logging
from concurrent.futures import TimeoutError as StillRunning
from typing import Any

from flask import Blueprint, flash, g, redirect, request, url_for
from werkzeug.wrappers import Response

from backup_worker import alerts
from backup_worker.approval import approvals, changes
from backup_worker.console.live import View, live, view
from backup_worker.console.security import local_path
from backup_worker.recovery.service import RecoveryService
from backup_worker.runtime import Runtime
from backup_worker.snapshots import Problem, verify_snapshot
from em_bridge import clock
from em_bridge.errors import AgentBackupError, RedisUnavailable, UsageError

log = logging.getLogger(__name__)

blueprint = Blueprint("actions", __name__)

PATIENCE_S = 3.0
"""How long a page waits for Redis to take an event."""

VERIFY_WAIT_S = 1.5
"""How long a page waits for a verification; one that takes longer goes on by itself."""

MAX_REASON = 500
SILENCE_HOURS = ("1", "4", "24", "168")


def note(here: View, action: str, **facts: Any) -> None:
    """Put an action on the record under the user's name."""
    try:
        here.runtime.record("action", action=action, by=g.who, via="console", **facts)
    except (AgentBackupError, OSError) as error:
        # It is done already; the page says that the record lacks it.
        log.error("%s by %s is not on the record: %s", action, g.who, error)
        flash(f"This is not on the record, which cannot be written: {error}", "bad")


def with_redis() -> View:
    """Return the request's view; raises RedisUnavailable, so that nothing is half done without Redis."""
    here = view()
    if here.runtime.client is None:
        raise RedisUnavailable(
            here.redis_problem or "redis is away", hint="nothing was done; try again later"
        )
    return here


def reason_given() -> str:
    """Return the reason that the form gives, without space around it."""
    return request.form.get("reason", "").strip()[:MAX_REASON]


def needed_reason(what: str) -> str:
    """Return the reason; raises UsageError if there is none."""
    found = reason_given()
    if not found:
        raise UsageError(f"{what} needs a reason", hint="it stands in the record beside your name")
    return found


def back(otherwise: str) -> Response:
    """Return to the page that the form was on."""
    return redirect(local_path(request.form.get("back", ""), otherwise))


def _snapshot_page(identifier: str) -> Response:
    tier, slot, agent = identifier.split("/")
    return redirect(url_for("pages.snapshot_page", tier=tier, slot=slot, agent=agent))


@blueprint.post("/snapshots/<tier>/<slot>/<agent>/pin")
def pin(tier: str, slot: str, agent: str) -> Response:
    """Hold a snapshot."""
    return _set_pin(f"{tier}/{slot}/{agent}", agent, held=True)


@blueprint.post("/snapshots/<tier>/<slot>/<agent>/unpin")
def unpin(tier: str, slot: str, agent: str) -> Response:
    """Let a snapshot go."""
    return _set_pin(f"{tier}/{slot}/{agent}", agent, held=False)


def _set_pin(identifier: str, agent: str, *, held: bool) -> Response:
    here = view()
    change = here.runtime.repository.pin if held else here.runtime.repository.unpin
    change(identifier)
    live().shelf.renew(here.runtime.repository, identifier)
    note(here, "pin" if held else "unpin", id=identifier, agent=agent)
    flash("Pinned: retention never deletes it." if held else "Unpinned: retention decides again.", "good")
    return _snapshot_page(identifier)


def _verify(runtime: Runtime, identifier: str, who: str) -> list[Problem]:
    problems = verify_snapshot(runtime.repository, identifier, clock.now())
    agent = identifier.rpartition("/")[2]
    runtime.record(
        "verify", id=identifier, agent=agent, ok=not problems, by=who, via="console",
        problems=[problem.as_json() for problem in problems[:10]],
    )  # fmt: skip
    if runtime.client is not None:
        if problems:
            body = "; ".join(f"{problem.path}: {problem.problem}" for problem in problems[:10])
            runtime.alert(
                f"rot/{identifier}", "critical", f"snapshot {identifier} is damaged", body, agent=agent
            )
        else:
            runtime.resolve(f"rot/{identifier}")
    return problems


@blueprint.post("/snapshots/<tier>/<slot>/<agent>/verify")
def verify(tier: str, slot: str, agent: str) -> Response:
    """Read a snapshot again and compare it with its checksums."""
    here, identifier = view(), f"{tier}/{slot}/{agent}"
    here.runtime.repository.get_head(identifier)
    runtime, who = here.runtime, g.who
    running = live().works.start(f"verify/{identifier}", lambda: _verify(runtime, identifier, who))
    try:
        problems = running.result(VERIFY_WAIT_S)
    except StillRunning:
        flash("Being verified; the record will say what came of it.", "info")
    else:
        words = "Every byte is as it was written." if not problems else f"Damaged: {len(problems)} problems."
        flash(words, "bad" if problems else "good")
    live().shelf.renew(here.runtime.repository, identifier)
    return _snapshot_page(identifier)


@blueprint.post("/changes/<change>/approve")
def approve(change: str) -> Response:
    """Say yes to a proposed change."""
    return _decide(change, yes=True)


@blueprint.post("/changes/<change>/reject")
def reject(change: str) -> Response:
    """Say no to a proposed change."""
    return _decide(change, yes=False)


def _decide(change: str, *, yes: bool) -> Response:
    here, reason = with_redis(), reason_given()
    if not yes:
        needed_reason("a rejection")
    known = changes.get(here.runtime.redis, change)
    signature = request.form.get("signature", "").replace("\r\n", "\n").strip()
    entry = approvals.decide(
        here.runtime.redis, change, g.who, yes=yes, rules=approvals.rules(here.config), reason=reason,
        signature=signature + "\n" if signature else None, proposal=request.form.get("proposal"),
        patience_s=PATIENCE_S,
    )  # fmt: skip
    word = "approve" if yes else "reject"
    note(here, word, change=change, agent=known.agent or None, reason=reason, entry=entry)
    flash(f"Change {change} is {'approved; the EM may apply it.' if yes else 'rejected.'}", "good")
    return redirect(url_for("pages.changes_page"))


@blueprint.get("/changes/<change>/statement")
def statement(change: str) -> Response:
    """Send what this user has to sign to approve a change."""
    here = with_redis()
    text = changes.statement(changes.get(here.runtime.redis, change, approvals.rules(here.config)), g.who)
    headers = {"Content-Disposition": "attachment; filename=statement"}
    return Response(text, content_type="application/octet-stream", headers=headers)


@blueprint.post("/alerts/acknowledge")
def acknowledge() -> Response:
    """Say that an alert was seen; it is not sent again."""
    here, key = with_redis(), request.form.get("key", "")
    alert = alerts.acknowledge(here.runtime.redis, key, g.who, here.now)
    note(here, "acknowledge", key=key, agent=alert.agent)
    flash(f"Acknowledged: {alert.title}", "good")
    return redirect(url_for("pages.alerts_page"))


@blueprint.post("/silences")
def silence() -> Response:
    """Do not send some alerts for a while."""
    here = with_redis()
    hours, why = request.form.get("hours", ""), needed_reason("a silence")
    if hours not in SILENCE_HOURS:
        raise UsageError("a silence needs an end", hint=f"in hours: {', '.join(SILENCE_HOURS)}")
    names = request.form.get("names", "").split()
    begun = here.runtime.silence(names, for_s=3600.0 * int(hours), by=g.who, why=why)
    note(here, "silence", id=begun.id, names=names, reason=why)
    flash(f"Silence {begun.id} has begun; the alerts are still raised, shown and on the record.", "good")
    return redirect(url_for("pages.alerts_page"))


@blueprint.post("/silences/<identifier>/end")
def unsilence(identifier: str) -> Response:
    """End a silence early."""
    here = with_redis()
    here.runtime.unsilence(identifier, by=g.who)
    note(here, "unsilence", id=identifier)
    flash(f"Silence {identifier} has ended; what it held back is sent.", "good")
    return redirect(url_for("pages.alerts_page"))


@blueprint.post("/agents/<agent>/recover")
def recover(agent: str) -> Response:
    """Open an incident by hand."""
    here = with_redis()
    here.config.agent(agent)
    reason = needed_reason("a recovery by hand")
    incident = RecoveryService(here.runtime).open(agent, reason)
    note(here, "recover", agent=agent, incident=incident.id, reason=reason)
    flash(f"Incident {incident.id} is open.", "good")
    return redirect(url_for("incidents.page", identifier=incident.id))


@blueprint.post("/recovery/pause")
def pause() -> Response:
    """Hold all recoveries that have not begun to act."""
    here, reason = with_redis(), needed_reason("a pause of all recoveries")
    hours = request.form.get("hours", "")
    until = here.now + 3600 * float(hours) if hours in ("1", "4", "24") else None
    RecoveryService(here.runtime).pause(g.who, reason, until=until)
    note(here, "pause-recovery", reason=reason, until=until)
    return back(url_for("pages.fleet_page"))


@blueprint.post("/recovery/resume")
def resume() -> Response:
    """Let recovery go on."""
    here = with_redis()
    ended = RecoveryService(here.runtime).resume(g.who)
    if ended is not None:
        note(here, "resume-recovery")
    flash(
        "Recovery goes on." if ended else "Recovery was not paused (any more).", "good" if ended else "info"
    )
    return back(url_for("pages.fleet_page"))
