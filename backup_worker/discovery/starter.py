"""A configuration to start from: for a fleet that was found, or an example to be edited.

What is written has been loaded and checked before, so it works as it stands; files that exist are left alone unless
the caller insists: then nothing at all is written.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from backup_worker.config import (
    AGENTS_FILE,
    DEFAULT_TIERS,
    SCHEDULE_FILE,
    from_contents,
    load,
    schema_name,
    schemas,
)
from backup_worker.discovery.fleet_files import EXCLUDED, USUAL, Found
from em_bridge.errors import UsageError

LOCALTIME = Path("/etc/localtime")
STARTING_TIERS: Mapping[str, Mapping[str, Any]] = {
    **DEFAULT_TIERS,
    "on-change": {**DEFAULT_TIERS["on-change"], "events": ["config.approved", "config.applied"]},
}
"""The defaults, with a snapshot of the state before each approved change as well."""


def machine_zone(environ: Mapping[str, str], localtime: Path = LOCALTIME) -> str:
    """Return the name of the machine's time zone, or UTC if it does not say."""
    candidates = [environ.get("TZ", "").removeprefix(":")]
    with contextlib.suppress(OSError, IndexError):
        candidates.append(os.path.realpath(localtime).split("zoneinfo/", 1)[1])
    for name in candidates:
        try:
            if name and not name.startswith("/"):
                return {"Etc/UTC": "UTC"}.get(ZoneInfo(name).key, name)
        except (KeyError, OSError, ValueError):
            continue
    return "UTC"


def contents(directory: Path, found: Sequence[Found], zone: str) -> dict[str, str]:
    """Return the text of each file of a starting configuration in `directory`, by its name.

    `found` may be empty: then one agent stands there as an example. Raises `ConfigError` if no configuration of these
    agents could hold together.
    """
    agents = {one.agent: _agent(one) for one in found} or {"z": _example()}
    base = _outside(directory, [one.root for one in found])
    schedule: dict[str, Any] = {
        "$schema": f"./{schema_name(SCHEDULE_FILE)}",
        "timezone": zone,
        "repository": f"{base}/backups",
        "history": f"{base}/backups/system-history.jsonl",
        "state": f"{base}/var",
        "tiers": STARTING_TIERS,
        "alerts": [],
    }
    files = {
        SCHEDULE_FILE: _text(schedule),
        AGENTS_FILE: _text({"$schema": f"./{schema_name(AGENTS_FILE)}", "agents": agents}),
        **schemas(),
    }
    from_contents(
        directory, {name: files[name].encode() for name in (SCHEDULE_FILE, AGENTS_FILE)}, environ={}
    )
    return files


def with_more(directory: Path, found: Sequence[Found], environ: Mapping[str, str]) -> dict[str, str]:
    """Return the text of agents.json with the agents `found` behind those that stand in it, as they were edited.

    The ids of `found` are not taken. Raises `ConfigError` if there is no configuration to add to, or if it would not
    hold together with them.
    """
    load(directory, environ=environ)
    standing = {name: (directory / name).read_bytes() for name in (SCHEDULE_FILE, AGENTS_FILE)}
    agents = json.loads(standing[AGENTS_FILE])
    agents["agents"] |= {one.agent: _agent(one) for one in found}
    text = _text(agents)
    from_contents(directory, {**standing, AGENTS_FILE: text.encode()}, environ=environ)
    return {AGENTS_FILE: text}


def write(directory: Path, files: Mapping[str, str], *, force: bool = False) -> list[Path]:
    """Write the files into `directory`, made if need be; return their paths.

    Raises `UsageError` if one exists with another content and `force` is false; then nothing is written.
    """
    taken = [directory / name for name, text in files.items() if _differs(directory / name, text)]
    if taken and not force:
        names = ", ".join(path.name for path in taken)
        raise UsageError(
            f"“{directory}” has a configuration already: {names}",
            hint="name another folder, add what it lacks with --add, or replace these files with --force",
        )
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        aside = directory / f".{name}.new"
        try:
            aside.write_text(text, encoding="utf-8")
            aside.replace(directory / name)
        finally:
            aside.unlink(missing_ok=True)
    return [directory / name for name in files]


def _differs(path: Path, text: str) -> bool:
    try:
        return path.read_bytes() != text.encode()
    except FileNotFoundError:
        return False


def _outside(directory: Path, roots: Sequence[Path]) -> str:
    """Return where repository and state go: beside the configuration, or outside every agent that surrounds it."""
    beside = Path(os.path.realpath(directory)).parent
    base = beside
    real = [Path(os.path.realpath(root)) for root in roots]
    while around := next((root for root in real if (base / "backups").is_relative_to(root)), None):
        base = around.parent / "agent-backup"
        if around == around.parent:
            break
    return ".." if base == beside else _literal(str(base))


def _agent(one: Found) -> dict[str, Any]:
    return {
        "root": _literal(str(one.root)),
        "files": {kind: [_literal(pattern) for pattern in patterns] for kind, patterns in one.files.items()},
        "required": [_literal(path) for path in one.required],
        "exclude": [_literal(pattern) for pattern in one.exclude],
        "depends_on": [],
        "critical": one.critical,
    }


def _example() -> dict[str, Any]:
    return {
        "root": "../agents/z",
        "files": {kind: list(patterns) for kind, patterns in USUAL.items()},
        "required": ["SOUL.md"],
        "exclude": list(EXCLUDED),
        "start": {"command": ["python3", "agent.py"]},
        "depends_on": [],
        "critical": False,
    }


def _literal(text: str) -> str:
    """Write a text so that loading does not look for a variable in it."""
    return text.replace("${", "$${")


def _text(value: Any) -> str:
    """Write JSON as people do: maps over several lines, lists and small maps on one."""
    return _block(value, 0) + "\n"


def _block(value: Any, depth: int) -> str:
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, Mapping) or (len(flat) + depth <= 110 and not any(map(_nested, value.values()))):
        return _folded(value, depth) if isinstance(value, list) and len(flat) + depth > 110 else flat
    inner = " " * (depth + 2)
    lines = (f"{inner}{json.dumps(key)}: {_block(item, depth + 2)}" for key, item in value.items())
    return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"


def _nested(value: Any) -> bool:
    return isinstance(value, Mapping)


def _folded(items: list[Any], depth: int) -> str:
    inner = " " * (depth + 2)
    lines, line = [], ""
    for item in items:
        text = json.dumps(item, ensure_ascii=False)
        if line and len(line) + len(text) > 100 - depth:
            lines.append(line)
            line = ""
        line += f"{', ' if line else ''}{text}"
    lines.append(line)
    return "[\n" + ",\n".join(f"{inner}{one}" for one in lines) + "\n" + " " * depth + "]"
