"""The application object, and the groups of commands that are added to it."""

from __future__ import annotations

import importlib

from em_bridge.terminal import new_app

app = new_app("Back up, prove and recover a fleet of AI agents.")

GROUPS: tuple[str, ...] = (
    "setup",
    "services",
    "snapshots",
    "drill",
    "recovery",
    "bisect",
    "changes",
    "revert",
    "status",
    "alerts",
    "letters",
    "record",
    "console_users",
    "demo",
)
"""The modules of this package that add commands, in the order in which `--help` shows them."""

for _group in GROUPS:
    importlib.import_module(f"backup_worker.cli.{_group}").add_commands(app)
