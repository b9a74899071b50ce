"""An exported message log back into a Redis that has lost it.

Promise: afterwards the log holds each exported message once, in order and with the id it had, together with what was
sent since; each inbox holds, in order, what its agent has not dealt with; and routing goes on where it stopped. A
message that is in the log already, or that its sender sent again, is not doubled. An execution manager that runs is
deposed meanwhile: its lease is taken, and its writes are refused. Killed at any point, the import can be run again.
An agent that does not publish what it has dealt with (a program of another make) may be handed again, under the same
number, what it took between the loss and the import.
Fails with `AgentBackupError` if the export is damaged (then nothing was changed), and with `LeaseLost`.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import redis

from em_bridge import logfile, replay, streams
from em_bridge.errors import AgentBackupError
from em_bridge.inbox import DECLARED, last_seen_key
from em_bridge.lease import Lease, new_holder
from em_bridge.logfile import Known
from em_bridge.messages import sender_key
from em_bridge.router import delivered_key
from em_bridge.scripts import Arg, Script
from em_bridge.streams import MESSAGES, ROUTER_GROUP, Fields

BATCH: Final = 1000
STAGED: Final = "em:messages:import"
LEASE_TTL_S: Final = 60.0
TRIES: Final = 10

Row = tuple[str, Fields]

# KEYS: epoch, the staged log. ARGV: epoch, then of each entry: id, how many fields, these.
_STAGE = Script(
    """
local at = 2
while at <= #ARGV do
  local last = at + 1 + 2 * tonumber(ARGV[at + 1])
  redis.call('XADD', KEYS[2], ARGV[at], unpack(ARGV, at + 2, last))
  at = last + 1
end
return 1
""",
    fenced=True,
)

# KEYS: epoch, the log, the staged log, then for each agent that did not say itself what it has: what was delivered to
# it, what it says now. ARGV: epoch, the log's last id when it was read, group, whether the export adds something, then
# (which agent, sender, number it has or nothing)…
# For the time being all counts as routed: the inboxes are filled next, and the router is put back to its place after
# that. What a new server has delivered since would hide what its predecessor had not.
_SWITCH = Script(
    """
local rows = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
if (rows[1] and rows[1][1] or '0-0') ~= ARGV[2] then return 0 end
if redis.call('EXISTS', KEYS[3]) == 1 then redis.call('RENAME', KEYS[3], KEYS[2]) end
redis.pcall('XGROUP', 'CREATE', KEYS[2], ARGV[3], '0', 'MKSTREAM')
redis.call('XGROUP', 'SETID', KEYS[2], ARGV[3], '$')
if ARGV[4] == '0' then return 1 end
rows = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
local last = rows[1] and rows[1][1] or '0-0'
for at = 5, #ARGV, 3 do
  local delivered = KEYS[2 + 2 * tonumber(ARGV[at])]
  if redis.call('HEXISTS', KEYS[3 + 2 * tonumber(ARGV[at])], '-') == 0 then
    if ARGV[at + 2] == '' then
      redis.call('HDEL', delivered, ARGV[at + 1])
    else
      redis.call('HSET', delivered, ARGV[at + 1], ARGV[at + 2] .. ' ' .. last)
    end
  end
end
return 1
""",
    fenced=True,
)

# KEYS: epoch, a hash. ARGV: epoch, what kind of hash, the log's last id, then fields and numbers.
# Numbers only grow; an agent that has said itself what it has knows better than the export.
_REMEMBER = Script(
    """
if ARGV[2] == 'seen' and redis.call('HEXISTS', KEYS[2], '-') == 1 then return 0 end
for at = 4, #ARGV, 2 do
  local before = redis.call('HGET', KEYS[2], ARGV[at])
  if not before or tonumber(string.match(before, '^%d+')) < tonumber(ARGV[at + 1]) then
    local value = ARGV[at + 1]
    if ARGV[2] == 'delivered' then value = value .. ' ' .. ARGV[3] end
    redis.call('HSET', KEYS[2], ARGV[at], value)
  end
end
return 1
""",
    fenced=True,
)

_ROUTE_FROM = Script("return redis.call('XGROUP', 'SETID', KEYS[2], ARGV[2], ARGV[3])", fenced=True)


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did: `messages` in the export, `added` of them to the log, `redelivered` into inboxes."""

    messages: int
    added: int
    redelivered: int


def import_log(client: redis.Redis, path: Path, *, name: str = "em") -> Imported:
    """Put the export in `path` (a folder or a file) back; `name` is the execution manager whose lease is taken.

    `client` must not repeat commands by itself.
    """
    known, _ = logfile.read(path)
    with _deposing(client, name) as lease:
        work = _Import(client, lease, known)
        for _ in range(TRIES):
            _, entries = logfile.read(path)
            rows = ((e.id, {b"type": e.type, b"body": e.body}) for e in entries)
            if work.stage_and_switch(rows):
                break
        else:
            raise AgentBackupError(
                "messages come in faster than the log can be put together",
                hint="stop the agents for the time of the import",
            )
        work.remember()
        plan = replay.execute(client, replay.plan_replay(client))
        work.route_from(known.routed)
    return Imported(work.exported, work.added, plan.as_dict()["redelivered"])


@contextlib.contextmanager
def _deposing(client: redis.Redis, name: str) -> Iterator[Lease]:
    lease = Lease(client, name, holder=new_holder(), ttl_s=LEASE_TTL_S)
    if lease.acquire(gone=lambda holder: True) is None:
        raise AgentBackupError(f"the lease “{name}” was taken by somebody else just now", hint="try again")
    over = threading.Event()

    def hold() -> None:
        while not over.wait(LEASE_TTL_S / 3):
            # If it is lost all the same, the import's own writes are refused, and say so.
            with contextlib.suppress(redis.RedisError, OSError):
                lease.renew()

    holding = threading.Thread(target=hold, name="import-lease", daemon=True)
    holding.start()
    try:
        yield lease
    finally:
        over.set()
        holding.join()
        lease.release()


class _Import:
    """One import under a lease."""

    def __init__(self, client: redis.Redis, lease: Lease, known: Known) -> None:
        self._known = known
        self._client = client
        self._lease = lease
        self.exported = 0
        self.added = 0

    def stage_and_switch(self, exported: Iterable[Row]) -> bool:
        """Merge the export with the live log beside it, and swap; False if something was sent meanwhile."""
        self.exported = self.added = 0
        end = streams.last_id(self._client, MESSAGES)
        live = streams.read_range(self._client, MESSAGES, "-", end) if end != "0-0" else iter(())
        self._client.delete(STAGED)
        batch: list[Row] = []
        size = 0
        for row in self._merged(exported, live):
            batch.append(row)
            size += sum(map(len, row[1].values()))
            if len(batch) >= BATCH or size >= logfile.BATCH_BYTES:
                self._stage(batch)
                batch, size = [], 0
        if batch:
            self._stage(batch)
        return self._switch(end)

    def _switch(self, end: str) -> bool:
        silent = {name: r["has"] for name, r in self._known.agents.items() if not r["declared"]}
        keys = [MESSAGES, STAGED]
        args: list[Arg] = [end, ROUTER_GROUP, int(self.added > 0)]
        for place, (name, has) in enumerate(silent.items(), start=1):
            keys += (delivered_key(name), last_seen_key(name))
            for sender in self._known.senders:
                args += (place, sender, has.get(sender, ""))
        return bool(self._run(_SWITCH, keys, args))

    def _merged(self, exported: Iterable[Row], live: Iterable[Row]) -> Iterator[Row]:
        """Yield both in the order of their ids, each message once, under ids that grow."""
        seen: set[bytes] = set()
        last = (0, 0)
        ours = ((streams.id_order(entry), 0, fields) for entry, fields in exported)
        theirs = ((streams.id_order(entry), 1, fields) for entry, fields in live)
        for order, origin, fields in heapq.merge(ours, theirs, key=lambda row: row[:2]):
            self.exported += origin == 0
            # A sender repeats what the server has lost: the same number, time and content, under a new id.
            digest = hashlib.blake2b(b"\0".join(fields.values()), digest_size=16).digest()
            if digest in seen:
                self.added -= origin == 1
                continue
            seen.add(digest)
            self.added += origin == 0
            last = max(order, (last[0], last[1] + 1))
            yield f"{last[0]}-{last[1]}", fields

    def _stage(self, batch: list[Row]) -> None:
        args: list[Arg] = []
        for entry, fields in batch:
            args += (entry, len(fields), *(part for pair in fields.items() for part in pair))
        self._run(_STAGE, (STAGED,), args)

    def remember(self) -> None:
        """Restore what the server knew of senders and agents."""
        known = self._known
        end = streams.last_id(self._client, MESSAGES)
        if known.agents:
            self._client.sadd(streams.SEEN, *known.agents)
        for name, fields in known.senders.items():
            self._remember(sender_key(name), "sender", end, fields)
        for name, record in known.agents.items():
            self._remember(delivered_key(name), "delivered", end, record["has"])
            if record["declared"]:
                self._remember(last_seen_key(name), "seen", end, record["has"] | {DECLARED: 0})

    def _remember(self, key: str, kind: str, end: str, fields: dict[str, int]) -> None:
        args: list[Arg] = [kind, end]
        for name, number in fields.items():
            args += (name, number)
        self._run(_REMEMBER, (key,), args)

    def route_from(self, routed: str) -> None:
        """Put the router to where it was; what is in the inboxes meanwhile is known to have been delivered."""
        self._run(_ROUTE_FROM, (MESSAGES,), (ROUTER_GROUP, routed))

    def _run(self, script: Script, keys: Iterable[str], args: Iterable[Arg]) -> object:
        return script(self._client, (self._lease.epoch_key, *keys), (self._lease.epoch or 0, *args))
