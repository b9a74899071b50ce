"""The command line `backup-worker`: one module a group of commands."""

from __future__ import annotations

from typing import NoReturn


def main() -> NoReturn:
    """Run `backup-worker` on the process's arguments; the exit codes are those of the contract."""
    from backup_worker.cli._app import app
    from em_bridge.terminal import run

    run(app)
