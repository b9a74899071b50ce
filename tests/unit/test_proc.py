"""What the kernel tells of a process, read without a library."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

from backup_worker.recovery import proc


@contextmanager
def process(env: Mapping[str, str]) -> Iterator[int]:
    pipe = subprocess.PIPE
    with subprocess.Popen(["/bin/sh", "-c", "echo; read line"], env=env, stdin=pipe, stdout=pipe) as running:
        assert running.stdout is not None
        # Not before it runs: while it is loaded, it seems to have no environment.
        running.stdout.readline()
        yield running.pid


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({}, {}),
        ({"AGENT_ID": "z"}, {"AGENT_ID": "z"}),
        ({"A": "1", "AGENT_ID": "z", "AGENT_ROOT": "/a b=c", "B": "2"}, {"AGENT_ID": "z", "AGENT_ROOT": "/a b=c"}),
        ({"MY_AGENT_ID": "z", "AGENT_IDS": "z", "A": "AGENT_ID=z"}, {}),
        ({"AGENT_ID": ""}, {"AGENT_ID": ""}),
        ({"LONG": "x" * 100_000, "AGENT_ID": "z"}, {"AGENT_ID": "z"}),
    ],
)  # fmt: skip
def test_of_an_environment_only_the_variables_of_these_names_are_found(
    env: dict[str, str], found: dict[str, str]
) -> None:
    with process(env) as pid:
        assert proc.environment(pid, "AGENT_ID", "AGENT_ROOT") == found
