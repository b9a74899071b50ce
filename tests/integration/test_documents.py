"""The examples in the documents are run, as a reader would run them, so that they stay true."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from backup_worker.alerts import refused_urls
from backup_worker.config import SCHEDULE_FILE, load
from backup_worker.discovery import starter
from backup_worker.discovery.fleet import discover
from backup_worker.history import History
from em_bridge import streams
from em_bridge.events import decode
from tests import documents
from tests.integration.conftest import ValkeyServer
from tests.tools import needs

EXAMPLES = [
    (block.document, block.text)
    for path in documents.DOCUMENTS
    for block in documents.blocks(path)
    if block.language == "python"
]


def run_python(code: str, folder: Path, url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "REDIS_URL": url},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(("document", "code"), EXAMPLES)
def test_the_python_examples_run(document: str, code: str, tmp_path: Path, valkey: ValkeyServer) -> None:
    History(tmp_path / "system-history.jsonl").append("backup", now=1795440004.25, agent="z")
    done = run_python(code, tmp_path, valkey.url)
    assert done.returncode == 0, f"{document}: {done.stderr}"


@pytest.mark.parametrize("document", ["README.md", "connecting.md"])
def test_the_examples_do_what_the_text_says(document: str, tmp_path: Path, valkey: ValkeyServer) -> None:
    for where, code in EXAMPLES:
        if where == document:
            run_python(code, tmp_path, valkey.url)
    client = valkey.client()
    assert client.xlen(streams.MESSAGES) == 1
    assert client.xlen(streams.HEARTBEATS) >= 1
    assert client.xlen(streams.AGENT_STATE) == 1
    assert client.xlen(streams.CONFIG_CHANGE) == 2


class Reader:
    """Somebody with a terminal, an empty home, and our two programs."""

    def __init__(self, home: Path) -> None:
        self.home = home
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env = {"HOME": str(home), "PATH": path, "LANG": "C.UTF-8", "RESTIC_PASSWORD": "correct horse"}
        self.env |= {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}

    def run(self, text: str, **env: str | Path) -> str:
        """Have a shell run `text`, stopping at the first failure; return what it has printed."""
        done = subprocess.run(
            ["sh", "-e", "-c", text],
            cwd=self.home,
            env=self.env | {name: str(value) for name, value in env.items()},
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def block(self, name: str, **env: str | Path) -> str:
        """Run the block of the documents with this name."""
        return self.run(documents.block(name).text, **env)


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader(tmp_path)


def write(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def test_a_fleet_comes_under_protection_as_the_text_says(reader: Reader) -> None:
    home = reader.home / ".openclaw"
    for agent in ("workspace", "workspace-jay"):
        for name in ("SOUL.md", "AGENTS.md", "MEMORY.md", "memory/2026-11-22.md", "skills/x/SKILL.md"):
            write(home / agent / name, f"# {name}\n")
        write(home / agent / "skills/x/node_modules/y/index.js", "x\n")
        write(home / agent / ".env", "TOKEN=1\n")
    write(home / "openclaw.json", "{}")
    write(home / "agents/main/sessions/a.jsonl", "{}")
    said = reader.block("five-minutes")
    assert "main: secrets by their names, backed up like the rest (files only you can read): .env" in said
    assert f"not taken: {home}: openclaw.json and agents are beside the workspaces" in said
    assert "weekly/" in said and "jay: good, 6 files" in said
    assert "0 failed" in said


def test_the_first_five_minutes_of_the_readme_are_as_it_says(reader: Reader) -> None:
    for agent in ("z", "jay"):
        write(reader.home / "agents" / agent / "SOUL.md", "I\n")
    # In a checkout, where a configuration lies already.
    reader.home = reader.home / "checkout"
    write(reader.home / ".venv" / "bin" / "activate", ":\n")
    shutil.copytree(documents.ROOT / "config", reader.home / "config")
    said = reader.block("readme")
    assert "weekly/" in said and "jay: good, 1 file" in said and "0 failed" in said
    (snapshot,) = reader.home.parent.glob("fleet-backup/backups/weekly/*/jay")
    reader.run('cd "$SNAPSHOT" && sha256sum --check SHA256SUMS && cp -R files ~/again', SNAPSHOT=snapshot)
    assert (reader.home.parent / "again" / "SOUL.md").read_text() == "I\n"


def test_the_agents_that_the_text_shows_can_be_added(reader: Reader) -> None:
    write(reader.home / ".openclaw" / "workspace" / "SOUL.md", "I\n")
    write(reader.home / ".openclaw" / "openclaw.json", "{}")
    reader.run("mkdir -p agent-backup && cd agent-backup && backup-worker init --from ~/.openclaw")
    file = reader.home / "agent-backup" / "config" / "agents.json"
    document = json.loads(file.read_text())
    for path in documents.DOCUMENTS:
        for block in documents.blocks(path):
            if block.language == "json" and '"${HOME}' in block.text:
                document["agents"] |= json.loads(block.text)["agents"]
    assert set(document["agents"]) == {"main", "openclaw", "our-settings"}
    file.write_text(json.dumps(document))
    said = reader.run("cd agent-backup && backup-worker backup --tier weekly && backup-worker doctor")
    assert "openclaw: good, 1 file" in said
    assert "our-settings: good, 4 files" in said


def test_any_program_is_run_with_a_heartbeat(reader: Reader, valkey: ValkeyServer) -> None:
    reader.block("any-program", REDIS_URL=valkey.url)
    beats = [decode(fields) for _, fields in streams.read_range(valkey.client(), streams.HEARTBEATS)]
    assert beats and {beat.agent for beat in beats} == {"rick"}  # type: ignore[union-attr]  # heartbeats alone


def test_the_rights_are_written_as_the_text_says(reader: Reader) -> None:
    write(reader.home / "fleet" / "z" / "SOUL.md", "I\n")
    reader.run("backup-worker init --from fleet")
    reader.block("acl")
    words = json.loads((reader.home / "passwords.json").read_text())
    assert {"dispatcher", "worker", "agent-z"} <= set(words)
    assert not any(word in (reader.home / "users.acl").read_text() for word in words.values())
    assert stat.S_IMODE((reader.home / "passwords.json").stat().st_mode) == 0o600


def test_an_approver_s_line_is_made_as_the_text_says(reader: Reader) -> None:
    needs("ssh-keygen", why="approvals are signed with it")
    write(reader.home / "fleet" / "z" / "SOUL.md", "I\n")
    reader.run(
        "backup-worker init --from fleet && mkdir .ssh && ssh-keygen -q -t ed25519 -N '' -f .ssh/id_ed25519"
    )
    assert "signed counts as approved" in reader.block("signers")
    signed = "ssh-keygen -q -Y sign -n agent-backup -f .ssh/id_ed25519 < statement > signature"
    proven = (
        "ssh-keygen -q -Y verify -n agent-backup -I kari -f config/allowed_signers -s signature < statement"
    )
    reader.run(f"echo yes > statement && {signed} && {proven}")


def test_what_the_text_shows_of_the_schedule_is_a_configuration(tmp_path: Path) -> None:
    shown = [
        json.loads(block.text)
        for block in documents.blocks(documents.ROOT / "docs" / "operations.md")
        if block.language == "json" and '"agents"' not in block.text
    ]
    assert {key for part in shown for key in part} == {"alerts", "agent_redis"}
    starter.write(tmp_path, starter.contents(tmp_path, [], "UTC"))
    file = tmp_path / SCHEDULE_FILE
    for part in shown:
        file.write_text(json.dumps(json.loads(file.read_text()) | part))
    loaded = load(tmp_path, environ={"SMTP_PASSWORD": "x"}, check_alerts=refused_urls)
    assert len(loaded.schedule.alerts) == 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an agent and a repository with everything that makes bringing it back by hand hard."""
    reader = Reader(tmp_path_factory.mktemp("made"))
    root = reader.home / "fleet" / "z"
    write(root / "SOUL.md", "I am z\n")
    write(root / "priority_weights.json", '{"impact": 0.7}\n')
    write(root / "memory" / "a.md", "a\n", 0o640)
    write(root / "memory" / "old notes" / "b.md", "b\n")
    write(root / "skills" / "run.sh", "#!/bin/sh\n", 0o755)
    (root / "memory" / "latest").symlink_to("a.md")
    config = reader.home / "config"
    starter.write(config, starter.contents(config, discover(root.parent).agents, "UTC"))
    reader.run("backup-worker backup --tier weekly")
    shutil.rmtree(root / "memory" / "old notes")
    write(root / "memory" / "c.md", "c\n", 0o600)
    reader.run("backup-worker backup --tier daily")
    reader.run("backup-worker backup --tier daily")
    write(root / "priority_weights.json", '{"impact": 0.8}\n')
    reader.run("backup-worker backup --tier on-change")
    write(root / "SOUL.md", "")
    # Exit code 1, because it is suspect; it has to be passed over by hand, too.
    reader.run("! backup-worker backup --tier weekly")
    return reader.home


@pytest.fixture
def stored(reader: Reader, made: Path) -> Path:
    """The repository of a copy of `made` in the reader's home."""
    reader.run('cp -a "$MADE/." .', MADE=made)
    return reader.home / "backups"


def tree(root: Path) -> dict[str, tuple[str, bytes | str]]:
    """Return mode and content of everything below `root`, by path."""
    found: dict[str, tuple[str, bytes | str]] = {}
    for path in sorted(root.rglob("*")):
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        found[path.relative_to(root).as_posix()] = (stat.filemode(path.lstat().st_mode), content)
    return found


def test_the_state_by_hand_is_the_state_that_restore_brings(reader: Reader, stored: Path) -> None:
    listed = reader.block("by-hand-list", REPOSITORY=stored)
    assert listed.count('"status": "good"') == 4 and listed.count('"status": "suspect"') == 1
    used = reader.block("by-hand", REPOSITORY=stored, AGENT="z", TARGET=reader.home / "by-hand").split()
    assert [one.split("/")[0] for one in used] == ["weekly", "daily", "daily", "on-change"]
    reader.run("backup-worker restore z --to by-us")
    by_hand = tree(reader.home / "by-hand")
    assert by_hand == tree(reader.home / "by-us")
    assert by_hand["skills/run.sh"][0] == "-rwxr-xr-x"
    assert "memory/old notes" not in by_hand


def test_by_hand_stops_at_a_damaged_snapshot_and_says_so(reader: Reader, stored: Path) -> None:
    (weights,) = stored.glob("on-change/*/z/files/priority_weights.json")
    weights.write_text('{"impact": 9.9}\n')
    target = reader.home / "by-hand"
    reader.block("by-hand", REPOSITORY=stored, AGENT="z", TARGET=target)
    assert (target / "priority_weights.json").read_text() == '{"impact": 0.7}\n'


@pytest.mark.parametrize("name", ["rsync", "move"])
def test_a_copy_by_rsync_is_proven_and_takes_no_more_space(reader: Reader, stored: Path, name: str) -> None:
    needs("rsync", why="the copy elsewhere is tried")
    copy = reader.home / "copy"
    reader.block(name, REPOSITORY=stored, COPY=copy, OLD=stored, NEW=copy)
    assert "DAMAGED" not in reader.block("prove-copy", COPY=copy)
    shared = [path for path in copy.rglob("files/**/*") if path.is_file() and path.stat().st_nlink > 1]
    assert shared
    (copy / "weekly").rename(reader.home / "aside")
    (reader.home / "aside").rename(copy / "weekly")
    next(copy.glob("weekly/*/z/files/memory/a.md")).write_text("rot\n")
    assert "DAMAGED: weekly/" in reader.run(documents.block("prove-copy").text + "true", COPY=copy)


def test_a_copy_by_restic_comes_back_whole(reader: Reader, stored: Path) -> None:
    needs("restic", why="the copy elsewhere is tried")
    copy = reader.home / "copy"
    reader.run('restic init --repo "$COPY"', COPY=copy)
    reader.block("restic", REPOSITORY=stored, COPY=copy)
    back = reader.home / "back"
    reader.run('restic --repo "$COPY" restore latest --target "$BACK"', COPY=copy, BACK=back)
    assert tree(back / stored.relative_to("/") / "weekly") == tree(stored / "weekly")
