"""Commands: demo."""

from __future__ import annotations

import typer


def add_commands(app: typer.Typer) -> None:
    """Add this group's commands to `app`."""
