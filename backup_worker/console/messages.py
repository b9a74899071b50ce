"""The bus as a person works with it: what waits where, dead letters, the message log, and replay.

What agents say to each other is shown to nobody here; who talks to whom, when and how much is.
"""

from __future__ import annotations

from typing import Any

from flask import Blueprint, flash, redirect, render_template, request, url_for
from werkzeug.wrappers import Response

from backup_worker import letters
from backup_worker.console import fleet, message_log
from backup_worker.console.actions import needed_reason, note, with_redis
from backup_worker.console.live import view
from backup_worker.units import counted
from em_bridge import logview, replay
from em_bridge.errors import UsageError
from em_bridge.lag import measure

blueprint = Blueprint("messages", __name__)

LETTERS = 50


@blueprint.get("/messages")
def page() -> str:
    """Show what waits, what could not be handled, and who wrote to whom; with `from`, what a replay would do."""
    here = view()
    wanted = {key: request.args.get(key, "").strip() for key in ("sender", "to", "before")}
    log = here.known(lambda client: message_log.read(client, **wanted), message_log.Log((), None))
    start = request.args.get("from", "").strip()
    plan = _plan(start, request.args.get("recipient", "")) if start else None
    return render_template(
        "messages.html", measured=here.known(measure, {}), jobs=here.known(fleet.queue_rows, []),
        letters=here.known(_letters, []), log=log, wanted=wanted,
        plan=plan, start=start, recipient=request.args.get("recipient", ""),
    )  # fmt: skip


def _letters(client: Any) -> list[letters.Letter]:
    return list(letters.newest(client, LETTERS))


def _plan(start: str, recipient: str) -> dict[str, Any]:
    client = with_redis().runtime.redis
    return replay.plan_replay(client, logview.position(start), recipient=recipient or None).as_dict()


@blueprint.get("/messages/dead-letters/<entry>")
def letter_page(entry: str) -> str:
    """Show one dead letter with all that it holds."""
    return render_template("letter.html", letter=letters.get(with_redis().runtime.redis, entry))


@blueprint.post("/messages/dead-letters/<entry>/retry")
def retry(entry: str) -> Response:
    """Have the event tried again."""
    here = with_redis()
    came_of_it = letters.retry(here.runtime.redis, entry)
    note(here, "dead-letter-retry", entry=entry)
    flash(f"Dead letter {entry} {came_of_it}.", "good")
    return redirect(url_for("messages.page"))


@blueprint.post("/messages/dead-letters/<entry>/drop")
def drop(entry: str) -> Response:
    """Take the letter away for good."""
    here = with_redis()
    reason = needed_reason("dropping a dead letter")
    letter = letters.drop(here.runtime.redis, entry)
    note(here, "dead-letter-drop", reason=reason, letter=letter.summary())
    flash(f"Dead letter {entry} is dropped; the record holds what it was.", "good")
    return redirect(url_for("messages.page"))


@blueprint.post("/messages/replay", endpoint="replay")
def deliver_again() -> Response:
    """Deliver again what recipients do not have."""
    here = with_redis()
    start, recipient = request.form.get("from", "").strip(), request.form.get("recipient", "")
    if not start:
        raise UsageError("a replay needs its first entry", hint="an entry id, or a time as 2026-11-23T07:00")
    plan = replay.plan_replay(here.runtime.redis, logview.position(start), recipient=recipient or None)
    done = replay.execute(here.runtime.redis, plan).as_dict()
    note(here, "replay", start=start, recipient=recipient or None, redelivered=done["redelivered"])
    flash(
        f"{counted(done['redelivered'], 'message')} delivered again; {done['already_there']} were there already.",
        "good",
    )
    return redirect(url_for("messages.page"))
