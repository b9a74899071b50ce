"""`python -m backup_worker.reference`: write what is made from the models and the commands.

These are the reference pages in docs/ and the JSON Schemas in config/. `--check` only says which are stale.
"""

from __future__ import annotations

import sys
from pathlib import Path

import backup_worker.reference.commands as commands
import backup_worker.reference.configuration as configuration
from backup_worker.config import schemas

TOP = Path(__file__).parents[2]


def pages() -> dict[str, str]:
    """Return the text of each file by its path from the top of the project."""
    shipped = {f"config/{name}": text for name, text in schemas().items()}
    return {"docs/configuration.md": configuration.page(), "docs/commands.md": commands.page(), **shipped}


def main(arguments: list[str]) -> int:
    """Write what has changed, or with `--check` name it and return 1."""
    stale = [name for name, text in pages().items() if _read(TOP / name) != text]
    for name in stale:
        sys.stdout.write(f"{name}\n")
        if "--check" not in arguments:
            (TOP / name).write_text(pages()[name], encoding="utf-8")
    return 1 if stale and "--check" in arguments else 0


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
