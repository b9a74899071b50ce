"""Outbox, log, router, inbox and replay against a model: whatever crashes in between, each message once, in order."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from em_bridge import replay, streams
from em_bridge.agent import _Drain
from em_bridge.connection import connect
from em_bridge.inbox import Inbox
from em_bridge.lease import Lease
from em_bridge.messages import append_batch
from em_bridge.outbox import Outbox
from em_bridge.router import Router
from tests.integration.conftest import ValkeyServer

pytestmark = pytest.mark.valkey

SENDERS = ("z", "moe")
RECEIVERS = ("jay", "rick")
senders, receivers = st.sampled_from(SENDERS), st.sampled_from(RECEIVERS)


class Sender:
    """An outbox and what drains it; reopened after a crash."""

    def __init__(self, client: redis.Redis, folder: Path, name: str) -> None:
        self.client, self.name, self.path = client, name, folder / name
        self.kept = folder / f"{name}.kept"
        self.open()

    def open(self) -> None:
        self.outbox = Outbox(self.path, self.name)
        self.drain = _Drain(self.client, self.name, self.outbox)

    def copy(self, source: Path, target: Path) -> None:
        """Copy a closed outbox."""
        for old in target.parent.glob(f"{target.name}*"):
            if old.name in (target.name, f"{target.name}-wal", f"{target.name}-shm"):
                old.unlink()
        for end in ("", "-wal"):
            if Path(f"{source}{end}").exists():
                shutil.copy(f"{source}{end}", f"{target}{end}")


class Receiver(Sender):
    """An inbox, and a program that commits what it has done together with the number of the message."""

    def open(self) -> None:
        super().open()
        self.inbox = Inbox(self.client, self.name, self.outbox)

    done: dict[str, list[tuple[int, int]]]
    kept_done: dict[str, list[tuple[int, int]]]

    def receive(self, *, crash: bool) -> bool:
        message = self.inbox.receive(0.0)
        if message is None:
            return False
        mine = self.done[message.sender]
        if not mine or message.seq > mine[-1][0]:
            mine.append((message.seq, int(message.payload)))
        if crash:
            self.outbox.close()
            self.open()
        else:
            self.inbox.ack(message)
        return True


class Bus(RuleBasedStateMachine):
    url: str

    @initialize()
    def begin(self) -> None:
        self.client = connect(self.url, retrying=False)
        self.client.flushall()
        self.client.sadd(streams.SEEN, *RECEIVERS)
        self.folder = Path(tempfile.mkdtemp())
        self.senders = {name: Sender(self.client, self.folder, name) for name in SENDERS}
        self.receivers = {name: Receiver(self.client, self.folder, name) for name in RECEIVERS}
        for receiver in self.receivers.values():
            receiver.done = defaultdict(list)
        self.numbers = itertools.count()
        self.sent: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.new_router()

    @rule(sender=senders, to=receivers, count=st.integers(1, 4))
    def put(self, sender: str, to: str, count: int) -> None:
        for _ in range(count):
            number = next(self.numbers)
            self.senders[sender].outbox.put(to, b"%d" % number)
            self.sent[sender, to].append(number)

    @rule(sender=senders)
    def drain(self, sender: str) -> None:
        self.senders[sender].drain.step()

    @rule(sender=senders)
    def the_reply_to_a_batch_is_lost(self, sender: str) -> None:
        one = self.senders[sender]
        if batch := one.outbox.batch(limit=3):
            append_batch(self.client, sender, batch)
        one.drain.interrupted()

    @rule(sender=senders)
    def a_sender_crashes(self, sender: str) -> None:
        self.senders[sender].outbox.close()
        self.senders[sender].open()

    @rule(sender=senders)
    def an_outbox_is_backed_up(self, sender: str) -> None:
        one = self.senders[sender]
        one.outbox.close()
        one.copy(one.path, one.kept)
        one.open()

    @precondition(
        lambda self: any(one.kept.exists() and not one.outbox.waiting() for one in self.senders.values())
    )
    @rule()
    def an_outbox_is_restored(self) -> None:
        for one in self.senders.values():
            if one.kept.exists() and not one.outbox.waiting():
                one.outbox.close()
                one.copy(one.kept, one.path)
                one.open()
                return

    @rule()
    def route(self) -> None:
        self.router.step(0.001)

    @rule()
    def new_router(self) -> None:
        lease = Lease(self.client, "em", holder=f"router-{next(self.numbers)}", ttl_s=60)
        epoch = lease.acquire(gone=lambda holder: True)
        assert epoch is not None
        self.router = Router(self.client, consumer=lease.holder, epoch=epoch)

    @rule()
    def a_router_crashes_with_messages_in_its_hands(self) -> None:
        streams.ensure_group(self.client, streams.MESSAGES, streams.ROUTER_GROUP)
        self.client.xreadgroup(streams.ROUTER_GROUP, "killed", {streams.MESSAGES: ">"}, count=3)
        self.new_router()

    @rule(to=receivers, crash=st.booleans())
    def receive(self, to: str, crash: bool) -> None:
        self.receivers[to].receive(crash=crash)

    @rule(to=receivers)
    def a_receiver_is_backed_up(self, to: str) -> None:
        one = self.receivers[to]
        one.outbox.close()
        one.copy(one.path, one.kept)
        one.kept_done = {name: list(found) for name, found in one.done.items()}
        one.open()

    @rule(to=receivers)
    def a_receiver_is_restored_and_what_it_lacks_replayed(self, to: str) -> None:
        one = self.receivers[to]
        if not one.kept.exists():
            return
        one.outbox.close()
        one.copy(one.kept, one.path)
        one.done = defaultdict(list, {name: list(found) for name, found in one.kept_done.items()})
        one.open()
        one.inbox.prepare()
        self.replay()

    @rule(sender=senders, to=receivers, took=st.integers(1, 3), left=st.integers(0, 3))
    def a_receiver_forgets_what_it_took_while_more_waits(
        self, sender: str, to: str, took: int, left: int
    ) -> None:
        self.a_receiver_is_backed_up(to)
        for count in (took, left):
            if count:
                self.put(sender, to, count)
            while self.senders[sender].drain.step():
                pass
            self.route()
            self.route()
            if count is took:
                for _ in range(took):
                    self.receivers[to].receive(crash=False)
        self.a_receiver_is_restored_and_what_it_lacks_replayed(to)

    @rule()
    def the_log_is_routed_again_from_its_beginning(self) -> None:
        streams.ensure_group(self.client, streams.MESSAGES, streams.ROUTER_GROUP)
        self.client.xgroup_setid(streams.MESSAGES, streams.ROUTER_GROUP, "0")
        self.new_router()
        self.route()
        self.route()

    @rule()
    def replay(self) -> None:
        replay.execute(self.client, replay.plan_replay(self.client))

    @rule()
    def trim(self) -> None:
        for name in RECEIVERS:
            streams.trim(self.client, streams.inbox(name), older_than_s=0)

    @invariant()
    def nothing_is_doubled_or_out_of_order(self) -> None:
        for to, receiver in getattr(self, "receivers", {}).items():
            for sender, found in receiver.done.items():
                got = [number for _, number in found]
                assert got == self.sent[sender, to][: len(got)]
            waiting = [(m.sender, m.seq) for m in replay.unacknowledged(self.client, streams.inbox(to))]
            assert len(waiting) == len(set(waiting))

    def teardown(self) -> None:
        if not hasattr(self, "receivers"):
            return
        try:
            self.everything_arrives()
        finally:
            for one in (*self.senders.values(), *self.receivers.values()):
                one.outbox.close()
            self.client.close()
            shutil.rmtree(self.folder)

    def everything_arrives(self) -> None:
        for one in self.senders.values():
            while one.drain.step():
                pass
        self.new_router()
        idle = 0
        while idle < 2:
            idle = 0 if self.router.step(0.001) else idle + 1
        for to, receiver in self.receivers.items():
            idle = 0
            while idle < 3:
                idle = 0 if receiver.receive(crash=False) else idle + 1
            for sender in SENDERS:
                assert [number for _, number in receiver.done[sender]] == self.sent[sender, to]
            waiting = self.client.xpending(streams.inbox(to), streams.INBOX_GROUP)["pending"]
            receiver.inbox.close()
            assert waiting <= 1 or not self.client.xpending(streams.inbox(to), streams.INBOX_GROUP)["pending"]
        assert self.client.xlen(streams.DEAD_LETTER) == 0
        assert self.client.xpending(streams.MESSAGES, streams.ROUTER_GROUP)["pending"] == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    made = ValkeyServer(tmp_path_factory.mktemp("valkey"), options={"appendonly": "no"})
    yield made
    made.close()


def test_whatever_crashes_in_between_each_message_arrives_once_and_in_order(server: ValkeyServer) -> None:
    Bus.url = server.url
    run_state_machine_as_test(
        Bus,
        settings=settings(
            max_examples=15,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            # Making a failure smaller takes minutes on a real server; its steps are printed as they are.
            phases=[Phase.explicit, Phase.reuse, Phase.generate],
        ),
    )
