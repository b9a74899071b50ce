"""The RQ dashboard at /rq, with its faults mended from outside.

What is wrong with rq-dashboard 0.9 here, and what this module does about it:

- it reads jobs with pickle and its own `Job`: here with `ShownJob`, which reads msgpack only and shows whatever cannot
  be read instead of failing (foreign jobs, results and metadata in other forms, bytes, dependencies, lost jobs);
- requeueing writes `meta` anew (as pickle, by itself): here it is left untouched;
- compacting a queue moves all of it aside (a crash then loses it) and fails on an empty one: here it does neither;
- looking at a list takes unknown jobs out of the queue: here looking changes nothing;
- `requeue all` works by GET: here every change is a POST with the session's token, and a line of the record;
- it connects by itself, anew for each request that names an instance: here it gets the console's own client;
- arguments in its addresses are not checked (an unknown registry or page size was a server error): here they are;
- its markup carries styles, for which a policy would have to allow all inline styles, and fields that a screen reader
  cannot name: here they are taken out, and named;
- descriptions are put into its pages as markup (stored XSS, its issue 526), by a template engine that needs `eval`:
  here `static/rq.js` takes that engine's place, escapes everything and evaluates nothing, under a policy that lets only
  scripts with this response's nonce run.
"""

from __future__ import annotations

import math
import re
from typing import Any

import rq_dashboard.web as dashboard
from flask import Flask, abort, current_app, g, request
from redis import Redis
from rq.exceptions import NoSuchJobError
from rq.job import Job
from rq.worker import Worker
from werkzeug.wrappers import Response

from backup_worker.console.actions import note
from backup_worker.console.live import live, view
from backup_worker.console.security import script_nonce
from backup_worker.console.words import shown
from backup_worker.queueing.queues import BACKUP, MsgpackSerializer, SafeJob, SafeQueue
from em_bridge.errors import AgentBackupError, RedisUnavailable

PREFIX = "/rq"
CHANGING = frozenset(
    f"rq_dashboard.{name}"
    for name in ("delete_job_view", "requeue_job_view", "requeue_all", "empty_queue", "compact_queue")
)
"""The endpoints that change something."""

REGISTRIES = frozenset({"queued", "failed", "deferred", "started", "finished", "canceled", "scheduled"})
_QUEUE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MAX_PER_PAGE = 200
_UNREADABLE = (ValueError, TypeError, AgentBackupError)
"""What reading a job's content can raise, for content that is not ours."""


class ShownJob(SafeJob):
    """A job to look at: what cannot be read is said, and never raised."""

    def get_call_string(self) -> str:
        """Return the call as it would be written, or why there is none."""
        try:
            return super().get_call_string() or ""
        except _UNREADABLE as error:
            return f"({error})"

    def get_meta(self, refresh: bool = True) -> dict[str, Any]:
        """Return the metadata in JSON's own types."""
        try:
            found = plain(super().get_meta(refresh))
        except _UNREADABLE:
            return {"unreadable": "not in msgpack form"}
        return found if isinstance(found, dict) else {"value": found}

    def return_value(self, refresh: bool = False) -> Any:
        """Return the result in JSON's own types."""
        try:
            return plain(super().return_value(refresh))
        except _UNREADABLE:
            return "(not in msgpack form)"

    def latest_result(self, timeout: int = 0) -> Any:
        """Return the newest result, None for one that cannot be read."""
        try:
            return super().latest_result(timeout)
        except _UNREADABLE:
            return None

    @property
    def dependency_ids(self) -> Any:
        """Return the ids as bytes: the dashboard decodes them."""
        return [identifier.encode() for identifier in super().dependency_ids]


class _Requeued(SafeJob):
    """A job on its way back into its queue: its metadata stays as it is."""

    def to_dict(self, include_meta: bool = True, include_result: bool = True) -> Any:
        return super().to_dict(include_meta=False, include_result=include_result)


class ShownQueue(SafeQueue):
    """A queue to look at."""

    job_class = ShownJob

    def fetch_job(self, job_id: str) -> Job | None:
        """Return the job, None if it is gone; RQ's own takes the id of a lost job out of the queue as well."""
        try:
            return ShownJob.fetch(job_id, connection=self.connection, serializer=MsgpackSerializer)
        except NoSuchJobError:
            return None
        except _UNREADABLE as error:
            broken = ShownJob(job_id, connection=self.connection, serializer=MsgpackSerializer)
            broken.description = f"(not readable: {error})"
            return broken

    def compact(self) -> None:
        """Take the ids of lost jobs out of the queue; RQ's own moves all of it aside, and fails on an empty one."""
        for job_id in self.get_job_ids():
            if not ShownJob.exists(job_id, connection=self.connection):
                self.connection.lrem(self.key, 0, job_id)


class ShownWorker(Worker):
    """A worker to look at."""

    job_class = ShownJob
    queue_class = ShownQueue

    def get_current_job(self) -> Job | None:
        """Return what it works on; None if that job is gone meanwhile."""
        try:
            return super().get_current_job()
        except (NoSuchJobError, *_UNREADABLE):
            return None


def requeue(job_id: str, connection: Redis, serializer: Any = None) -> Job:
    """Put a failed job back into its queue. Raises NoSuchJobError, InvalidJobOperation."""
    return _Requeued.fetch(job_id, connection=connection, serializer=MsgpackSerializer).requeue()


def plain(found: Any) -> Any:
    """Return `found` in JSON's own types."""
    if isinstance(found, bytes | bytearray):
        return shown(bytes(found))
    if isinstance(found, float):
        return found if math.isfinite(found) else str(found)
    if isinstance(found, str | int | None):
        return found
    if isinstance(found, dict):
        return {str(plain(key)): plain(item) for key, item in found.items()}
    if isinstance(found, list | tuple | set | frozenset):
        return [plain(item) for item in found]
    return str(found)


def _mend() -> None:
    """Replace the parts of the dashboard's module that are at fault; it looks them up at each request."""
    replacements: dict[str, Any] = {
        "Job": ShownJob, "Queue": ShownQueue, "Worker": ShownWorker, "requeue_job": requeue,
        "from_url": lambda *_, **__: (None, _client()),
    }  # fmt: skip
    for name, replacement in replacements.items():
        if not hasattr(dashboard, name):
            raise AgentBackupError(f"this version of rq-dashboard has no “{name}”, which has to be replaced")
        setattr(dashboard, name, replacement)
    dashboard.config.serializer = MsgpackSerializer


def _client() -> Redis:
    here = view()
    if here.runtime.client is None:
        raise RedisUnavailable(
            here.redis_problem or "redis is away", hint="the queues are shown again when it is back"
        )
    return here.runtime.client


def mount(app: Flask) -> None:
    """Add the dashboard to `app`, behind its lock."""
    _mend()
    with app.app_context():
        app.config["RQ_DASHBOARD_REDIS_URL"] = (live().address,)
    app.config["RQ_DASHBOARD_POLL_INTERVAL"] = 2500
    app.before_request(_before)
    app.after_request(_after)
    app.register_blueprint(dashboard.blueprint, url_prefix=PREFIX)
    app.context_processor(lambda: {"script_nonce": script_nonce})


def _before() -> None:
    """Check what the dashboard does not check itself."""
    if request.blueprint != "rq_dashboard" or request.view_args is None:
        return
    if request.endpoint in CHANGING and request.method != "POST":
        abort(405, "changes are made by POST only")
    if request.endpoint in ("rq_dashboard.static", "rq_dashboard.favicon"):
        current_app.redis_conn = live().client  # type: ignore[attr-defined]  # asked for here too, and not used
        return
    given = request.view_args
    if given.get("instance_number", 0) != 0:
        abort(404, "there is one Redis here")
    if given.get("queue_name", "") is None:
        given["queue_name"] = BACKUP
    if not (
        _QUEUE_NAME.fullmatch(given.get("queue_name", BACKUP))
        and given.get("registry_name", "queued") in REGISTRIES
        and given.get("order", "asc") in ("asc", "dsc")
        and _number(given.get("page", 1)) >= 1
        and 1 <= _number(given.get("per_page", 1)) <= _MAX_PER_PAGE
    ):
        abort(404, "there is no such list of jobs")
    current_app.redis_conn = _client()  # type: ignore[attr-defined]  # where the dashboard looks for it


def _number(text: Any) -> int:
    return int(text) if re.fullmatch(r"\d{1,9}", str(text)) else 0


_STYLE = re.compile(r"""\sstyle=("[^"]*"|'[^']*')""")


_TITLED_FIELD = re.compile(r'(<(?:input|select)\b[^>]*?)title="')


def _without_styles(found: re.Match[str]) -> str:
    # What its script shows later is hidden by our style sheet until then.
    return " data-off" if "none" in found[1] else ""


def _after(response: Response) -> Response:
    """Take styles out of the markup, which the policy refuses, name its fields, and put what was done on the record."""
    if request.blueprint == "rq_dashboard" and response.mimetype == "text/html":
        page = _STYLE.sub(_without_styles, response.get_data(as_text=True))
        response.set_data(_TITLED_FIELD.sub(r'\1aria-label="', page))
    if (
        request.endpoint in CHANGING
        and request.method == "POST"
        and response.status_code == 200
        and "who" in g
    ):
        name = request.endpoint.rpartition(".")[2].removesuffix("_view").replace("_", "-")
        note(view(), f"rq-{name}", **(request.view_args or {}))
    return response
