"""Recoveries: who waits for whom, what was done step by step, what the agent said last, and everything to take away."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flask import Blueprint, Response, flash, g, redirect, render_template, url_for
from werkzeug.wrappers import Response as AnyResponse

from backup_worker import alerts
from backup_worker.console.actions import note, with_redis
from backup_worker.console.files import attachment, tar_of_folder
from backup_worker.console.live import View, view
from backup_worker.console.paging import paged
from backup_worker.console.words import shown
from backup_worker.queueing import hosts
from backup_worker.recovery.adapters import adapter_for
from backup_worker.recovery.incident import Incident, IncidentStore, Step
from backup_worker.recovery.plan import waves
from backup_worker.snapshots.disk import Tree, walk
from em_bridge.errors import AgentBackupError, NotFound, RedisUnavailable

blueprint = Blueprint("incidents", __name__)

LOG_LINES = 60
PAGES = ("escalation", "recovery", "attempt")
"""The alerts that an incident of an agent may have open."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """The steps of one try, from the fence to its end."""

    number: int
    steps: tuple[Step, ...]


@blueprint.get("/incidents")
def list_page() -> str:
    """Show recoveries, open and past."""
    here = view()
    found = here.known(lambda client: list(IncidentStore(client).all()), [])
    going_on = {one.agent: one for one in found if one.is_open}
    return render_template("incidents.html", page=paged(found), open=going_on, waves=_waves(here, going_on))


def _waves(here: View, going_on: dict[str, Incident]) -> list[tuple[str, ...]]:
    """Return in which order the agents that are being recovered come back."""
    needs = {name: agent.depends_on for name, agent in here.config.agents.items()}
    return waves([name for name in going_on if name in needs], needs)


@blueprint.get("/incidents/<identifier>")
def page(identifier: str) -> str:
    """Show one recovery, step by step."""
    here = view()
    if here.runtime.client is None:
        raise RedisUnavailable(here.redis_problem or "redis is away", hint="incidents are kept in Redis")
    store = IncidentStore(here.runtime.redis)
    incident = store.get(identifier)
    going_on = {one.agent: one for one in store.open_incidents()} | (
        {incident.agent: incident} if incident.is_open else {}
    )
    return render_template(
        "incident.html", incident=incident, attempts=_attempts(incident), waves=_waves(here, going_on), open=going_on,
        log_lines=_log_lines(here, incident.agent), host=_host_of(here, incident.agent),
        alerts=_open_alerts(here, incident.agent), evidence=_evidence_folder(here, incident),
    )  # fmt: skip


def _attempts(incident: Incident) -> list[Attempt]:
    """Return the steps by attempt: each begins with a fence."""
    groups: list[list[Step]] = []
    for step in incident.steps:
        if not groups or (step.step == "fence" and any(one.step == "fence" for one in groups[-1])):
            groups.append([])
        groups[-1].append(step)
    return [Attempt(number, tuple(steps)) for number, steps in enumerate(groups, 1)]


def _log_lines(here: View, agent: str) -> list[str]:
    """Return what the agent said last; nothing if that cannot be had from here."""
    with contextlib.suppress(AgentBackupError, OSError):
        found = adapter_for(agent, here.config.agent(agent), here.config.schedule.state).log_lines(LOG_LINES)
        return [shown(line, 400) for line in found]
    return []


def _host_of(here: View, agent: str) -> str | None:
    return hosts.elsewhere(here.config, agent) if agent in here.config.agents else None


def _open_alerts(here: View, agent: str) -> list[alerts.OpenAlert]:
    keys = {f"{kind}/{agent}" for kind in PAGES}
    return [
        one for one in here.known(alerts.open_alerts, []) if one.key in keys and one.acknowledged_at is None
    ]


def _evidence_folder(here: View, incident: Incident) -> Path | None:
    kept = here.config.schedule.state / "evidence"
    folder = kept / incident.id
    # The id comes out of Redis, and names a folder there: it must not lead anywhere else.
    return folder if folder.parent == kept and folder.name not in ("", "..") and folder.is_dir() else None


@blueprint.get("/incidents/<identifier>/evidence")
def evidence(identifier: str) -> Response:
    """Send everything that was kept, as a tar."""
    here = with_redis()
    incident = IncidentStore(here.runtime.redis).get(identifier)
    folder = _evidence_folder(here, incident)
    if folder is None:
        raise NotFound(
            f"there is no evidence of “{identifier}” here",
            hint="it is on the host of the agent, in the folder that the page of the incident names",
        )
    note(here, "download", incident=identifier, agent=incident.agent)
    return attachment(_packed(folder, identifier), f"evidence-{identifier}.tar")


def _packed(folder: Path, name: str) -> Iterator[bytes]:
    with Tree(folder) as tree, Tree(folder) as files:
        paths: Iterator[tuple[str, os.stat_result]] = walk(tree)
        yield from tar_of_folder(files, name, paths)


@blueprint.post("/incidents/<identifier>/acknowledge")
def acknowledge(identifier: str) -> AnyResponse:
    """Say that somebody is on it: none of its alerts is sent again."""
    here = with_redis()
    incident = IncidentStore(here.runtime.redis).get(identifier)
    found = _open_alerts(here, incident.agent)
    for one in found:
        alerts.acknowledge(here.runtime.redis, one.key, g.who, here.now)
    note(here, "acknowledge", incident=identifier, agent=incident.agent, keys=[one.key for one in found])
    said: Any = (f"Acknowledged; {incident.agent} is yours now.", "good")
    flash(*(said if found else ("There is nothing (any more) to acknowledge.", "info")))
    return redirect(url_for("incidents.page", identifier=identifier))
