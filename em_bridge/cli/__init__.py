"""The command line `em-bridge`: one module a group of commands, each adding its own to the application.

A command's result goes to stdout, log lines to stderr; the exit codes are those of the contract.
"""

from __future__ import annotations

from typing import NoReturn

from em_bridge import terminal
from em_bridge.cli import log, publishing, rights, running

app = terminal.new_app("The bus between an execution manager, its agents and Agent Backup.")

for group in (publishing, log, running, rights):
    group.add_commands(app)


def main() -> NoReturn:
    """Run `em-bridge` on the process's arguments."""
    terminal.run(app)
