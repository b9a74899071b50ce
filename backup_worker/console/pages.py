"""The pages that people read. Nothing here changes anything."""

from __future__ import annotations

import functools
import json
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from flask import Blueprint, render_template, request

from backup_worker import alerts, changes, proposals
from backup_worker.console import fleet, slots, traffic
from backup_worker.console.fleet import status_of
from backup_worker.console.live import view
from backup_worker.recovery.incident import IncidentStore
from backup_worker.snapshots import Difference, Head, diff
from em_bridge.errors import AgentBackupError, RedisUnavailable

blueprint = Blueprint("pages", __name__)

PER_PAGE = 50
MAX_LINES = 5000
"""How many of the newest matching lines of the record a page looks at."""

_HASHED = ("seq", "at", "kind", "agent", "prev", "hash")
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Page(Generic[Row]):
    """A part of a long list."""

    rows: Sequence[Row]
    number: int
    last: int
    total: int


def paged(rows: Sequence[Row], per_page: int = PER_PAGE) -> Page[Row]:
    """Return the part of `rows` that `?page=` asks for, the nearest if there is no such part."""
    last = max(1, -(-len(rows) // per_page))
    number = min(max(1, request.args.get("page", 1, int)), last)
    return Page(rows[(number - 1) * per_page : number * per_page], number, last, len(rows))


@blueprint.get("/")
def fleet_page() -> str:
    """Show every agent: is it alive, and could it be brought back."""
    return render_template("fleet.html", fleet=fleet.look(view()))


@blueprint.get("/backups")
def backups_page() -> str:
    """Show what was made when, and what was not."""
    here = view()
    wanted = {key: request.args.get(key, "") for key in ("agent", "tier", "status")}
    found = [head for head in reversed(here.heads) if _matches(head, wanted)]
    return render_template(
        "backups.html", calendars=slots.calendars(here.config, here.heads, here.now), runs=fleet.next_runs(here),
        page=paged(found), wanted=wanted, agents=sorted({head.agent for head in here.heads} | set(here.config.agents)),
        status_of=status_of,
    )  # fmt: skip


def _matches(head: Head, wanted: dict[str, str]) -> bool:
    facts = {"agent": head.agent, "tier": head.tier, "status": status_of(head)}
    if wanted["status"] == "pinned":
        facts["status"] = "pinned" if head.pinned else ""
    return all(not value or facts[key] == value for key, value in wanted.items())


@blueprint.get("/snapshots/<tier>/<slot>/<agent>")
def snapshot_page(tier: str, slot: str, agent: str) -> str:
    """Show one snapshot: what is in it, what is wrong with it, what changed."""
    here = view()
    repository = here.runtime.repository
    manifest = repository.get(f"{tier}/{slot}/{agent}")
    others = [head for head in reversed(here.heads) if head.agent == agent and head.id != manifest.id]
    against = request.args.get("against") or _previous(others, manifest)
    difference: Difference | None = None
    problem = None
    if against:
        try:
            difference = diff(repository, against, manifest.id)
        except AgentBackupError as error:
            problem = error.message
    return render_template(
        "snapshot.html", snapshot=manifest, status=status_of(manifest), against=against, others=others[:100],
        difference=difference, diff_problem=problem, page=paged(manifest.entries, 200),
    )  # fmt: skip


def _previous(others: Iterable[Head], manifest: Head) -> str | None:
    """Return the id of the snapshot of the same tier that came before; `others` are newest first."""
    older = (one for one in others if one.tier == manifest.tier and one.sort_key < manifest.sort_key)
    return next((one.id for one in older), None)


@blueprint.get("/incidents")
def incidents_page() -> str:
    """Show recoveries, open and past."""
    found = view().known(lambda client: list(IncidentStore(client).all()), [])
    return render_template("incidents.html", page=paged(found), open=[one for one in found if one.is_open])


@blueprint.get("/incidents/<identifier>")
def incident_page(identifier: str) -> str:
    """Show one recovery, step by step."""
    here = view()
    if here.runtime.client is None:
        raise RedisUnavailable(here.redis_problem or "redis is away", hint="incidents are kept in Redis")
    return render_template("incident.html", incident=IncidentStore(here.runtime.redis).get(identifier))


@blueprint.get("/changes")
def changes_page() -> str:
    """Show what waits for a human's word, and what became of the rest."""
    here = view()
    found = here.known(changes.all_changes, [])[::-1]
    waiting = [
        (one, proposals.compare(one, here.runtime.repository, here.heads))
        for one in found
        if one.state == changes.PROPOSED
    ]
    decided = [one for one in found if one.state != changes.PROPOSED]
    by_name = not here.config.allowed_signers.exists()
    return render_template("changes.html", waiting=waiting, page=paged(decided), by_name=by_name)


@blueprint.get("/history")
def history_page() -> str:
    """Show the record, the newest first."""
    here = view()
    kind, agent = request.args.get("kind") or None, request.args.get("agent") or None
    newest = deque(here.runtime.history.read(kind, agent), maxlen=MAX_LINES)
    report = here.runtime.history.verify() if request.args.get("verify") and _has_history() else None
    return render_template(
        "history.html", page=paged([_line(line) for line in reversed(newest)], 100), kind=kind, agent=agent,
        kinds=KINDS, report=report, cut=len(newest) == MAX_LINES, max_lines=MAX_LINES,
    )  # fmt: skip


KINDS = (
    "action", "agent-state", "alert", "alert-delivery", "alert-resolved", "backup", "change", "config", "job-failed",
    "prune", "recovery", "restore", "verify",
)  # fmt: skip


def _has_history() -> bool:
    return view().config.schedule.history.exists()


def _line(line: dict[str, Any]) -> dict[str, Any]:
    """Return a line of the record as the page shows it: what it says in a row of words, and the whole of it."""
    facts = {key: found for key, found in line.items() if key not in _HASHED and found not in (None, "", [])}
    whole = json.dumps(line, ensure_ascii=False, indent=2)
    return {**{key: line.get(key) for key in ("seq", "at", "kind", "agent")}, "facts": facts, "whole": whole}


@functools.cache
def _receiver(url: str) -> str:
    return alerts.receiver_of(url)


@blueprint.get("/alerts")
def alerts_page() -> str:
    """Show what a human should know."""
    here = view()
    receivers = [_receiver(one.url) for one in here.config.schedule.alerts]
    return render_template("alerts.html", alerts=here.known(alerts.open_alerts, []), receivers=receivers)


@blueprint.get("/messages")
def messages_page() -> str:
    """Show the bus: how long the streams are, who lags behind, what could not be handled."""
    here = view()
    return render_template(
        "messages.html", streams=here.known(traffic.look, []), letters=here.known(traffic.dead_letters, []),
        messages=here.known(traffic.recent_messages, []),
    )  # fmt: skip
