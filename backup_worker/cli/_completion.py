"""What the shell offers on Tab: agents and tiers from the configuration, snapshots from the repository.

A person waits between two keys: the two files are read as JSON and the repository as folders, without the modules that
check either. What cannot be read offers nothing; it never prints, and never fails.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from em_bridge.terminal import DEFAULT_CONFIG

MOST = 200
"""Snapshots that are offered at most, the newest slots first."""


def agents(ctx: typer.Context, incomplete: str) -> list[str]:
    """Offer the configured agents that do not stand there yet."""
    given = ctx.params.get("agents") or ()
    return sorted(
        name
        for name in _keys(_folder(ctx) / "agents.json", "agents")
        if name.startswith(incomplete) and name not in given
    )


def tiers(ctx: typer.Context, incomplete: str) -> list[str]:
    """Offer the tiers of the schedule."""
    names = _keys(_folder(ctx) / "backup_schedule.json", "tiers") or ("daily", "weekly", "on-change")
    return [name for name in names if name.startswith(incomplete)]


def snapshots(ctx: typer.Context, incomplete: str) -> list[str]:
    """Offer the snapshots whose ids begin so."""
    found = _matching(_repository(_folder(ctx)), incomplete)
    return [identifier for identifier, _ in zip(found, range(MOST), strict=False)]


IdArgument = Annotated[
    str,
    typer.Argument(metavar="ID", help="A snapshot, such as daily/2026-11-23/z.", autocompletion=snapshots),
]


def _folder(ctx: typer.Context) -> Path:
    of_all_commands = ctx.parent.params.get("config") if ctx.parent is not None else None
    named = next(
        (one for one in (ctx.params.get("config"), of_all_commands) if one not in (None, DEFAULT_CONFIG)),
        None,
    )
    return Path(named or os.environ.get("BACKUP_CONFIG") or DEFAULT_CONFIG)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _keys(path: Path, key: str) -> list[str]:
    value = _read(path).get(key)
    return list(value) if isinstance(value, dict) else []


def _repository(folder: Path) -> Path:
    text = _read(folder / "backup_schedule.json").get("repository")
    return folder / os.path.expandvars(text) if isinstance(text, str) else folder / "nowhere"


def _matching(repository: Path, beginning: str) -> Iterator[str]:
    """Yield ids, listing only the folders in which one could begin so."""
    tier, _, rest = beginning.partition("/")
    slot, _, agent = rest.partition("/")
    for here in _names(repository, tier, whole="/" in beginning):
        for there in _names(repository / here, slot, whole="/" in rest):
            for name in reversed(_names(repository / here / there, agent, whole=False)):
                yield f"{here}/{there}/{name}"


def _names(folder: Path, beginning: str, *, whole: bool) -> list[str]:
    """Return the folders in `folder` that begin so, or are called so, the last first."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return sorted(
        (
            name
            for name in names
            if not name.startswith(".")
            and (name == beginning if whole else name.startswith(beginning))
            and (folder / name).is_dir()
        ),
        reverse=True,
    )
