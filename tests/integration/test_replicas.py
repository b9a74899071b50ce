"""Behind Sentinel a write counts when a replica has it, or when the Sentinels agree that none lives."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from em_bridge import replicas, streams
from em_bridge.connection import connect, translate
from em_bridge.errors import RedisUnavailable
from em_bridge.events import AgentState, encode
from em_bridge.lease import Lease
from em_bridge.messages import append_batch
from em_bridge.monitor import Monitor
from em_bridge.outbox import Outgoing
from tests.integration.sentinels import Sentinels
from tests.small_fleet import until

pytestmark = pytest.mark.valkey

DEATH = AgentState("z", "DEAD")


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[Sentinels]:
    with contextlib.closing(Sentinels(tmp_path)) as found:
        yield found


def publish(client: redis.Redis) -> str | None:
    """Publish the same event as ever; None if no replica has confirmed it."""
    try:
        return streams.append_once(client, DEATH, once="the one")
    except redis.ResponseError as error:
        assert isinstance(translate(error), RedisUnavailable)
        assert "NOREPLICAS" in str(error)
        return None


def declare_dead(client: redis.Redis) -> None:
    """Publish a death as a monitor does that repeats it after a lost reply."""
    monitor = Monitor(client, epoch=1)
    monitor._write("a marker", {"z"}, [encode(DEATH)[b"body"]])


KEPT: dict[str, Callable[[redis.Redis], object]] = {
    "an event": lambda client: streams.append_once(client, DEATH, once="one"),
    "events": lambda client: streams.append_all_once(client, [DEATH, DEATH], once="all"),
    "a message": lambda client: append_batch(client, "z", [Outgoing(1, "line", "jay", b"hello", 1e9)]),
    "a death": declare_dead,
    "a lease": lambda client: Lease(client, "watchdog", holder="me", ttl_s=60).acquire(),
}


def test_what_no_replica_has_is_refused_until_one_has_it_however_often_it_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "WAIT_MS", 100)
    # Sentinels that take nobody for down within a test.
    with contextlib.closing(Sentinels(tmp_path, down_after_s=60.0)) as slow_to_judge:
        connect(slow_to_judge.url).set("em:epoch:em", 1)
        replica = slow_to_judge.replica
        replica.freeze()
        for _ in range(2):
            # The repetition has nothing to do, and comes by a connection that has written nothing yet.
            for what, write in KEPT.items():
                with pytest.raises(redis.ResponseError, match="NOREPLICAS"):
                    print(what, write(connect(slow_to_judge.url, retrying=False)))
        replica.thaw()
        for write in KEPT.values():
            until(lambda write=write: succeeds(write, connect(slow_to_judge.url, retrying=False)))
        for server in slow_to_judge.servers:
            client = server.client()
            assert (client.xlen(streams.AGENT_STATE), client.xlen(streams.MESSAGES)) == (4, 1)


def succeeds(write: Callable[[redis.Redis], object], client: redis.Redis) -> bool:
    try:
        write(client)
    except redis.ResponseError:
        return False
    return True


def test_sentinels_that_are_gone_hold_up_nobody(sentinels: Sentinels) -> None:
    # redis-py by itself tries each of them for ten seconds, at each new connection.
    for watcher in sentinels.watchers[:2]:
        watcher.kill()
    begun = time.monotonic()
    connect(sentinels.url, retrying=False).ping()
    assert time.monotonic() - begun < 4


def test_a_primary_whose_replica_is_dead_works_alone(sentinels: Sentinels) -> None:
    client = connect(sentinels.url, retrying=False)
    primary, replica = sentinels.primary, sentinels.replica
    replica.kill()
    assert until(lambda: publish(client), 20)
    # What is said of the primary does not hold for one that was deposed and cut off from the Sentinels.
    pool = client.connection_pool
    assert replicas._is_alone(pool, ("127.0.0.1", primary.port))
    assert not replicas._is_alone(pool, ("127.0.0.1", replica.port))


def test_a_primary_that_no_majority_of_sentinels_speaks_for_does_not_work_alone(sentinels: Sentinels) -> None:
    client = connect(sentinels.url, retrying=False)
    sentinels.replica.kill()
    assert until(lambda: publish(client), 20)
    for watcher in sentinels.watchers[1:]:
        watcher.kill()
    # Whom the others have promoted meanwhile the one that is left cannot know.
    until(lambda: not sentinels.has_majority(), 20)
    assert publish(client) is None


def test_a_primary_that_was_deposed_while_nobody_told_it_confirms_nothing(
    sentinels: Sentinels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "WAIT_MS", 100)
    client = connect(sentinels.url, retrying=False)
    assert until(lambda: publish(client))
    old = sentinels.primary
    old.freeze()
    until(lambda: sentinels.primary is not old, 30)
    new = sentinels.primary
    old.thaw()
    # The connection to the old one is still open. Whatever it answers before it is told, nothing may be lost.
    confirmed = set()
    for number in range(20):
        with contextlib.suppress(redis.RedisError):
            confirmed.add(streams.append_once(client, DEATH, once=f"after {number}"))
    assert confirmed <= {entry for entry, _ in streams.read_range(new.client(), streams.AGENT_STATE)}
