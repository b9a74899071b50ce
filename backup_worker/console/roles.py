"""Who may do what: one table of every address, read from top to bottom by whoever audits this.

A viewer looks; an operator looks and acts (also takes files out of snapshots: they hold what agents remember); an
approver does that and decides about changes. Each role may do what those before it may. An address that is not in the
table is refused for everybody, so a new page cannot be forgotten here: a test walks all of them.
"""

from __future__ import annotations

from collections.abc import Mapping

VIEWER, OPERATOR, APPROVER = "viewer", "operator", "approver"
ROLES = (VIEWER, OPERATOR, APPROVER)
"""From the least to the most rights."""

ANYBODY = "anybody"
"""Needs no login."""


def _all(role: str, prefix: str, names: str) -> dict[str, str]:
    return {f"{prefix}{name}": role for name in names.split()}


ACCESS: Mapping[str, str] = {
    **_all(ANYBODY, "", "static login healthz rq_dashboard.static"),
    **_all(VIEWER, "", "logout metrics live.events"),
    **_all(
        VIEWER, "pages.", "fleet_page backups_page snapshot_page weights_page changes_page alerts_page history_page"
    ),
    **_all(VIEWER, "incidents.", "list_page page"),
    **_all(VIEWER, "messages.", "page letter_page"),
    **_all(
        VIEWER, "rq_dashboard.",
        "queues_overview workers_overview jobs_overview job_view list_queues list_jobs list_workers job_info "
        "favicon",
    ),
    **_all(OPERATOR, "files.", "file archive"),
    **_all(OPERATOR, "restores.", "wizard look start"),
    **_all(OPERATOR, "incidents.", "evidence acknowledge"),
    **_all(OPERATOR, "messages.", "retry drop replay"),
    **_all(OPERATOR, "actions.", "pin unpin verify acknowledge silence unsilence recover pause resume"),
    **_all(
        OPERATOR, "rq_dashboard.", "delete_job_view requeue_job_view requeue_all empty_queue compact_queue"
    ),
    **_all(APPROVER, "actions.", "approve reject statement"),
}  # fmt: skip
"""Endpoint -> the least role that may use it."""


def may(role: str | None, endpoint: str | None) -> bool:
    """Tell whether `role` (None: not logged in) may use `endpoint`."""
    needed = ACCESS.get(endpoint or "")
    if needed is None:
        return False
    if needed == ANYBODY:
        return True
    return role in ROLES and ROLES.index(role) >= ROLES.index(needed)
