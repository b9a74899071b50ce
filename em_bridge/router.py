"""Routing: from the message log into the recipients' inboxes, under the EM's lease.

Promise: every valid message to a known recipient is appended to its inbox once, in the log's order, through crashes of
the router at any point; everything else becomes a dead letter with a reason. Delivery and acknowledgement are one
script, and so is reading: a router that has lost its lease can neither write nor take entries away from its successor.
It raises `LeaseLost` then; what redis-py raises passes through, and the next `step` resumes with what is pending.

`em:delivered:<agent>` remembers per sender the number and the log entry of the last delivery. An entry that is not
newer is the same one again and is dropped; a newer entry whose number does not grow is not known to be a double, and
becomes a dead letter.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import redis

from em_bridge import streams
from em_bridge.connection import MAX_BLOCK_S
from em_bridge.errors import InvalidEvent
from em_bridge.events import Heartbeat, Message, decode, encode, encode_body
from em_bridge.lease import epoch_key
from em_bridge.scripts import Arg, Script
from em_bridge.streams import DEAD_LETTER, HEARTBEATS, MESSAGES, ROUTER_GROUP, Fields

log = logging.getLogger(__name__)

BATCH: Final = 500

# KEYS: epoch, the log. ARGV: epoch, group, consumer, count, “>” or “0”.
_READ = Script(
    """
return redis.call('XREADGROUP', 'GROUP', ARGV[2], ARGV[3], 'COUNT', ARGV[4], 'STREAMS', KEYS[2], ARGV[5])
""",
    fenced=True,
)

# Only the holder of the lease routes, so whatever is pending elsewhere belongs to the dead: idle time is no question.
_CLAIM = Script(
    """
local cursor, claimed = '0-0', 0
repeat
  local page = redis.call('XAUTOCLAIM', KEYS[2], ARGV[2], ARGV[3], 0, cursor, 'COUNT', 1000, 'JUSTID')
  cursor, claimed = page[1], claimed + #page[2]
until cursor == '0-0'
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[2], ARGV[2])) do
  local info = {}
  for i = 1, #consumer, 2 do info[consumer[i]] = consumer[i + 1] end
  if info['name'] ~= ARGV[3] and tonumber(info['pending']) == 0 then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[2], ARGV[2], info['name'])
  end
end
return claimed
""",
    fenced=True,
)

# KEYS: epoch, the log, the dead letters, then inbox and memory of each recipient. ARGV: epoch, group, how many
# entries, then of each, in the log's order: id, recipient (0: a dead letter), sender, number, body. What cannot be
# delivered is left pending and named in the answer: a reason needs a dead letter, and its msgpack is made outside.
#
# The memory of a sender is read once and written once a batch, however many messages it has there: within a batch ids
# only grow, so that only the first can be one that was delivered before.
_ROUTE = Script(
    """
local function newer(a, b)
  local ams, aseq = string.match(a, '^(%d+)%-(%d+)$')
  local bms, bseq = string.match(b, '^(%d+)%-(%d+)$')
  ams, aseq, bms, bseq = tonumber(ams), tonumber(aseq), tonumber(bms), tonumber(bseq)
  return ams > bms or (ams == bms and aseq > bseq)
end
local done, delivered, refused, memories, failure = {}, 0, {}, {}, nil
for at = 4, 3 + tonumber(ARGV[3]) * 5, 5 do
  local id, to, sender, body = ARGV[at], tonumber(ARGV[at + 1]), ARGV[at + 2], ARGV[at + 4]
  local problem
  if to == 0 then
    -- Not acknowledged here means acknowledged before: this is a repetition after a lost reply.
    if redis.call('XACK', KEYS[2], ARGV[2], id) == 1 then
      redis.call('XADD', KEYS[3], '*', 'type', 'dead-letter', 'body', body)
    end
  else
    local senders = memories[to]
    if not senders then senders = {}; memories[to] = senders end
    local memory = senders[sender]
    if not memory then
      local before = redis.pcall('HGET', KEYS[3 + to * 2], sender) or '-1 0-0'
      if type(before) == 'table' then
        memory = {broken = 'what was delivered before is unknown: ' .. before.err}
      else
        local number, last = string.match(before, '^(%-?%d+) (%S+)$')
        memory = {number = tonumber(number), last = last}
      end
      senders[sender] = memory
    end
    if memory.broken then
      problem = memory.broken
    elseif memory.added or newer(id, memory.last) then
      local seq = tonumber(ARGV[at + 3])
      if seq <= memory.number then
        problem = 'number ' .. ARGV[at + 3] .. ' does not grow: ' .. string.format('%.0f', memory.number)
          .. ' was delivered before'
      else
        local added = redis.pcall('XADD', KEYS[2 + to * 2], '*', 'type', 'message', 'body', body)
        if type(added) == 'table' and added.err then
          -- A full memory or disk passes, and the message waits for that. A key that is no stream does not.
          if not (string.find(added.err, 'WRONGTYPE', 1, true) or string.find(added.err, '^ERR')) then
            failure = added.err
            break
          end
          problem = 'the inbox cannot take it: ' .. added.err
        else
          memory.number, memory.added = seq, ARGV[at + 3] .. ' ' .. id
          delivered = delivered + 1
        end
      end
    end
  end
  if problem then refused[#refused + 1] = {id, problem} else done[#done + 1] = id end
end
for to, senders in pairs(memories) do
  local news = {}
  for sender, memory in pairs(senders) do
    if memory.added then news[#news + 1] = sender; news[#news + 1] = memory.added end
  end
  if #news > 0 then redis.call('HSET', KEYS[3 + to * 2], unpack(news)) end
end
if #done > 0 then redis.call('XACK', KEYS[2], ARGV[2], unpack(done)) end
if failure then return redis.error_reply(failure) end
return {delivered, refused}
""",
    fenced=True,
)


@dataclass(slots=True)
class _Entry:
    """One entry of the log on its way: a message to a known recipient, or the reason why not."""

    id: str
    fields: Fields
    message: Message | None = None
    body: bytes = b""
    reason: str = ""


def delivered_key(agent: str) -> str:
    """Return the hash that remembers what was delivered to `agent`."""
    return f"em:delivered:{agent}"


def known_agents(client: redis.Redis) -> set[str]:
    """Return the agents that may have an inbox: those of the fleet, and all that ever beat."""
    fleet = cast(list[bytes], client.hkeys(streams.FLEET))
    seen = cast(set[bytes], client.smembers(streams.SEEN))
    return {name.decode("utf-8", "replace") for name in (*fleet, *seen)}


class Router:
    """Routes as `consumer` (unique per process start) while `epoch` is the newest of the lease `name`."""

    def __init__(self, client: redis.Redis, *, consumer: str, epoch: int, name: str = "em") -> None:
        self._client = client
        self._consumer = consumer
        self._epoch = epoch
        self._epoch_key = epoch_key(name)
        self._known: set[str] = set()
        self._inboxes: set[str] = set()
        self._pending_first = True
        self._claimed = False
        self._last = "0-0"
        self._beats_from = "-"
        self.routed = 0
        self.dead_letters = 0

    def step(self, block_s: float = 1.0) -> int:
        """Route one batch and return how many entries it had; wait up to `block_s` if there is none.

        The first steps route what is pending, of this router and of all dead ones, in the log's order.
        """
        if not self._claimed:
            self._claim()
        rows = self._read("0" if self._pending_first else ">")
        if rows:
            try:
                self._handle(rows)
            except BaseException:
                # The reply may be lost after the script ran: what it acknowledged is not pending any more.
                self._pending_first = True
                raise
            return len(rows)
        if self._pending_first:
            self._pending_first = False
            return 0
        self._wait(block_s)
        return 0

    def _claim(self) -> None:
        streams.ensure_group(self._client, MESSAGES, ROUTER_GROUP)
        claimed = int(self._run(_CLAIM, [], [self._consumer]))
        # What is older than the group's position must not wake `_wait`.
        for group in self._client.xinfo_groups(MESSAGES):
            if group["name"] == ROUTER_GROUP.encode():
                self._last = group["last-delivered-id"].decode()
        if claimed:
            log.info("resuming with %d messages that were being routed", claimed)
        self._claimed = True

    def _read(self, what: str) -> list[tuple[str, Fields | None]]:
        try:
            answer = self._run(_READ, [], [self._consumer, BATCH, what])
        except redis.ResponseError as error:
            if "NOGROUP" in str(error):
                # The server came back without its data: start anew.
                self._claimed, self._pending_first = False, True
                return []
            raise
        if not answer:
            return []
        return [(raw_id.decode(), _pairs(flat)) for raw_id, flat in answer[0][1]]

    def _wait(self, block_s: float) -> None:
        """Sleep until the log grows; nothing is taken from the group here."""
        block_ms = max(1, int(min(block_s, MAX_BLOCK_S) * 1000))
        cast(Any, self._client).xread({MESSAGES: self._last}, count=1, block=block_ms)

    def _handle(self, rows: Sequence[tuple[str, Fields | None]]) -> None:
        gone = [entry for entry, fields in rows if fields is None]
        if gone:
            # Deleted from the log by hand while it was pending: there is nothing left to deliver.
            log.warning("%d messages were deleted from the log before they were routed", len(gone))
            self._client.xack(MESSAGES, ROUTER_GROUP, *gone)
        entries = [_Entry(entry, fields) for entry, fields in rows if fields is not None]
        self._judge(entries)
        refused = self._route(entries)
        if refused:
            again = [replace(e, message=None, reason=refused[e.id]) for e in entries if e.id in refused]
            self._route(again)
        last = rows[-1][0]
        self._last = max(self._last, last, key=streams.id_order)

    def _judge(self, entries: Sequence[_Entry]) -> None:
        """Decode each entry, and look up its recipient."""
        for entry in entries:
            try:
                event = decode(entry.fields, stream=MESSAGES)
                assert isinstance(event, Message)
                # With the place in the log a body of nearly the largest size may become too large: known only here.
                entry.body = encode_body(event, log=entry.id)
                entry.message = event
            except InvalidEvent as problem:
                entry.reason = problem.message
        recipients = {entry.message.to for entry in entries if entry.message}
        if not recipients <= self._known:
            self._known = known_agents(self._client)
        if not recipients <= self._known:
            self._known |= self._newcomers()
        for entry in entries:
            if entry.message and entry.message.to not in self._known:
                entry.reason = f"unknown recipient “{entry.message.to}”"
                entry.message = None
            elif entry.message and entry.message.to not in self._inboxes:
                self._prepare_inbox(entry)

    def _prepare_inbox(self, entry: _Entry) -> None:
        """Make the recipient's inbox with its group: so it is not trimmed before its agent has read it."""
        assert entry.message is not None
        try:
            streams.ensure_group(self._client, streams.inbox(entry.message.to), streams.INBOX_GROUP)
            self._inboxes.add(entry.message.to)
        except redis.ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            entry.reason = f"the inbox of “{entry.message.to}” is a key of another type"
            entry.message = None

    def _newcomers(self) -> set[str]:
        """Return who has beaten since we last looked, and remember them.

        The monitor does it too, but later: the answer to an agent's first message may come before.
        """
        found: set[str] = set()
        for entry, fields in streams.read_range(self._client, HEARTBEATS, self._beats_from):
            self._beats_from = f"({entry}"
            try:
                beat = decode(fields, stream=HEARTBEATS)
            except InvalidEvent:
                continue
            assert isinstance(beat, Heartbeat)
            found.add(beat.agent)
        if found - self._known:
            self._client.sadd(streams.SEEN, *(found - self._known))
        return found

    def _route(self, entries: Sequence[_Entry]) -> dict[str, str]:
        """Run the script for `entries`; return the ids it refused, with the reasons."""
        recipients: dict[str, int] = {}
        args: list[Arg] = [len(entries)]
        now = streams.server_time(self._client) if any(e.message is None for e in entries) else 0.0
        for entry in entries:
            message = entry.message
            if message is None:
                letter = streams.dead_letter(MESSAGES, entry.id, entry.reason, entry.fields, now)
                args += (entry.id, 0, "", 0, encode(letter)[b"body"])
                self.dead_letters += 1
                log.warning("message %s is a dead letter: %s", entry.id, entry.reason)
            else:
                place = recipients.setdefault(message.to, len(recipients) + 1)
                args += (entry.id, place, message.sender, message.seq, entry.body)
        keys = [DEAD_LETTER]
        for name in recipients:
            keys += (streams.inbox(name), delivered_key(name))
        delivered, refused = self._run(_ROUTE, keys, args)
        self.routed += delivered
        return {raw_id.decode(): reason.decode("utf-8", "replace") for raw_id, reason in refused}

    def _run(self, script: Script, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        return script(self._client, (self._epoch_key, MESSAGES, *keys), (self._epoch, ROUTER_GROUP, *args))


def _pairs(flat: Sequence[bytes] | None) -> Fields | None:
    return None if flat is None else dict(zip(flat[::2], flat[1::2], strict=False))
