"""The restore wizard: what would change and what would be lost, then why, then the agent's name, then it is done.

It is seen and done where the agent's files are: here, or by a worker of the agent's host, as a job in that host's
queue, whose result this page waits for. What is carried out is what was shown; a living agent is never overwritten: an
incident is offered instead, which stops it first.
"""

from __future__ import annotations

import secrets
from concurrent.futures import TimeoutError as StillRunning
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, flash, g, redirect, render_template, request, url_for
from rq.exceptions import NoSuchJobError
from rq.job import JobStatus
from werkzeug.wrappers import Response

from backup_worker.console.actions import needed_reason, note, with_redis
from backup_worker.console.live import View, live, view
from backup_worker.dispatcher import Job, rq_job
from backup_worker.queueing import hosts, queues
from backup_worker.restoring.orders import KINDS, Order, Preview, carry_out, preview
from em_bridge import clock
from em_bridge.errors import NotFound, UsageError

blueprint = Blueprint("restores", __name__)

WAIT_S = 3.0
"""How long a page waits for a restore; one that takes longer goes on by itself."""

LOOKED_EVERY_S = 0.05
ORDER_S = 900.0
"""For how long an order waits for a worker of its host: a restore must not come hours later as a surprise."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What another host was asked, and its answer: none while it has not come, or what went `wrong`."""

    job: str
    answer: dict[str, Any] | None = None
    wrong: str = ""


def _order(tier: str, slot: str, agent: str) -> Order:
    return Order(
        agent, f"{tier}/{slot}/{agent}", tuple(path for path in request.values.getlist("path") if path)
    )


def _address(order: Order, asked: str | None = None) -> str:
    tier, slot, agent = order.from_id.split("/")
    return url_for("restores.wizard", tier=tier, slot=slot, agent=agent, path=list(order.paths), asked=asked)


@blueprint.get("/snapshots/<tier>/<slot>/<agent>/restore")
def wizard(tier: str, slot: str, agent: str) -> str:
    """Show what a restore from this snapshot would do."""
    here, order = view(), _order(tier, slot, agent)
    if hosts.elsewhere(here.config, agent) is None:
        return _page(order, seen=preview(here.runtime, order))
    job = request.args.get("asked", "")
    asked = _asked(with_redis(), order, job) if job else None
    answer = asked.answer if asked else None
    seen = Preview.of_result(answer) if answer is not None and "mark" in answer else None
    return _page(order, seen=seen, asked=asked)


def _page(order: Order, seen: Preview | None = None, asked: Asked | None = None) -> str:
    here = view()
    host = hosts.elsewhere(here.config, order.agent)
    waits = asked is not None and asked.answer is None and not asked.wrong
    queue = queues.name_of(queues.BACKUP, host)
    return render_template(
        "restore.html", order=order, seen=seen, asked=asked, waits=waits, host=host, kinds=KINDS,
        snapshot=here.runtime.repository.get(order.from_id),
        unserved=waits and here.known(lambda client: hosts.unserved(client, {queue: 1}), set()),
    )  # fmt: skip


@blueprint.post("/snapshots/<tier>/<slot>/<agent>/restore/look")
def look(tier: str, slot: str, agent: str) -> Response:
    """Have the agent's host say what a restore would do there."""
    here, order = with_redis(), _order(tier, slot, agent)
    here.runtime.repository.get_head(order.from_id)
    return redirect(_address(order, _ask(here, order).job))


@blueprint.post("/snapshots/<tier>/<slot>/<agent>/restore")
def start(tier: str, slot: str, agent: str) -> Any:
    """Restore, if it is what was shown."""
    here, order = view(), _order(tier, slot, agent)
    reason, mark = needed_reason("a restore"), request.form.get("mark", "")
    if request.form.get("name", "").strip() != agent:
        raise UsageError(
            f"the name that was typed is not “{agent}”", hint="nothing was done; go back and try again"
        )
    if hosts.elsewhere(here.config, agent) is not None:
        # Without a mark the job would only look.
        return _start_there(with_redis(), order, mark or "none", reason)
    seen = preview(here.runtime, order)
    if seen.problem or seen.alive or seen.mark != mark:
        if not (seen.problem or seen.alive):
            flash(
                "The agent's files have changed since this was shown. Nothing was done; look again.", "warn"
            )
        return _page(order, seen=seen), 409
    _note(here, order, reason)
    runtime, who = here.runtime, g.who
    work = live().works.start(
        f"restore/{agent}", lambda: carry_out(runtime, order, mark, by=who, reason=reason)
    )
    try:
        _tell(order, work.result(WAIT_S))
    except StillRunning:
        flash(f"{agent} is being restored; the record will say what came of it.", "info")
    return redirect(url_for("pages.snapshot_page", tier=tier, slot=slot, agent=agent))


def _start_there(here: View, order: Order, mark: str, reason: str) -> Response:
    """Have the agent's host restore it."""
    _note(here, order, reason)
    return redirect(
        _address(order, _ask(here, order, mark=mark, by=g.who, reason=reason, until=here.now + ORDER_S).job)
    )


def _note(here: View, order: Order, reason: str) -> None:
    note(here, "restore", id=order.from_id, agent=order.agent, paths=list(order.paths), reason=reason)


def _tell(order: Order, result: dict[str, Any]) -> None:
    if not result["ok"]:
        flash(f"{order.agent} was not restored: {result['error']}", "bad")
    elif not result["files"]:
        flash(f"{order.agent} is in that state; there was nothing to do.", "info")
    else:
        kept = f" What stood there is in {result['evidence']}." if result["evidence"] else ""
        flash(f"{order.agent} is restored: {result['files']} files.{kept}", "good")


def _ask(here: View, order: Order, **facts: str | float) -> Asked:
    """Put a job into the queue of the agent's host, and wait a moment for what comes of it."""
    queue = queues.name_of(queues.BACKUP, hosts.elsewhere(here.config, order.agent))
    name = f"restore_{order.agent}_{secrets.token_hex(6)}"
    what = "restore" if facts else "what a restore would do to"
    job = Job(queue, "restore", order.as_args() | facts, name, f"{what} {order.agent}")
    queues.open_queue(queue, here.runtime.redis).enqueue_many([rq_job(job)])
    deadline = clock.monotonic() + WAIT_S
    while True:
        asked = _asked(here, order, name)
        if asked.answer is not None or asked.wrong or clock.monotonic() > deadline:
            return asked
        clock.sleep(LOOKED_EVERY_S)


def _asked(here: View, order: Order, name: str) -> Asked:
    """Return what came of a job that was asked for `order`. Raises NotFound."""
    try:
        job = queues.SafeJob.fetch(name, here.runtime.redis, queues.MsgpackSerializer)
        is_ours = job.func_name == "backup_worker.jobs.restore" and Order.of_args(job.args[0]) == order
    except (NoSuchJobError, queues.ForeignJob):
        is_ours = False
    if not is_ours:
        raise NotFound("nobody asked this, or the answer is forgotten", hint="ask again")
    status = job.get_status()
    if status == JobStatus.FINISHED:
        answer = job.return_value() or {}
        if "ok" in answer or "mark" in answer:
            return Asked(name, answer=answer)
        return Asked(name, wrong="its agent has moved to another host meanwhile")
    if status in (JobStatus.FAILED, JobStatus.CANCELED, JobStatus.STOPPED):
        return Asked(name, wrong=f"the job {name} failed; see the queue “{job.origin}”")
    return Asked(name)
