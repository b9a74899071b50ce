"""The application: pages, actions, the RQ dashboard, behind one lock; and what a browser sees when something fails.

An error of ours is shown with its hint under the status that fits it; Redis going away is 503; anything else is 500
with a number that stands in the log beside the traceback, which never leaves the machine.
"""

from __future__ import annotations

import logging
import secrets
from typing import Any

import redis.exceptions
from flask import Flask, Response, jsonify, render_template, request
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from werkzeug.exceptions import HTTPException

from backup_worker import alerts
from backup_worker.approval import changes
from backup_worker.console import (
    actions,
    feed,
    files,
    incidents,
    messages,
    metrics,
    pages,
    restores,
    rq,
    words,
)
from backup_worker.console.live import Live, live, view
from backup_worker.console.roles import ACCESS
from backup_worker.console.security import secure
from backup_worker.recovery.incident import IncidentStore
from backup_worker.runtime import Runtime
from backup_worker.snapshots.errors import printable
from em_bridge import connection
from em_bridge.errors import AgentBackupError, NotFound, RedisUnavailable, UsageError

log = logging.getLogger(__name__)

MAX_FORM_BYTES = 64 * 1024
_PLAIN = {
    404: "there is no such page",
    413: "that is more than a form may send",
    500: "something went wrong here",
}
_STATUS = ((NotFound, 404), (RedisUnavailable, 503), (UsageError, 400))


def create_app(runtime: Runtime, *, loopback: bool = True) -> Flask:
    """Return the console as a WSGI application; `loopback` says that it is reachable from this machine alone.

    Raises ConfigError, and UsersError if the users or the session key cannot be read.
    """
    app = Flask(__name__)
    app.response_class = _Answer
    app.config["MAX_CONTENT_LENGTH"] = MAX_FORM_BYTES
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    shared = app.extensions["backup-worker-live"] = Live(runtime)
    secure(app, loopback=loopback)
    for room in (pages, actions, files, restores, incidents, messages):
        app.register_blueprint(room.blueprint)
    feed.mount(app, shared)
    metrics.mount(app)
    rq.mount(app)
    _add_words(app)
    _add_error_pages(app)
    _check_access(app)
    return app


def warm(app: Flask) -> None:
    """Have ready what the first page would otherwise wait for: snapshots, heartbeats, compiled templates."""
    with app.app_context():
        here = view()
        here.live.shelf.heads(here.runtime.repository)
        here.known(here.live.beats.read, None)
        for name in app.jinja_env.list_templates(extensions=["html"]):
            app.jinja_env.get_template(name)


class _Answer(Response):
    """An answer that can always be sent: names of files and words of agents need not be text that UTF-8 can carry."""

    def set_data(self, value: bytes | str) -> None:
        super().set_data(value.encode("utf-8", "backslashreplace") if isinstance(value, str) else value)


def _check_access(app: Flask) -> None:
    """Refuse to start with an address that the table of roles does not name, or a name without an address."""
    known = {rule.endpoint for rule in app.url_map.iter_rules()}
    if strangers := known ^ ACCESS.keys():
        raise AgentBackupError(f"the table of roles does not agree with the addresses: {sorted(strangers)}")


def _add_words(app: Flask) -> None:
    app.jinja_env.filters.update(
        ago=lambda at: words.ago(at, view().now),
        moment=lambda at: words.moment(at, view().zone),
        day=lambda at: words.day(at, view().zone),
        clock_time=lambda at: words.clock_time(at, view().zone),
        iso=words.iso,
        duration=words.duration,
        size=words.size,
        value=words.value,
        signed=words.signed,
        printable=printable,
        word=words.word,
        shown=words.shown,
    )
    app.context_processor(lambda: {"view": view(), "live": live(), "badges": _badges})


def _badges() -> dict[str, int]:
    """Return how much waits on which page, for the numbers beside their names."""
    here = view()
    alone = [one for one in here.known(alerts.open_alerts, []) if one.acknowledged_at is None]
    return {
        "incidents": here.known(lambda client: len(IncidentStore(client).open_ids()), 0),
        "alerts": len(alone),
        "changes": sum(one.state == changes.PROPOSED for one in here.changes),
    }


def _add_error_pages(app: Flask) -> None:
    app.register_error_handler(HTTPException, _refused)
    app.register_error_handler(AgentBackupError, _failed)
    app.register_error_handler(redis.exceptions.RedisError, _redis_failed)
    app.register_error_handler(NoSuchJobError, lambda _: _say(404, "there is no such job (any more)"))
    app.register_error_handler(
        InvalidJobOperation, lambda _: _say(409, "this job is not in a state for that")
    )
    app.register_error_handler(Exception, _broken)


def _refused(error: HTTPException) -> Any:
    if error.code is not None and error.code < 400:
        return error
    status = error.code or 500
    return _say(status, _PLAIN.get(status) or error.description or error.name)


def _failed(error: AgentBackupError) -> Any:
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    return _say(status, error.message, error.hint)


def _redis_failed(error: redis.exceptions.RedisError) -> Any:
    translated = connection.translate(error, live().client or "")
    if translated is None:
        return _broken(error)
    return _say(503, translated.message, translated.hint)


def _broken(error: Exception) -> Any:
    number = secrets.token_hex(4)
    log.error("console error %s at %s %s", number, request.method, request.path, exc_info=error)
    return _say(500, f"something went wrong here; the log has the details under number {number}")


def _say(status: int, message: str, hint: str | None = None) -> Any:
    wants_json = request.path.endswith(".json") or "text/html" not in request.headers.get(
        "Accept", "text/html"
    )
    try:
        if wants_json:
            return jsonify(error=message, hint=hint), status
        return render_template("error.html", status=status, message=message, hint=hint), status
    except Exception as broken:
        # The last resort, so that nothing leaves here as a traceback; the users cannot even be read, say.
        log.error("the page about an error cannot be drawn", exc_info=broken)
        return f"{message}\n", status, {"Content-Type": "text/plain; charset=utf-8"}
