"""RQ's own command line, as docs/operations.md has it, against a Redis into which somebody has put pickles."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import ValkeyServer

pytestmark = pytest.mark.valkey

DOCUMENT = Path(__file__).parents[2] / "docs" / "operations.md"


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_the_documented_rq_info_shows_the_queues_and_unpickles_nothing(
    valkey: ValkeyServer, tmp_path: Path
) -> None:
    mark = tmp_path / "exploded"
    pickled = pickle.dumps(Bomb(mark))
    client = valkey.client()
    client.sadd("rq:queues", "rq:queue:backup")
    client.rpush("rq:queue:backup", "bad")
    planted = {
        "data": zlib.compress(pickled),
        "meta": pickled,
        "result": pickled,
        "origin": "backup",
        "status": "queued",
    }
    client.hset("rq:job:bad", mapping=planted)
    client.sadd("rq:workers", "rq:worker:one")
    client.hset(
        "rq:worker:one", mapping={"queues": "backup", "state": "busy", "current_job": "bad", "pid": "1"}
    )
    [line] = re.findall(r"^(RQ_REDIS_URL=.* rq info)$", DOCUMENT.read_text(), re.MULTILINE)
    told = subprocess.run(
        ["sh", "-c", line], env={**os.environ, "REDIS_URL": valkey.url, "PATH": _path()},
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert "backup" in told.stdout and "1 jobs total" in told.stdout, told
    assert not mark.exists()
    # What is planted would have worked.
    pickle.loads(pickled)
    assert mark.exists()


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
