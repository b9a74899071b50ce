"""Stream names, append, append-once, reading in batches, and trimming that loses nothing.

Promise: `append_once` puts an event on its stream once, however often it is repeated with the same `once` within
`ttl_s`, and behind Sentinel a replica has it, too, when the call returns; `trim` never removes an entry that a consumer
group has not finished with. Everything here may raise what redis-py raises (see `connection.translate_errors`). Entry
ids are `str`, times Unix seconds of the server's clock.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, cast

import redis
from redis import exceptions

from em_bridge.events import (
    INBOX_PREFIX,
    MAX_BODY_BYTES,
    AgentState,
    ConfigApplied,
    DeadLetter,
    Event,
    Heartbeat,
    Message,
    encode,
    encode_body,
)
from em_bridge.scripts import Arg, Script

AGENT_STATE: Final = AgentState.stream
CONFIG_CHANGE: Final = ConfigApplied.stream
MESSAGES: Final = Message.stream
HEARTBEATS: Final = Heartbeat.stream
DEAD_LETTER: Final = DeadLetter.stream

DISPATCHER_GROUP: Final = "backup-worker"
ROUTER_GROUP: Final = "em-router"
INBOX_GROUP: Final = "agent"

FLEET: Final = "em:fleet"
"""Hash: agent id -> msgpack map `{"dead_after": seconds, …}` of the agents under protection."""
SEEN: Final = "em:seen"
"""Set: ids of the agents that ever beat."""
STATES: Final = "em:states"
"""Hash: agent id -> msgpack map `{state, since, reason, incarnation, last_beat, last_entry}`."""

Fields = Mapping[bytes, bytes]


def inbox(agent: str) -> str:
    """Return the name of the stream of messages to `agent`."""
    return f"{INBOX_PREFIX}{agent}"


def append(client: redis.Redis, event: Event) -> str:
    """Append `event` to its stream and return the entry id. A lost reply leaves open whether it stands there."""
    return _text(client.xadd(event.stream, cast(Any, encode(event))))


# The marker and the entry are written by one script: no crash leaves one without the other. A repetition writes the
# marker again as it is: what is to be kept must write (see `scripts`).
_APPEND_ONCE = Script(
    """
local first = redis.call('GET', KEYS[2])
if first then
  redis.call('SET', KEYS[2], first, 'KEEPTTL')
  return first
end
local id = redis.call('XADD', KEYS[1], '*', 'type', ARGV[1], 'body', ARGV[2])
redis.call('SET', KEYS[2], id, 'PX', ARGV[3])
return id
""",
    kept=True,
)


def append_once(client: redis.Redis, event: Event, *, once: str, ttl_s: float = 3600.0) -> str:
    """Append `event` unless a call with the same `once` did within `ttl_s`; return the entry id of the first call."""
    fields = encode(event)
    keys = (event.stream, once_key(once))
    return _text(_APPEND_ONCE(client, keys, (fields[b"type"], fields[b"body"], int(ttl_s * 1000))))


# KEYS: marker, then the streams. ARGV: the marker's life in ms, then of each event: which stream, type, body.
# A script's clock stands still, so the ids on one stream are consecutive: the first of each says them all.
_APPEND_ALL_ONCE = Script(
    """
local before = redis.call('GET', KEYS[1])
if before then
  redis.call('SET', KEYS[1], before, 'KEEPTTL')
  return before
end
local first = {}
for at = 2, #ARGV, 3 do
  local stream = tonumber(ARGV[at])
  local id = redis.call('XADD', KEYS[1 + stream], '*', 'type', ARGV[at + 1], 'body', ARGV[at + 2])
  if not first[stream] then first[stream] = id end
end
first = table.concat(first, ' ')
redis.call('SET', KEYS[1], first, 'PX', ARGV[1])
return first
""",
    kept=True,
)


def append_all_once(
    client: redis.Redis, events: Sequence[Event], *, once: str, ttl_s: float = 3600.0
) -> list[str]:
    """Append all `events`, in order, unless a call with the same `once` did; return the entry ids of the first call.

    It is one script: all of them or none. The server does nothing else meanwhile, so a thousand at once is much.
    """
    places: dict[str, int] = {}
    args: list[Arg] = [int(ttl_s * 1000)]
    for event in events:
        args += (places.setdefault(event.stream, len(places) + 1), event.type, encode_body(event))
    answer = _text(_APPEND_ALL_ONCE(client, (once_key(once), *places), args))
    following = {stream: _from(first) for stream, first in zip(places, answer.split(), strict=True)}
    return [next(following[event.stream]) for event in events]


def _from(entry_id: str) -> Iterator[str]:
    milliseconds, number = id_order(entry_id)
    return (f"{milliseconds}-{following}" for following in itertools.count(number))


def once_key(once: str) -> str:
    """Return the key that holds the entry id of an event appended once as `once`."""
    return f"em:once:{once}"


def ensure_group(client: redis.Redis, stream: str, group: str) -> None:
    """Create the consumer group at the stream's beginning, and the stream, if they are not there.

    It starts at `0`: `$` would skip what was published before the first consumer came.
    """
    try:
        client.xgroup_create(stream, group, id="0", mkstream=True)
    except exceptions.ResponseError as error:
        if "BUSYGROUP" not in str(error):
            raise


Row = tuple[bytes, Sequence[bytes]]
"""An entry as the server sends it: its id, then field, value, field, value…"""


def read_batches(
    client: redis.Redis, stream: str, start: str = "-", end: str = "+", batch: int = 1000
) -> Iterator[list[Row]]:
    """Yield the entries from `start` to `end`, both inclusive, `batch` a round trip.

    The next batch is asked for before this one is handed out, so that server and reader work at the same time; no more
    than two batches are in memory.
    """
    ahead = _Ahead(client)
    try:
        ahead.ask(stream, start, end, batch)
        while True:
            rows = ahead.answer()
            last = len(rows) < batch
            if not last:
                ahead.ask(stream, f"({rows[-1][0].decode()}", end, batch)
            yield rows
            if last:
                return
    finally:
        ahead.close()


def read_range(
    client: redis.Redis, stream: str, start: str = "-", end: str = "+", batch: int = 1000
) -> Iterator[tuple[str, Fields]]:
    """Yield (entry id, fields) from `start` to `end`, both inclusive, as `read_batches` reads them."""
    for rows in read_batches(client, stream, start, end, batch):
        yield from map(entry_of, rows)


def entry_of(row: Row) -> tuple[str, Fields]:
    """Return the entry id and the fields of `row`."""
    raw_id, flat = row
    return raw_id.decode(), dict(zip(flat[::2], flat[1::2], strict=True))


class _Ahead:
    """One XRANGE under way on a connection of its own; in the end it is given back, or closed if its answer is due."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        # redis-py has no annotations for connections.
        self._pool: Any = client.connection_pool
        self._connection: Any = None
        self._asked: tuple[str | int, ...] = ()
        self._due = False

    def ask(self, stream: str, start: str, end: str, batch: int) -> None:
        self._asked = ("XRANGE", stream, start, end, "COUNT", batch)
        try:
            if self._connection is None:
                self._connection = self._pool.get_connection()
            self._connection.send_command(*self._asked)
            self._due = True
        except (exceptions.ConnectionError, exceptions.TimeoutError, OSError):
            self.close()

    def answer(self) -> list[Row]:
        if self._due:
            try:
                rows = self._connection.read_response()
                self._due = False
                return cast(list[Row], rows)
            except (exceptions.ConnectionError, exceptions.TimeoutError, OSError):
                self.close()
            except exceptions.ResponseError:
                self._due = False
                raise
        # The connection broke: ask again as the client's own retry policy has it, or let it raise.
        rows = cast(Any, self._client).xrange(*self._asked[1:4], count=self._asked[5])
        return [(raw_id, [part for pair in fields.items() for part in pair]) for raw_id, fields in rows]

    def close(self) -> None:
        if self._connection is not None:
            if self._due:
                self._connection.disconnect()
            self._pool.release(self._connection)
        self._connection, self._due = None, False


def server_time(client: redis.Redis) -> float:
    """Return the server's clock in Unix seconds."""
    seconds, micros = client.time()
    return seconds + micros / 1e6


def entry_time(entry_id: str) -> float:
    """Return when the server took the entry, in Unix seconds."""
    return int(entry_id.partition("-")[0]) / 1000


def id_at(seconds: float) -> str:
    """Return the smallest entry id of that moment (Unix seconds, to the millisecond)."""
    return f"{max(0, round(seconds * 1000))}-0"


def id_order(entry_id: str) -> tuple[int, int]:
    """Return a sort key: ids are pairs of numbers, and as text they would sort wrongly."""
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)


def last_id(client: redis.Redis, stream: str) -> str:
    """Return the id of the stream's newest entry, `0-0` if it has none."""
    rows = cast(list[tuple[bytes, Fields]], client.xrevrange(stream, count=1))
    return rows[0][0].decode() if rows else "0-0"


# XTRIM drops entries that a group still has pending, so the limit is the least of: the retention, the caller's floor,
# each group's last delivered entry, each group's oldest pending one. Reading them and trimming is one step.
_TRIM = Script("""
local function parse(id)
  local ms, seq = string.match(id, '^(%d+)%-(%d+)$')
  return tonumber(ms), tonumber(seq)
end
local function less(a, b)
  local ams, aseq = parse(a)
  local bms, bseq = parse(b)
  return ams < bms or (ams == bms and aseq < bseq)
end
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local now = redis.call('TIME')
local cut = string.format('%.0f-0', math.max(0, now[1] * 1000 + math.floor(now[2] / 1000) - ARGV[1]))
if ARGV[2] ~= '' and less(ARGV[2], cut) then cut = ARGV[2] end
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local info = {}
  for i = 1, #group, 2 do info[group[i]] = group[i + 1] end
  local limit = info['last-delivered-id']
  if tonumber(info['pending']) > 0 then
    local oldest = redis.call('XPENDING', KEYS[1], info['name'])[2]
    if oldest and less(oldest, limit) then limit = oldest end
  end
  if less(limit, cut) then cut = limit end
end
return redis.call('XTRIM', KEYS[1], 'MINID', cut)
""")


def trim(client: redis.Redis, stream: str, *, older_than_s: float, floor_id: str | None = None) -> int:
    """Remove entries older than `older_than_s` and below `floor_id`, that all groups are done with; return how many."""
    return int(_TRIM(client, (stream,), (int(older_than_s * 1000), floor_id or "")))


def dead_letter(stream: str, entry: str, reason: str, fields: Fields, at: float) -> DeadLetter:
    """Return the dead letter for an entry; fields that do not fit into its body are cut, and the reason says so."""
    raw: dict[str, bytes] = {}
    room = MAX_BODY_BYTES - 8 * 1024 - 4 * len(reason)
    cut = False
    for name, value in fields.items():
        key = name[:256].decode("utf-8", "backslashreplace")
        kept = value[: max(0, room - len(key) * 4 - 16)]
        cut = cut or len(kept) < len(value) or len(name) > 256
        room -= len(kept) + len(key) * 4 + 16
        if room < 0:
            break
        raw[key] = kept
    note = " (its fields were cut to fit here)" if cut else ""
    return DeadLetter(source=stream, entry=entry, reason=reason + note, at=at, raw=raw)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
