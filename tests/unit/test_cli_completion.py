"""What the shell offers on Tab, asked as bash asks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(sys.executable).with_name("backup-worker")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a configuration of two agents, and a repository that is elsewhere."""
    (tmp_path / "config").mkdir()
    schedule = {"repository": "${HOME}/kept", "tiers": {"daily": {}, "weekly": {}}}
    (tmp_path / "config" / "backup_schedule.json").write_text(json.dumps(schedule))
    (tmp_path / "config" / "agents.json").write_text(json.dumps({"agents": {"z": {}, "jay": {}}}))
    for identifier in (
        "weekly/2026-W47/z",
        "weekly/2026-W48/z",
        "daily/2026-11-23/jay",
        ".agent-backup/marks/z",
    ):
        (tmp_path / "kept" / identifier).mkdir(parents=True)
    return tmp_path


def offered(home: Path, line: str, cwd: Path | None = None) -> list[str]:
    """Return what is offered for the last word of `line`."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(home), "_BACKUP_WORKER_COMPLETE": "complete_bash"}
    environ |= {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    done = subprocess.run(
        [PROGRAM], cwd=cwd or home, env=environ, capture_output=True, text=True, check=False, timeout=30
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("backup-worker resto", ["restore"]),
        ("backup-worker backup ", ["jay", "z"]),
        ("backup-worker restore z ", ["jay"]),
        ("backup-worker backup --tier w", ["weekly"]),
        ("backup-worker list --agent j", ["jay"]),
        ("backup-worker show ", ["weekly/2026-W48/z", "weekly/2026-W47/z", "daily/2026-11-23/jay"]),
        ("backup-worker diff weekly/2026-W47/z weekly/2026-W48/", ["weekly/2026-W48/z"]),
        ("backup-worker restore z --from d", ["daily/2026-11-23/jay"]),
        ("backup-worker show weekly/../", []),
    ],
)
def test_agents_tiers_and_snapshots_are_offered(home: Path, line: str, expected: list[str]) -> None:
    assert sorted(offered(home, line)) == sorted(expected)


@pytest.mark.parametrize("line", ["backup-worker --config {} show d", "backup-worker show --config {} d"])
def test_the_configuration_that_the_line_names_is_read(home: Path, line: str) -> None:
    assert offered(home, line.format(home / "config"), cwd=Path("/")) == ["daily/2026-11-23/jay"]


@pytest.mark.parametrize("text", ["{", "[]", '{"agents": 3, "repository": 3}'])
def test_a_broken_configuration_offers_nothing_and_says_nothing(home: Path, text: str) -> None:
    for name in ("agents.json", "backup_schedule.json"):
        (home / "config" / name).write_text(text)
    assert offered(home, "backup-worker show ") == []
    assert offered(home, "backup-worker backup ") == []


def test_completing_imports_neither_the_engine_nor_what_checks_the_configuration(home: Path) -> None:
    code = "import sys, backup_worker.cli._app; print([m for m in sys.modules if m in sys.argv[1:]])"
    heavy = ["pydantic", "redis", "rq", "flask", "apprise", "backup_worker.snapshots", "backup_worker.config"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_shown_for_each_shell(home: Path, shell: str) -> None:
    done = subprocess.run(
        [PROGRAM, "--show-completion", shell],
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "_BACKUP_WORKER_COMPLETE" in done.stdout
