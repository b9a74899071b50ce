"""What tests about messages have in common: known agents, receiving all, looking into the log."""

from __future__ import annotations

import time

import redis

from em_bridge import Agent, streams
from em_bridge.connection import connect
from em_bridge.events import DeadLetter, Message, decode
from em_bridge.lease import Lease
from em_bridge.router import Router
from tests.integration.conftest import ValkeyServer


def make_known(client: redis.Redis, *names: str) -> None:
    client.sadd(streams.SEEN, *names)


def receive_all(agent: Agent, number: int, *, timeout_s: float = 15.0) -> list[bytes]:
    """Receive and acknowledge until `number` messages are there, and then look whether more come."""
    found: list[bytes] = []
    deadline = time.monotonic() + timeout_s
    while len(found) < number and time.monotonic() < deadline:
        message = agent.receive(0.5)
        if message:
            found.append(message.payload)
            agent.ack(message)
    while message := agent.receive(0.3):
        found.append(message.payload)
    return found


def numbers(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


def log_of(client: redis.Redis) -> list[Message]:
    found = [decode(fields) for _, fields in streams.read_range(client, streams.MESSAGES)]
    assert all(isinstance(event, Message) for event in found)
    return found  # type: ignore[return-value]


def letters(client: redis.Redis) -> list[DeadLetter]:
    return [decode(fields) for _, fields in streams.read_range(client, streams.DEAD_LETTER)]  # type: ignore[misc]


def router(valkey: ValkeyServer, holder: str = "one", ttl_s: float = 5.0) -> Router:
    lease = Lease(valkey.client(), "em", holder=holder, ttl_s=ttl_s)
    epoch = lease.acquire()
    assert epoch is not None
    return Router(connect(valkey.url, retrying=False), consumer=holder, epoch=epoch)


def drain(routing: Router) -> None:
    idle = 0
    while idle < 2:
        idle = 0 if routing.step(0.01) else idle + 1


def inbox_of(client: redis.Redis, agent: str) -> list[bytes]:
    found = [decode(fields) for _, fields in streams.read_range(client, streams.inbox(agent))]
    return [event.payload for event in found if isinstance(event, Message)]
