"""What people do here. Every action is a POST with the session's token, has a command that does the same, and is a
line of the record with the name of the user.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from threading import Lock
from typing import Any

from flask import Blueprint, current_app, flash, g, redirect, request, url_for
from werkzeug.wrappers import Response

from backup_worker import alerts, changes
from backup_worker.console.live import View, live, view
from backup_worker.recovery.service import RecoveryService
from backup_worker.runtime import Runtime
from backup_worker.snapshots import Problem, verify_snapshot
from em_bridge import Publisher, clock
from em_bridge.errors import AgentBackupError, RedisUnavailable, UsageError

log = logging.getLogger(__name__)

blueprint = Blueprint("actions", __name__)

PATIENCE_S = 3.0
"""How long a page waits for Redis to take an event."""

VERIFY_WAIT_S = 1.5
"""How long a page waits for a verification; one that takes longer goes on by itself."""

MAX_REASON = 500


def note(here: View, action: str, **facts: Any) -> None:
    """Put an action on the record under the user's name."""
    try:
        here.runtime.record("action", action=action, by=g.who, via="console", **facts)
    except (AgentBackupError, OSError) as error:
        # It is done already; the page says that the record lacks it.
        log.error("%s by %s is not on the record: %s", action, g.who, error)
        flash(f"This is not on the record, which cannot be written: {error}", "bad")


def _with_redis() -> View:
    here = view()
    if here.runtime.client is None:
        raise RedisUnavailable(
            here.redis_problem or "redis is away", hint="nothing was done; try again later"
        )
    return here


def _reason() -> str:
    return request.form.get("reason", "").strip()[:MAX_REASON]


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
    live().forget()
    note(here, "pin" if held else "unpin", id=identifier, agent=agent)
    flash("Pinned: retention never deletes it." if held else "Unpinned: retention decides again.", "good")
    return _snapshot_page(identifier)


class Verifications:
    """Verifications that people asked for, one after the other in a thread of their own."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(1, "verify")
        self._running: dict[str, Future[list[Problem]]] = {}

    def start(self, runtime: Runtime, identifier: str, who: str) -> Future[list[Problem]]:
        """Return the verification of `identifier` that runs, a new one if there is none."""
        with self._lock:
            self._running = {key: one for key, one in self._running.items() if not one.done()}
            if identifier not in self._running:
                self._running[identifier] = self._pool.submit(_verify, runtime, identifier, who)
            return self._running[identifier]

    def is_running(self, identifier: str) -> bool:
        """Tell whether `identifier` is being verified."""
        with self._lock:
            found = self._running.get(identifier)
            return found is not None and not found.done()


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
    running: Verifications = current_app.extensions["backup-worker-verifications"]
    try:
        problems = running.start(here.runtime, identifier, g.who).result(VERIFY_WAIT_S)
    except StillRunning:
        flash("Being verified; the record will say what came of it.", "info")
    else:
        words = "Every byte is as it was written." if not problems else f"Damaged: {len(problems)} problems."
        flash(words, "bad" if problems else "good")
    live().forget()
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
    here, reason = _with_redis(), _reason()
    known = changes.get(here.runtime.redis, change)
    changes.check_decision(known, g.who, yes=yes, signers=here.config.allowed_signers)
    if not yes and not reason:
        raise UsageError(
            "a rejection needs a reason", hint="the one who proposed it wants to know what to change"
        )
    publisher = Publisher(here.runtime.redis, patience_s=PATIENCE_S)
    publish = publisher.config_approved if yes else publisher.config_rejected
    entry = publish(change=change, by=g.who, reason=reason)
    word = "approve" if yes else "reject"
    note(here, word, change=change, agent=known.agent or None, reason=reason, entry=entry)
    flash(f"Change {change} is {'approved; the EM may apply it.' if yes else 'rejected.'}", "good")
    return redirect(url_for("pages.changes_page"))


@blueprint.post("/alerts/acknowledge")
def acknowledge() -> Response:
    """Say that an alert was seen; it is not sent again."""
    here, key = _with_redis(), request.form.get("key", "")
    alert = alerts.acknowledge(here.runtime.redis, key, g.who, here.now)
    note(here, "acknowledge", key=key, agent=alert.agent)
    flash(f"Acknowledged: {alert.title}", "good")
    return redirect(url_for("pages.alerts_page"))


@blueprint.post("/agents/<agent>/recover")
def recover(agent: str) -> Response:
    """Open an incident by hand."""
    here, reason = _with_redis(), _reason()
    here.config.agent(agent)
    if not reason:
        raise UsageError(
            "a recovery by hand needs a reason", hint="it stands in the record and in the incident"
        )
    incident = RecoveryService(here.runtime).open(agent, reason)
    note(here, "recover", agent=agent, incident=incident.id, reason=reason)
    flash(f"Incident {incident.id} is open.", "good")
    return redirect(url_for("pages.incident_page", identifier=incident.id))
