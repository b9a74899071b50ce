"""Tell the agent itself what happened to it: a file in its root, there when it starts, and a message in its inbox.

The promise: an agent can know that it was recovered, to which state, and what it has lost. The file is `RECOVERY.md`;
it is excluded from every backup and restore, so it changes neither, and the next recovery replaces it. A file of that
name that is not ours is left alone. The message goes through the log like any other and is in the inbox once, however
often it is sent; it is from `backup-worker`, since it is not the EM that says this.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from backup_worker.recovery.incident import CURRENT, Incident
from em_bridge.events import MAX_PAYLOAD_BYTES
from em_bridge.messages import send_once

if TYPE_CHECKING:
    from redis import Redis

FILE, ASIDE = "RECOVERY.md", ".RECOVERY.md.new"
SENDER = "backup-worker"
MARK = "<!-- agent-backup: notice of a recovery; in no backup, replaced by the next one -->"
SHOWN = 50
"""How many lost paths are named; the others are counted."""


def text(incident: Incident, zone: str) -> str:
    """Return the notice, in Markdown; times in the time zone `zone`."""

    def moment(at: float) -> str:
        return datetime.fromtimestamp(at, ZoneInfo(zone)).strftime("%Y-%m-%d %H:%M:%S %Z")

    lines = [
        MARK,
        f"# {incident.agent} was recovered",
        "",
        f"- Why: {incident.reason or 'not said'} ({moment(incident.opened_at)}), incident `{incident.id}`.",
    ]
    if incident.chosen == (CURRENT,):
        lines += [
            "- You were started again on the files as they were: nothing was restored, nothing was lost."
        ]
        return "\n".join(lines) + "\n"
    age = f", of {moment(incident.state_at)}" if incident.state_at is not None else ""
    lines += [f"- Your files are those of {', '.join(f'`{one}`' for one in incident.chosen)}{age}."]
    if incident.tried:
        lines += [f"- Newer states were tried and did not live: {', '.join(incident.tried)}."]
    if incident.evidence:
        lines += [f"- What stood there at your death is kept in `{incident.evidence[0]}`."]
    lines += _section("Lost: newer than any backup, only in that folder", _lost(incident))
    lines += _section(
        "Approved changes that this state does not hold", (f"- {one}" for one in incident.missed)
    )
    if incident.missed:
        lines += ["", f"`backup-worker recover {incident.agent} --reapply` puts them back."]
    lines += _section(
        "Approved changes that were put back",
        (f"- {one}, from `{one.snapshot}`" for one in incident.reapplied),
    )
    return "\n".join(lines) + "\n"


def _lost(incident: Incident) -> list[str]:
    if incident.lost_count is None:
        return ["- It could not be found out."]
    more = incident.lost_count - len(incident.lost)
    return [f"- `{path}`" for path in incident.lost] + ([f"- … and {more} more"] if more else [])


def _section(title: str, lines: Iterable[str]) -> list[str]:
    found = list(lines)
    return ["", f"## {title}", "", *found] if found else []


def leave(root: Path, content: str) -> bool:
    """Write the notice into `root`, as a whole or not at all; False if a file of somebody else stands there.

    Raises OSError.
    """
    target = root / FILE
    if os.path.lexists(target) and not _is_ours(target):
        return False
    # Written aside and renamed: what may be linked to the old notice is not written through.
    aside = root / ASIDE
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
        file.write(content)
        folder = root.stat()
        if os.geteuid() == 0:
            # The agent may run as somebody else, and has to read it. By descriptor: the root is its own, and at the
            # name there may be a link by now.
            os.fchown(file.fileno(), folder.st_uid, folder.st_gid)
    aside.replace(target)
    return True


def _is_ours(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MARK)) == MARK.encode()


def send(client: Redis, incident: Incident, content: str, now: float) -> None:
    """Put the notice into the message log, for the agent; once for an incident. One that is too long is cut."""
    # A reason may be as long as an event: that it does not fit into a message is no failure of the recovery.
    payload = content.encode(errors="replace")[:MAX_PAYLOAD_BYTES].decode(errors="ignore").encode()
    send_once(client, SENDER, incident.agent, payload, at=now, line=incident.id)
