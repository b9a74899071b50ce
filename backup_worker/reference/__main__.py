"""`python -m backup_worker.reference`: write the reference pages into docs/; `--check` only says which are stale."""

from __future__ import annotations

import sys
from pathlib import Path

import backup_worker.reference.commands as commands
import backup_worker.reference.configuration as configuration

DOCS = Path(__file__).parents[2] / "docs"


def pages() -> dict[str, str]:
    """Return the text of each page by its name."""
    return {"configuration.md": configuration.page(), "commands.md": commands.page()}


def main(arguments: list[str]) -> int:
    """Write what has changed, or with `--check` name it and return 1."""
    stale = [name for name, text in pages().items() if _read(DOCS / name) != text]
    for name in stale:
        sys.stdout.write(f"docs/{name}\n")
        if "--check" not in arguments:
            (DOCS / name).write_text(pages()[name], encoding="utf-8")
    return 1 if stale and "--check" in arguments else 0


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
