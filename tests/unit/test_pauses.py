"""A pause that ends by its time ends nothing that a human has said meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakeredis
import pytest

from backup_worker import alerts
from backup_worker.recovery import breakers
from backup_worker.recovery.service import RecoveryService
from em_bridge import streams
from tests.small_fleet import SmallFleet


class Interrupted(fakeredis.FakeRedis):
    """A server to which somebody else speaks just before a transaction arrives."""

    before: Callable[[], object] | None = None

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Any:
        made = super().pipeline(transaction, shard_hint)
        execute = made.execute

        def interrupted(raise_on_error: bool = True) -> Any:
            before, self.before = self.before, None
            if before is not None:
                before()
            return execute(raise_on_error)

        made.execute = interrupted  # type: ignore[method-assign]  # what arrives is what was asked for
        return made


@pytest.fixture
def client() -> Interrupted:
    return Interrupted()


def open_keys(client: Any) -> list[str]:
    return [one.key for one in alerts.open_alerts(client)]


def test_a_pause_that_came_as_the_one_before_it_ran_out_holds(tmp_path: Path, client: Interrupted) -> None:
    service = RecoveryService(SmallFleet(tmp_path).runtime(client))
    now = streams.server_time(client)
    service.pause("kari", "for an hour", until=now - 1)
    client.before = lambda: service.pause("kari", "until I say so")
    service.end_pause_in_time()
    held = breakers.stored(client)
    assert held is not None
    assert held.reason == "until I say so"
    assert open_keys(client) == ["recovery-paused"]
    assert list(service.runtime.history.read("recovery-resumed")) == []


def test_a_pause_whose_time_is_over_ends_and_is_told_once(tmp_path: Path, client: Interrupted) -> None:
    service = RecoveryService(SmallFleet(tmp_path).runtime(client))
    service.pause("kari", "for an hour", until=streams.server_time(client) - 1)
    service.end_pause_in_time()
    service.end_pause_in_time()
    assert breakers.stored(client) is None
    assert open_keys(client) == []
    (line,) = service.runtime.history.read("recovery-resumed")
    assert line["by"] == "its time was over"
