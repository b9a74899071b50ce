"""The pages that people read. Nothing here changes anything."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from typing import Any

from flask import Blueprint, render_template, request

from backup_worker import alerts, status
from backup_worker.approval import approvals, changes, proposals
from backup_worker.console import fleet, graph, record, slots, weights
from backup_worker.console.fleet import status_of
from backup_worker.console.live import live, view
from backup_worker.console.paging import paged
from backup_worker.snapshots import Difference, Head, diff
from em_bridge.errors import AgentBackupError

blueprint = Blueprint("pages", __name__)

LINES_A_PAGE = 100
AGENTS_A_PAGE = 48
CALENDAR_AGENTS = 40
PROPOSALS_A_PAGE = 10
_HASHED = ("seq", "at", "kind", "agent", "prev", "hash")


@blueprint.get("/")
def fleet_page() -> str:
    """Show every agent: is it alive, and could it be brought back."""
    here = view()
    known = fleet.look(here)
    wanted = request.args.get("agent", "").strip()
    cards = [card for card in known.cards if wanted.lower() in card.name.lower()]
    if len(known.cards) > AGENTS_A_PAGE:
        # Where not all fit on a page, those in trouble come first.
        cards.sort(key=lambda card: fleet.TONES.index(card.tone))
    page = paged(cards, AGENTS_A_PAGE)
    return render_template(
        "fleet.html", fleet=known, page=page, wanted=wanted, details=fleet.details(here, page.rows),
        graph=graph.draw(
            {card.name: card.config.depends_on for card in known.cards},
            [card.name for card in known.cards if card.tone in ("bad", "warn")],
        ),
        tones={card.name: card.tone for card in known.cards},
    )  # fmt: skip


@blueprint.get("/backups")
def backups_page() -> str:
    """Show what was made when, and what was not."""
    here = view()
    wanted = {key: request.args.get(key, "") for key in ("agent", "tier", "status")}
    found = [head for head in reversed(here.heads) if _matches(head, wanted)]
    names = [name for name in here.config.agents if wanted["agent"] in ("", name)]
    shown = paged(names, CALENDAR_AGENTS, "agents")
    return render_template(
        "backups.html", calendars=slots.calendars(here.config, here.heads, here.now, shown.rows), shown=shown,
        runs=fleet.next_runs(here),
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


@blueprint.get("/weights/<agent>")
def weights_page(agent: str) -> str:
    """Show an agent's weights over time, and who let each change in."""
    here = view()
    paths = here.config.agent(agent).files.get("weights", [])
    heads = [head for head in here.heads if head.agent == agent]
    points = live().weights.history(here.runtime.repository, heads, paths)
    keys, known = weights.choose(points, request.args.getlist("key"))
    return render_template(
        "weights.html", agent=agent, points=points, plot=weights.draw(points, keys), keys=keys, known=known,
        size=weights, page=paged([point for point in reversed(points) if point.changes or not point.before]),
    )  # fmt: skip


@blueprint.get("/changes")
def changes_page() -> str:
    """Show what waits for a human's word, and what became of the rest."""
    here = view()
    # Compared are those on this page alone: it costs a snapshot's file for each of theirs.
    waiting = paged(
        [one for one in here.changes if one.state == changes.PROPOSED], PROPOSALS_A_PAGE, "waiting"
    )
    return render_template(
        "changes.html", waiting=waiting,
        files={one.change: proposals.compare(one, here.runtime.repository, here.heads) for one in waiting.rows},
        page=paged([one for one in here.changes if one.state != changes.PROPOSED]),
        by_name=not approvals.rules(here.config).need_signature,
        signers=here.config.allowed_signers, same_person=changes.same_person,
    )  # fmt: skip


@blueprint.get("/history")
def history_page() -> str:
    """Show the record, the newest first."""
    here = view()
    wanted = record.Wanted(*(request.args.get(key, "").strip() for key in ("kind", "agent", "q")))
    found = record.newest(
        here.runtime.history.files(), wanted, count=LINES_A_PAGE, before=request.args.get("before", "")
    )
    report = here.runtime.history.verify() if request.args.get("verify") and _has_history() else None
    return render_template(
        "history.html", lines=[_line(line) for line in found.lines], older=found.older, wanted=wanted, kinds=KINDS,
        report=report,
    )  # fmt: skip


KINDS = (
    "action", "agent-state", "alert", "alert-delivery", "alert-resolved", "approved-state", "backup", "backup-failed",
    "change", "config", "dead-letter", "drill", "forget", "heal", "history-healed", "history-lost", "job-failed", "pin",
    "ping", "prune", "recovery", "recovery-paused", "recovery-resumed", "restore", "revert", "silence",
    "silence-ended", "unapproved", "unpin", "verify",
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
    found = here.known(alerts.open_alerts, [])
    silent = here.known(lambda client: alerts.silences.active(client, here.now), [])
    hushed = {one.key: silence for one in found for silence in silent if silence.covers(one, here.now)}
    receivers = here.known(
        lambda _: status.receivers(here.runtime),
        [{"receiver": _receiver(one.url)} for one in here.config.schedule.alerts],
    )
    return render_template(
        "alerts.html", page=paged(found), silences=silent, hushed=hushed, receivers=receivers, kinds=alerts.kinds,
    )  # fmt: skip
