"""Delivering again what the message log holds and a recipient does not have.

Promise: a replay never hands an agent a message twice, nor out of order. What the agent has dealt with (it publishes
its `last_seen`) and what waits in its inbox is left out; messages that already wait there behind the missing ones are
moved behind them. What the router has not reached yet is left to the router. The change of one inbox is one script,
which does nothing if the inbox or the agent's knowledge changed since the plan was made; then the plan is made again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

import msgpack
import redis

from em_bridge import streams
from em_bridge.errors import AgentBackupError, InvalidEvent
from em_bridge.events import MAX_PAYLOAD_BYTES, Message, decode, encode, encode_body
from em_bridge.fields import AGENT_ID, MAX_MOMENT
from em_bridge.inbox import DECLARED, last_seen_key
from em_bridge.router import delivered_key, known_agents
from em_bridge.scripts import Arg, Script
from em_bridge.streams import INBOX_GROUP, MESSAGES, ROUTER_GROUP, Row

MAX_MESSAGES: Final = 100_000
"""The most that one replay moves for one agent: it is one script, and the server waits for it."""
TRIES: Final = 20

_unpack: Callable[[bytes], Any] = msgpack.unpackb
_MAP_OF_FIVE: Final = 0x85
"""How msgpack begins a map of five pairs."""
_ODD: Final = (KeyError, TypeError, ValueError, IndexError, OverflowError, msgpack.UnpackException)
"""What taking a message apart may raise if it is none, or not for somebody known yet."""

# KEYS: inbox, what was delivered, what the agent has. ARGV: group, the inbox's last id when planned, how many senders,
# (sender, number the agent had) of each, how many entries to take out, these, then (sender, number, log entry, body)
# of each message.
_REFILL = Script("""
local at = 3
local function take() at = at + 1; return ARGV[at - 1] end
local info, last = redis.call('XINFO', 'STREAM', KEYS[1]), nil
for i = 1, #info, 2 do if info[i] == 'last-generated-id' then last = info[i + 1] end end
if last ~= ARGV[2] then return 0 end
for _ = 1, tonumber(take()) do
  local sender, had = take(), take()
  if (redis.call('HGET', KEYS[3], sender) or '') ~= had then return 0 end
end
for _ = 1, tonumber(take()) do
  local entry = take()
  redis.call('XACK', KEYS[1], ARGV[1], entry)
  redis.call('XDEL', KEYS[1], entry)
end
while at <= #ARGV do
  local sender, seq, entry, body = take(), take(), take(), take()
  redis.call('XADD', KEYS[1], '*', 'type', 'message', 'body', body)
  local before = redis.call('HGET', KEYS[2], sender)
  if not before or tonumber(string.match(before, '^(%d+) ')) < tonumber(seq) then
    redis.call('HSET', KEYS[2], sender, seq .. ' ' .. entry)
  end
end
return 1
""")


@dataclass(slots=True)
class Refill:
    """What one agent lacks: `missing` in the log's order, and the entries of its inbox that must move behind them."""

    agent: str
    missing: list[Message] = field(default_factory=list)
    moved: list[Message] = field(default_factory=list)
    has: int = 0
    waiting: int = 0
    inbox_at: str = "0-0"
    had: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Plan:
    """A replay of the log from `start` to `end`; `unrouted` entries are the router's business."""

    start: str
    end: str
    messages: int = 0
    unrouted: int = 0
    unknown: int = 0
    refills: dict[str, Refill] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as the command line prints it."""
        refills = sorted(self.refills.values(), key=lambda refill: refill.agent)
        return {
            "from": self.start,
            "to": self.end,
            "messages": self.messages,
            "redelivered": sum(len(refill.missing) for refill in refills),
            "already_there": sum(refill.has for refill in refills),
            "waiting_in_inbox": sum(refill.waiting for refill in refills),
            "not_yet_routed": self.unrouted,
            "unknown_recipient": self.unknown,
            "agents": [
                {
                    "agent": refill.agent,
                    "redelivered": len(refill.missing),
                    "already_there": refill.has,
                    "waiting_in_inbox": refill.waiting,
                }
                for refill in refills
            ],
        }


def plan_replay(
    client: redis.Redis, start: str = "-", end: str = "+", *, recipient: str | None = None
) -> Plan:
    """Compare the log from `start` to `end` with what each recipient has; nothing is changed."""
    plan = Plan(start, end)
    limit = routed_up_to(client) or "0-0"
    routed_end = limit if end == "+" or streams.id_order(limit) < streams.id_order(end) else end
    census = _Census(client, plan, known_agents(client), recipient)
    for rows in streams.read_batches(client, MESSAGES, start, routed_end):
        for entry, message in valid(census.leave_out_known(rows)):
            census.consider(entry, message)
    beyond = f"({limit}"
    if start == "-" or streams.id_order(start) <= streams.id_order(limit):
        ahead = messages(client, beyond, end)
    else:
        ahead = messages(client, start, end)
    plan.unrouted = sum(recipient is None or message.to == recipient for _, message in ahead)
    plan.messages += plan.unrouted
    census.complete()
    return plan


def execute(client: redis.Redis, plan: Plan) -> Plan:
    """Carry out `plan`; return the plan that was carried out, which is a newer one where something had changed."""
    for agent, refill in plan.refills.items():
        done: Refill | None = refill
        for _ in range(TRIES):
            if done is None or not done.missing or _refill(client, done):
                break
            done = plan_replay(client, plan.start, plan.end, recipient=agent).refills.get(agent)
        else:
            raise AgentBackupError(
                f"the inbox of “{agent}” changes faster than it can be refilled",
                hint="stop the agent for the time of the replay",
            )
        plan.refills[agent] = done or Refill(agent)
    return plan


class _Knowledge:
    """What one agent has, and what waits in its inbox."""

    def __init__(self, client: redis.Redis, agent: str) -> None:
        stream = streams.inbox(agent)
        streams.ensure_group(client, stream, INBOX_GROUP)
        # The id first: whatever comes while we read makes the script refuse.
        info = client.xinfo_stream(stream)
        self.inbox_at = text(info["last-generated-id"])
        published = cast(dict[bytes, bytes], client.hgetall(last_seen_key(agent)))
        self.declared = {text(sender): text(number) for sender, number in published.items()}
        self.declared.pop(DECLARED, None)
        self.has = {sender: int(number) for sender, number in self.declared.items()}
        if not published:
            # It does not say what it has (a program of another make, say): what was delivered and does not wait in
            # its inbox counts as dealt with.
            delivered = cast(dict[bytes, bytes], client.hgetall(delivered_key(agent)))
            self.has = {text(sender): int(value.split(b" ")[0]) for sender, value in delivered.items()}
        self.waiting = {(message.sender, message.seq): message for message in unacknowledged(client, stream)}

    def settled(self) -> dict[str, int]:
        """Return of each sender the number up to which the agent has all and none waits."""
        first: dict[str, int] = {}
        for sender, seq in self.waiting:
            first[sender] = min(seq, first.get(sender, seq))
        return {
            sender: min(number, first.get(sender, number + 1) - 1)
            for sender, number in self.has.items()
            if AGENT_ID.match(sender)
        }


class _Census:
    """Goes through the routed part of the log, and enters into `plan` who has what."""

    def __init__(self, client: redis.Redis, plan: Plan, fleet: set[str], recipient: str | None) -> None:
        self._client = client
        self._plan = plan
        self._fleet = fleet
        self._recipient = recipient
        self._known: dict[str, _Knowledge] = {}
        self._settled: dict[str, dict[str, int]] = {}
        self._counted: Counter[str] = Counter()

    def leave_out_known(self, rows: Sequence[Row]) -> list[Row]:
        """Count the messages that their recipients have; return the rows that need a closer look.

        Nearly all of a log is such messages, so this is where the time of a replay goes. Taken for one is only what
        has to the byte the form in which our own agents write: five keys (which the first byte tells, so that none
        stands there twice) with values that `decode` would accept. Whatever looks otherwise goes the long way.
        """
        rest: list[Row] = []
        counted, settled, recipient, unpack = self._counted, self._settled, self._recipient, _unpack
        for row in rows:
            try:
                type_key, kind, body_key, raw = row[1]
                body = unpack(raw)
                to, seq, at = body["to"], body["seq"], body["at"]
                if recipient is not None and to != recipient:
                    continue
                if (
                    0 <= seq <= settled[to][body["from"]]
                    and type(seq) is int
                    and type(at) is float
                    and 0.0 <= at <= MAX_MOMENT
                    and type(body["payload"]) is bytes
                    and raw[0] == _MAP_OF_FIVE
                    and len(body) == 5
                    and len(raw) <= MAX_PAYLOAD_BYTES
                    and kind == b"message"
                    and type_key == b"type"
                    and body_key == b"body"
                ):
                    counted[to] += 1
                    continue
            except _ODD:
                pass
            rest.append(row)
        return rest

    def consider(self, entry: str, message: Message) -> None:
        """Enter one message."""
        if self._recipient is not None and message.to != self._recipient:
            return
        self._plan.messages += 1
        if message.to not in self._fleet:
            self._plan.unknown += 1
            return
        if message.to not in self._known:
            knowledge = self._known[message.to] = _Knowledge(self._client, message.to)
            self._settled[message.to] = knowledge.settled()
            self._plan.refills[message.to] = Refill(message.to)
        refill, knowledge = self._plan.refills[message.to], self._known[message.to]
        if (message.sender, message.seq) in knowledge.waiting:
            refill.waiting += 1
        elif message.seq <= knowledge.has.get(message.sender, 0):
            refill.has += 1
        else:
            if len(refill.missing) == MAX_MESSAGES:
                # Now, not in the end: a million of them would fill the memory before they are too many.
                raise AgentBackupError(
                    f"“{refill.agent}” lacks more than {MAX_MESSAGES} messages, the limit at once",
                    hint="stop the agent and the execution manager, and replay in parts with --from and --to",
                )
            refill.missing.append(replace(message, log=entry))

    def complete(self) -> None:
        """Enter what was counted, and what must move."""
        for agent, count in self._counted.items():
            self._plan.refills[agent].has += count
            self._plan.messages += count
        for agent, refill in self._plan.refills.items():
            _complete(refill, self._known[agent])


def _complete(refill: Refill, knowledge: _Knowledge) -> None:
    """Add what must move: messages in the inbox that come after a missing one of the same sender."""
    first: dict[str, int] = {}
    for message in refill.missing:
        first.setdefault(message.sender, message.seq)
    refill.moved = [m for m in knowledge.waiting.values() if m.seq > first.get(m.sender, m.seq)]
    refill.inbox_at = knowledge.inbox_at
    refill.had = {sender: knowledge.declared.get(sender, "") for sender in first}


def _refill(client: redis.Redis, refill: Refill) -> bool:
    """Run the script; False if something changed since the plan."""
    args: list[Arg] = [INBOX_GROUP, refill.inbox_at, len(refill.had)]
    for sender, had in refill.had.items():
        args += (sender, had)
    args.append(len(refill.moved))
    args += (cast(str, message.entry) for message in refill.moved)
    for message in sorted([*refill.missing, *refill.moved], key=lambda m: streams.id_order(m.log or "0-0")):
        args += (message.sender, message.seq, message.log or "0-0", encode(message)[b"body"])
    keys = (streams.inbox(refill.agent), delivered_key(refill.agent), last_seen_key(refill.agent))
    return bool(_REFILL(client, keys, args))


def routed_up_to(client: redis.Redis) -> str | None:
    """Return the last log entry that the router has dealt with, with all before it; None if it never ran."""
    group = _group(client, MESSAGES, ROUTER_GROUP)
    if group is None:
        return None
    oldest = client.xpending(MESSAGES, ROUTER_GROUP)["min"] if group["pending"] else None
    if oldest is None:
        # Nothing is pending, or not any more.
        return text(group["last-delivered-id"])
    milliseconds, number = streams.id_order(text(oldest))
    return f"{milliseconds}-{number - 1}" if number else f"{milliseconds - 1}-{2**63}"


def _group(client: redis.Redis, stream: str, name: str) -> dict[str, Any] | None:
    """Return what the server says of a consumer group; None if it, or the stream, is not there."""
    try:
        groups = client.xinfo_groups(stream)
    except redis.ResponseError as error:
        if "no such key" in str(error):
            return None
        raise
    return next((group for group in groups if group["name"] == name.encode()), None)


def messages(client: redis.Redis, start: str, end: str) -> Iterator[tuple[str, Message]]:
    """Yield the valid messages of the log from `start` to `end`, with their places."""
    for rows in streams.read_batches(client, MESSAGES, start, end):
        yield from valid(rows)


def valid(rows: Iterable[Row]) -> Iterator[tuple[str, Message]]:
    """Yield the messages of the log in `rows`, with their places; what is none is in the dead-letter stream already."""
    for entry, fields in map(streams.entry_of, rows):
        try:
            event = decode(fields, stream=MESSAGES)
            if len(fields[b"body"]) > MAX_PAYLOAD_BYTES:
                # With its place in the log it may be too large for an inbox.
                encode_body(event, log=entry)
        except InvalidEvent:
            continue
        assert isinstance(event, Message)
        yield entry, event


def unacknowledged(client: redis.Redis, stream: str) -> Iterator[Message]:
    """Yield what waits in an inbox, if there is one: handed out and not acknowledged, or not handed out yet."""
    group = _group(client, stream, INBOX_GROUP)
    if group is None:
        return
    delivered = streams.id_order(text(group["last-delivered-id"]))
    pending: set[str] = set()
    start = "-"
    while rows := cast(Any, client.xpending_range(stream, INBOX_GROUP, start, "+", 1000)):
        pending.update(text(row["message_id"]) for row in rows)
        start = f"({text(rows[-1]['message_id'])}"
    first = min(pending, key=streams.id_order) if pending else f"({text(group['last-delivered-id'])}"
    for entry, fields in streams.read_range(client, stream, first):
        if entry in pending or streams.id_order(entry) > delivered:
            try:
                event = decode(fields, stream=stream)
            except InvalidEvent:
                continue
            assert isinstance(event, Message)
            yield replace(event, entry=entry)


def text(value: Any) -> str:
    """Return what redis-py read as text."""
    return value.decode() if isinstance(value, bytes) else str(value)
