"""Whether a snapshot holds guarded files that nobody has approved: asked about every snapshot, in whatever tier.

Promise: a snapshot whose guarded files are not, byte by byte, the agent's approved state says `approved: false`. What
cannot be decided is not approved. It never says `true`: only the snapshot of an application is made of an approval. Of
an agent that was never looked at, nothing is said.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from backup_worker.approval import guarded
from backup_worker.approval.approved import ApprovedState, ApprovedStates, Differences
from backup_worker.snapshots import AgentFiles, Entry, Repository, SnapshotError
from backup_worker.snapshots.take import Attest

Covered = Callable[[ApprovedState, Differences], Collection[str]]
"""Returns which of the paths that differ an approval covers that was not looked at yet."""


def attest(
    repository: Repository, files: AgentFiles, include: Sequence[str], covered: Covered | None = None
) -> Attest:
    """Return what answers for the engine, which asks about the copies of `include` before it writes the manifest.

    Without `covered` (there is no Redis to ask), the state on disk alone counts.
    """

    def answer(entries: Mapping[str, Entry]) -> tuple[bool | None, None]:
        try:
            state = ApprovedStates(repository).load(files.name)
        except SnapshotError:
            return False, None
        if state is None:
            return None, None
        taken = files.scope(include)
        found = guarded.of_entries(entries.values(), state.scope)
        differing = {path: one for path, one in state.differences(found).items() if taken.covers(path)}
        left = differing.keys() - (covered(state, differing) if differing and covered is not None else ())
        return (False if left else None), None

    return answer
