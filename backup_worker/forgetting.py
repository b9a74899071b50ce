"""What is kept of an agent besides its snapshots, and goes with the last of them when it is forgotten.

The lock files stay: they are empty, and removing one under a process that waits for it would let two in. Evidence stays
within its own limits of size and age: it tells of what was done, not of what could be restored.
"""

from __future__ import annotations

from backup_worker.approval.approved import ApprovedStates
from backup_worker.restoring import proofs
from backup_worker.snapshots import Repository
from em_bridge.fields import AGENT_ID

PROOF = "when a restore of it was last proven"
APPROVED = "the approved state of its files"


def kept_besides(repo: Repository, agent: str, *, configured: bool) -> list[str]:
    """Return what else there is of `agent`. While it is configured, what was approved of it still holds."""
    if not AGENT_ID.fullmatch(agent):
        return []  # it comes from the command line, and becomes part of a path
    found = [PROOF] if proofs.path_of(repo, agent).exists() else []
    if not configured and ApprovedStates(repo).folder(agent).exists():
        found.append(APPROVED)
    return found


def remove(repo: Repository, agent: str, what: list[str]) -> None:
    """Remove what `kept_besides` named. Raises OSError."""
    if PROOF in what:
        proofs.path_of(repo, agent).unlink(missing_ok=True)
    if APPROVED in what:
        ApprovedStates(repo).forget(agent)
