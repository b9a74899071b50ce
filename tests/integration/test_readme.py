"""The README's examples are run, so that they stay true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from em_bridge import streams
from tests.integration.conftest import ValkeyServer

README = (Path(__file__).parents[2] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(code: str, folder: Path, url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "REDIS_URL": url},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("code", EXAMPLES)
def test_the_python_examples_of_the_readme_run(code: str, tmp_path: Path, valkey: ValkeyServer) -> None:
    done = run(code, tmp_path, valkey.url)
    assert done.returncode == 0, done.stderr


def test_the_examples_do_what_the_readme_says(tmp_path: Path, valkey: ValkeyServer) -> None:
    for code in EXAMPLES:
        run(code, tmp_path, valkey.url)
    client = valkey.client()
    assert client.xlen(streams.MESSAGES) == 1
    assert client.xlen(streams.HEARTBEATS) >= 1
    assert client.xlen(streams.AGENT_STATE) == 1
    assert client.xlen(streams.CONFIG_CHANGE) == 2


def test_every_command_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"`(?:backup-worker|em-bridge) ([a-z-]+)", README))
    for program in ("backup_worker", "em_bridge"):
        shown = subprocess.run(
            [sys.executable, "-m", program, "--help"], capture_output=True, text=True, check=True
        ).stdout
        named -= {name for name in named if re.search(rf"\b{name}\b", shown)}
    assert named == set()
