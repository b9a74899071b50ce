"""What a human needs when a recovery fails: one folder with a report to read and the same facts for a machine.

`<state>/evidence/<incident>/REPORT.md`, `incident.json`, `log.txt` (the agent's last words) and, from the restores,
`tree-1`, `tree-1.log`, … (what stood in the agent's root before, and what it had said by then). Writing never fails a
recovery: what cannot be written is logged, and the page says so. No environment and no URL goes in: they hold
passwords.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shlex
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import psutil

from backup_worker.recovery.incident import Incident
from backup_worker.snapshots import Head
from backup_worker.units import counted, size
from em_bridge import streams

log = logging.getLogger(__name__)

PROBLEMS_SHOWN = 3
GIVEN_UP = {"state": "escalated", "phase": None}


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known when an incident is given up. `beats` are (entry id, incarnation), the newest last.

    `snapshots` are those of the agent, the newest first, or None if the repository could not be read.
    """

    incident: Incident
    reason: str
    now: float
    zone: str
    beats: Sequence[tuple[str, str]] = ()
    log_lines: Sequence[str] = ()
    snapshots: Sequence[Head] | None = ()
    running: Sequence[str] | None = ()
    """Its processes; None if it is not known whether it runs."""
    ended: str = ""
    """How its last process has ended: exit code or signal."""
    dependents: Sequence[str] = ()
    """Agents that are dead too, and wait for this one."""
    config: Path | None = None
    """The folder of the configuration, for the commands."""
    repository: Path = Path("/")
    final: bool = True
    """False while the recovery goes on: a critical agent's first failure."""

    def time(self, at: float) -> str:
        """Return `at` (Unix seconds) in the schedule's zone, to be read by a human."""
        return datetime.fromtimestamp(at, ZoneInfo(self.zone)).strftime("%Y-%m-%d %H:%M:%S %Z")


def write(folder: Path, facts: Facts) -> str:
    """Write the report into `folder`; return what a human is told of it: where it is, or why there is none."""
    host = host_facts(facts.repository)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(folder / "incident.json", json.dumps(as_json(facts, host), indent=2, default=str) + "\n")
        _write(folder / "log.txt", "\n".join(facts.log_lines) + "\n")
        _write(folder / "REPORT.md", report(facts, host))
    except OSError as error:
        log.error("the evidence of %s cannot be written: %s", facts.incident.id, error)
        why = (error.strerror or str(error)).lower()
        return (
            f"No report can be written: {why}. What was done: `backup-worker incidents {facts.incident.id}`"
        )
    return f"Everything that is known: {folder / 'REPORT.md'}"


def keep_log(tree: Path, lines: Sequence[str]) -> None:
    """Write the agent's last lines beside the evidence `tree`; a failure is only logged.

    What cannot take these takes no tree either, so the restore refuses; and whoever runs the agent has them still.
    """
    try:
        tree.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(tree.with_name(f"{tree.name}.log"), "".join(f"{line}\n" for line in lines))
    except OSError as error:
        log.error("the last lines of an agent cannot be kept beside %s: %s", tree, error)


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


def as_json(facts: Facts, host: dict[str, Any]) -> dict[str, Any]:
    """Return the facts for a machine."""
    incident = facts.incident
    return {
        "incident": incident.summary() | (GIVEN_UP | {"closed_at": facts.now} if facts.final else {}),
        "why": facts.reason,
        "tried": list(incident.tried),
        "running": None if facts.running is None else list(facts.running),
        "ended": facts.ended or None,
        "held_dependents": list(facts.dependents),
        "commands": list(_choices(facts)),
        "snapshots": None
        if facts.snapshots is None
        else [
            {
                "id": head.id,
                "created_at": head.created_at,
                "status": "damaged" if head.damaged else head.status,
                "why_not": why_not_used(head, incident),
            }
            for head in facts.snapshots
        ],
        "last_heartbeats": [
            {"entry": entry, "at": streams.entry_time(entry), "incarnation": name}
            for entry, name in facts.beats
        ],
        "last_log_lines": list(facts.log_lines),
        "host": host,
    }


def why_not_used(head: Head, incident: Incident) -> str:
    """Return why the agent does not live on this snapshot now."""
    if head.damaged:
        return "it does not prove any more: its files have changed on the disk"
    if not head.is_good:
        found = [f"{problem.path} {problem.problem}" for problem in head.problems]
        more = f" and {len(found) - PROBLEMS_SHOWN} more" if len(found) > PROBLEMS_SHOWN else ""
        return "; ".join(found[:PROBLEMS_SHOWN]) + more or "it is not good"
    if head.id in incident.tried:
        return "it was restored, and the agent did not live on it"
    if head.created_at > incident.known_until:
        return "it was made after the incident was opened"
    if not incident.attempts:
        return "no state was tried; see what was done"
    return "not tried: it holds the same files as one that was, or the attempts were used up before"


def report(facts: Facts, host: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    incident = facts.incident
    return "\n".join(
        itertools.chain(
            _summary(facts, host),
            _section("How to go on by hand", _commands(facts)),
            _section("What was done", (_step(facts, step) for step in incident.steps)),
            _section("The snapshots, and why it does not live on them", _snapshots(facts)),
            _section("Last heartbeats", _beats(facts)),
            _section(
                "Last log lines", [f"    {line}" for line in facts.log_lines] or ["The agent wrote nothing."]
            ),
            _section("Approved changes that the last restored state does not hold", _missed(incident)),
            _section("What stood in its root before each restore", _evidence(incident)),
        )
    )


def _section(title: str, lines: Iterable[str]) -> list[str]:
    return ["", f"## {title}", "", *lines]


def _summary(facts: Facts, host: dict[str, Any]) -> list[str]:
    incident = facts.incident
    loads = " ".join(f"{load:.2f}" for load in host["load_average"])
    memory = f"{host['memory_available_bytes'] // 2**20} of {host['memory_total_bytes'] // 2**20} MiB memory"
    free = host["repository_free_bytes"]
    room = "unknown space" if free is None else f"{free // 2**20} MiB"
    return [
        f"# {incident.agent} "
        + ("could not be recovered" if facts.final else "did not come back; its recovery goes on"),
        "",
        f"**Why:** {facts.reason}",
        "",
        f"- {_runs(facts.running)}" + (f" Its last process: {facts.ended}." if facts.ended else ""),
        *([f"- **Held until it lives:** {', '.join(facts.dependents)}."] if facts.dependents else []),
        f"- Its files are {_files_now(incident)}.",
        f"- Incident `{incident.id}`, opened {facts.time(incident.opened_at)}, "
        f"{'given up' if facts.final else 'and going on at'} {facts.time(facts.now)}.",
        f"- What started it: {incident.reason or 'not said'}.",
        f"- Attempts: {incident.attempts}; states that were tried: {', '.join(incident.tried) or 'none'}.",
        f"- Host {host['name']}: load {loads} on {host['cpus']} CPUs; free: {memory}, {room} for the repository.",
    ]


def _runs(running: Sequence[str] | None) -> str:
    if running is None:
        return "**Whether it runs is not known**: nobody could be asked."
    return f"It is **running: {'; '.join(running)}**." if running else "It is **not running**."


def _files_now(incident: Incident) -> str:
    restored = [step for step in incident.steps if step.step == "restore" and step.ok]
    if not restored:
        return "as they were found: nothing was restored"
    selected = [step.detail for step in incident.steps if step.step == "select" and step.ok]
    return f"those of the last restore ({selected[-1]})" if selected else "those of the last restore"


def _step(facts: Facts, step: Any) -> str:
    mark = "" if step.ok else "**FAILED** "
    return f"- {facts.time(step.at)} {mark}{step.step}: {step.detail}"


def _snapshots(facts: Facts) -> list[str]:
    if facts.snapshots is None:
        return ["The repository could not be read."]
    return [
        f"- `{head.id}` ({facts.time(head.created_at)}, {counted(head.files, 'file')}, {size(head.bytes)}) "
        f"**{'damaged' if head.damaged else head.status}**: {why_not_used(head, facts.incident)}"
        for head in facts.snapshots
    ] or ["There is none."]


def _beats(facts: Facts) -> list[str]:
    lines = []
    for name, group in itertools.groupby(facts.beats, key=lambda beat: beat[1]):
        times = [streams.entry_time(entry) for entry, _ in group]
        ago = facts.now - times[-1]
        lines.append(
            f"- {len(times)} of incarnation `{name}` from {facts.time(times[0])} to {facts.time(times[-1])}, "
            f"{ago:.0f} s before this report"
        )
    return lines or ["None in the last hour."]


def _choices(facts: Facts) -> dict[str, str]:
    """Return command -> what it is for, with the snapshots of this very case; the first ones change nothing."""
    agent = facts.incident.agent
    commands = (
        {f"backup-worker ack {facts.incident.id}": "you have seen it: no further page"} if facts.final else {}
    )
    unused = [head for head in facts.snapshots or () if head.id not in facts.incident.tried]
    for head in unused[:PROBLEMS_SHOWN]:
        word = (
            "damaged: what is damaged, and can it be healed"
            if head.damaged
            else f"{head.status}: what is wrong"
        )
        verb = "verify" if head.damaged else "show"
        commands[f"backup-worker {verb} {head.id}"] = word
    sound = [head for head in unused if not head.damaged]
    usable = next((head for head in sound if head.is_good), None) or next(iter(sound), None)
    commands[f"backup-worker bisect {agent}"] = (
        "which change has killed it (add --for 10 without a health command)"
    )
    if usable is not None:
        commands[f"backup-worker restore {agent} --from {usable.id} --dry-run"] = (
            "what that state would change"
        )
        commands[f"backup-worker restore {agent} --from {usable.id}"] = (
            "lay it down; what stands there is kept"
        )
    commands[f"backup-worker recover {agent} --wait"] = "try again from the newest good state"
    return commands


def _commands(facts: Facts) -> list[str]:
    commands = _choices(facts)
    width = max(map(len, commands))
    where = [f"    export BACKUP_CONFIG={shlex.quote(str(facts.config))}"] if facts.config is not None else []
    return where + [f"    {command:<{width}}   # {purpose}" for command, purpose in commands.items()]


def _missed(incident: Incident) -> list[str]:
    return [f"- {one}" for one in incident.missed] or ["None."]


def _evidence(incident: Incident) -> list[str]:
    return (
        [*(f"- {tree}" for tree in incident.evidence), ""]
        if incident.evidence
        else ["Nothing was changed.", ""]
    )
