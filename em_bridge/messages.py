"""The message log: append what an outbox holds, exactly once and in order; send a single message without an outbox.

Promise: a message is appended once however often its batch is repeated, and one whose number somebody else has used is
never taken for a double: the answer is “behind”, and the sender renumbers it. If the server has lost what it had
acknowledged (a power cut, a fail-over), the answer is “lost”, and the sender repeats what it kept. What redis-py
raises passes through; then nothing is known, and repeating the batch is harmless.

Per sender the server keeps the hash `em:sender:<name>`: `last`, the highest number, and for each line (see `outbox`)
`line:<line>`, the highest number that came by it.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import redis

from em_bridge import clock
from em_bridge.connection import connect, patiently, translate_errors
from em_bridge.errors import InvalidEvent
from em_bridge.events import MAX_PAYLOAD_BYTES, Message, encode
from em_bridge.outbox import Outgoing
from em_bridge.scripts import Arg, Script
from em_bridge.streams import MESSAGES

MAX_LINES: Final = 200
"""Lines remembered per sender. An outbox restored from before the oldest may repeat messages, but never lose one."""

# KEYS: the log, the sender's hash. ARGV: how many confirmed lines, (line, number) of each, how many messages,
# (line, number, body) of each, the most lines to remember. Numbers are kept as the text they came in. `last` is also
# written when it stays as it was: what is to be kept must write (see `scripts`).
_APPEND = Script(
    """
local log, sender = KEYS[1], KEYS[2]
local at = 1
local function take() at = at + 1; return ARGV[at - 1] end
local function number(text) return tonumber(text or '0') or 0 end

for _ = 1, number(take()) do
  local line, sent = take(), take()
  local have = redis.call('HGET', sender, 'line:' .. line) or '0'
  if number(have) < number(sent) then return {'lost', line, have} end
end

local last = redis.call('HGET', sender, 'last') or '0'
local known, changed, answer, done = {}, {}, 'ok', 0
for _ = 1, number(take()) do
  local line, seq, body = take(), take(), take()
  local key = 'line:' .. line
  if known[key] == nil then known[key] = redis.call('HGET', sender, key) or '0' end
  if number(seq) > number(known[key]) then
    if number(seq) <= number(last) then answer = 'behind'; break end
    redis.call('XADD', log, '*', 'type', 'message', 'body', body)
    last, known[key], changed[key] = seq, seq, seq
  end
  done = done + 1
end

redis.call('HSET', sender, 'last', last)
for key, seq in pairs(changed) do redis.call('HSET', sender, key, seq) end
local most = number(ARGV[#ARGV])
if next(changed) and redis.call('HLEN', sender) > most + 1 then
  local all, lines = redis.call('HGETALL', sender), {}
  for i = 1, #all, 2 do
    if string.sub(all[i], 1, 5) == 'line:' then lines[#lines + 1] = {all[i], number(all[i + 1])} end
  end
  table.sort(lines, function(a, b) return a[2] < b[2] end)
  for i = 1, #lines - math.floor(most / 2) do redis.call('HDEL', sender, lines[i][1]) end
end
return {answer, tostring(done), last}
""",
    kept=True,
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a batch.

    `ok`: all stand in the log. `behind`: the first `done` do, and the next one's number is not above `last`, which
    somebody else reached. `lost`: nothing was appended, because of `line` the server has only the numbers up to `last`.
    """

    word: Literal["ok", "behind", "lost"]
    last: int
    done: int = 0
    line: str = ""


def check_message(sender: str, to: str, payload: bytes) -> None:
    """Raise `InvalidEvent` if a message with this content could not be sent."""
    Message(sender, to, 0, payload)
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise InvalidEvent(
            f"message: the payload has {len(payload)} bytes, the limit is {MAX_PAYLOAD_BYTES}",
            hint="keep large content in a file, and send its path",
        )


def sender_key(sender: str) -> str:
    """Return the hash in which the server keeps what it knows of a sender's numbers."""
    return f"em:sender:{sender}"


def append_batch(
    client: redis.Redis, sender: str, batch: Sequence[Outgoing], confirmed: Mapping[str, int] | None = None
) -> Answer:
    """Append the messages of `batch` that do not stand there, in order; `confirmed` is what was acknowledged before."""
    args: list[Arg] = [len(confirmed or {})]
    for line, seq in (confirmed or {}).items():
        args += (line, seq)
    args.append(len(batch))
    for item in batch:
        body = encode(Message(sender, item.to, item.seq, item.payload, item.at))[b"body"]
        args += (item.line, item.seq, body)
    args.append(MAX_LINES)
    word, second, third = (part.decode() for part in _APPEND(client, (MESSAGES, sender_key(sender)), args))
    if word == "lost":
        return Answer("lost", last=int(third), line=second)
    return Answer("behind" if word == "behind" else "ok", last=int(third), done=int(second))


def send_once(
    client: redis.Redis, sender: str, to: str, payload: bytes, *, at: float, line: str | None = None
) -> int:
    """Append one message without an outbox, under the next free number of `sender`; return the number.

    Repeating the call with the same `line` (a random name) after a lost reply appends nothing.
    """
    line = line or uuid.uuid4().hex[:16]
    before, last = client.hmget(sender_key(sender), [f"line:{line}", "last"])
    if before is not None:
        return int(before)
    seq = int(last or 0) + 1
    while (answer := append_batch(client, sender, [Outgoing(seq, line, to, payload, at)])).word != "ok":
        seq = answer.last + 1
    return seq


def send_patiently(url: str | None, sender: str, to: str, payload: bytes, *, patience_s: float) -> int:
    """Send one message without an outbox, trying for `patience_s` while Redis is away; return its number.

    Raises `InvalidEvent`, `RedisUnavailable` (then it is unknown whether the last attempt arrived) or `RedisRefused`.
    """
    line = uuid.uuid4().hex[:16]
    at = clock.now()
    check_message(sender, to, payload)
    with contextlib.closing(connect(url, retrying=False)) as client:

        def attempt() -> int:
            with translate_errors(client):
                return send_once(client, sender, to, payload, at=at, line=line)

        return patiently(attempt, patience_s)
