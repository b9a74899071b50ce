"""What a human needs when a recovery fails: one folder with a report to read and the same facts for a machine.

`<state>/evidence/<incident>/REPORT.md`, `incident.json`, `log.txt` (the agent's last words) and, from the restores,
`tree-1`, `tree-2`, … (what stood in the agent's root before). Writing never fails a recovery: what cannot be written
is logged, and the page says so. No environment and no URL goes in: they hold passwords.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from backup_worker.recovery.incident import Incident

log = logging.getLogger(__name__)


def write(
    folder: Path,
    incident: Incident,
    *,
    reason: str,
    log_lines: list[str],
    beats: list[tuple[str, str]],
    repository: Path,
    now: float,
) -> Path:
    """Write the report into `folder` and return its path. `beats` are (entry id, incarnation), the newest last."""
    facts = {
        "incident": incident.summary() | {"closed_at": now, "state": "escalated"},
        "why": reason,
        "last_heartbeats": [{"entry": entry, "incarnation": name} for entry, name in beats],
        "last_log_lines": log_lines,
        "host": host_facts(repository),
    }
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(folder / "incident.json", json.dumps(facts, indent=2, default=str) + "\n")
        _write(folder / "log.txt", "\n".join(log_lines) + "\n")
        _write(folder / "REPORT.md", report(incident, facts, folder, now))
    except OSError as error:
        log.error("the evidence of %s cannot be written: %s", incident.id, error)
    return folder / "REPORT.md"


def _write(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
        file.write(text)


def host_facts(repository: Path) -> dict[str, Any]:
    """Return what often explains a failed start: disk, memory, load."""
    memory = psutil.virtual_memory()
    try:
        free_bytes: int | None = shutil.disk_usage(repository).free
    except OSError:
        free_bytes = None
    return {
        "name": os.uname().nodename,
        "repository_free_bytes": free_bytes,
        "memory_available_bytes": memory.available,
        "memory_total_bytes": memory.total,
        "load_average": list(os.getloadavg()),
        "cpus": os.cpu_count(),
        "booted_at": psutil.boot_time(),
    }


def report(incident: Incident, facts: dict[str, Any], folder: Path, now: float) -> str:
    """Return the report in Markdown."""
    agent = incident.agent
    host = facts["host"]
    lines = [
        f"# {agent} could not be recovered",
        "",
        f"**Why:** {facts['why']}",
        "",
        f"- incident `{incident.id}`, opened {_time(incident.opened_at)}, given up {_time(now)}",
        f"- what started it: {incident.reason or 'not said'}",
        f"- attempts: {incident.attempts}; states that were tried: {', '.join(incident.tried) or 'none'}",
        f"- host {host['name']}: load {' '.join(f'{load:.2f}' for load in host['load_average'])} "
        f"on {host['cpus']} CPUs, "
        f"{host['memory_available_bytes'] // 2**20} MiB of {host['memory_total_bytes'] // 2**20} MiB memory free, "
        f"repository {_mib(host['repository_free_bytes'])} free",
        "",
        "## What was done",
        "",
        *(
            f"- {_time(step.at)} {'ok    ' if step.ok else 'FAILED'} {step.step}: {step.detail}"
            for step in incident.steps
        ),
        "",
        "## Last heartbeats",
        "",
        *(
            [f"- {beat['entry']} {beat['incarnation']}" for beat in facts["last_heartbeats"]]
            or ["none in the last hour"]
        ),
        "",
        "## Last log lines",
        "",
        "```",
        *(facts["last_log_lines"] or ["(the agent wrote nothing)"]),
        "```",
        "",
        "## How to go on by hand",
        "",
        "```",
        f"backup-worker list --agent {agent}                  # which states there are",
        "backup-worker show ID                            # what is wrong with one",
        f"backup-worker restore {agent} --from ID --dry-run   # what it would change",
        f"backup-worker restore {agent} --from ID             # lay down a state of your choice",
        f"backup-worker recover {agent}                       # try again, now that something has changed",
        "```",
        "",
        "What stood in the agent's root before each restore is kept here:",
        "",
        *([f"- {tree}" for tree in incident.evidence] or [f"- nothing was changed; see {folder}"]),
        "",
    ]
    return "\n".join(lines)


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size // 2**20} MiB"
