"""An agent's folder, a repository beside it, and short ways to act on both; for the tests of the snapshot engine."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backup_worker.snapshots import AgentFiles, Manifest, Repository, take_snapshot
from backup_worker.snapshots.disk import Tree

NOON = 1_795_000_000.0
"""Some Unix time; tests count from here."""

NOBODY = 65534

CLASSES = {
    "charter": ["SOUL.md"],
    "weights": ["weights.json"],
    "memory": ["memory/**"],
    "skills": ["skills/**"],
}
EXCLUDE = ("**/__pycache__/**", "venv", "*.lock")


@dataclass
class Place:
    """A folder with one agent and one repository in it."""

    base: Path
    name: str = "z"

    @property
    def root(self) -> Path:
        return self.base / "agents" / self.name

    @property
    def repo(self) -> Repository:
        return Repository(self.base / "repo")

    @property
    def agent(self) -> AgentFiles:
        return AgentFiles(self.name, self.root, CLASSES, ("SOUL.md", "weights.json"), EXCLUDE)

    def fill(self) -> Place:
        """Write a small agent with one file of every class."""
        self.write("SOUL.md", f"I am {self.name}, and this is who I am.\n")
        self.write("weights.json", '{"speed": 0.5, "care": {"depth": 3}}\n')
        self.write("memory/notes.md", "remember the milk\n" * 20)
        self.write("memory/deep/er/log.txt", "line\n" * 50)
        self.write("skills/greet.py", "def greet():\n    return 'hello'\n")
        return self

    def write(self, path: str, text: str | bytes) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return file

    def take(self, *, tier: str = "daily", slot: str = "s", now: float = NOON, **options: Any) -> Manifest:
        """Take a snapshot of everything, unless the options say otherwise."""
        options = {"include": ["*"], "unchanged": "copy", "reason": "test"} | options
        return take_snapshot(self.repo, self.agent, tier=tier, slot=slot, now=now, **options)

    def stored(self, snapshot: str, path: str) -> Path:
        return self.repo.path(snapshot) / "files" / path


@contextlib.contextmanager
def without_privileges() -> Iterator[Path]:
    """Yield a fresh folder in which this process has no more rights than any user, also when it runs as root."""
    base = Path(tempfile.mkdtemp(prefix="agent-backup-"))
    was_root = os.geteuid() == 0
    try:
        if was_root:
            os.chown(base, NOBODY, NOBODY)
            os.seteuid(NOBODY)
        yield base
    finally:
        if was_root:
            os.seteuid(0)
        with Tree(base.parent) as parent:
            parent.remove(base.name)


def coreutils_proves(folder: Path) -> bool:
    """Ask the real `sha256sum`."""
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0


def content_of(root: Path) -> dict[str, str | bytes]:
    """Return path -> content of a tree; folders as "/", links as "-> target"."""
    found: dict[str, str | bytes] = {}
    for folder, names, files in os.walk(root):
        for name in [*names, *files]:
            path = Path(folder) / name
            info = path.lstat()
            key = str(path.relative_to(root))
            if stat.S_ISLNK(info.st_mode):
                found[key] = f"-> {os.readlink(path)}"
            elif stat.S_ISREG(info.st_mode):
                found[key] = path.read_bytes()
            else:
                found[key] = "/" if stat.S_ISDIR(info.st_mode) else "special"
    return found
