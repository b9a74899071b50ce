"""Dead letters: events that could not be handled. A human looks at each, and has it tried again or dropped.

Trying again puts the event back onto its stream and takes the letter away in one step on the server, so that two people
who press the button make one event of it. What still is no valid event is refused: it would only come back. A message
is never put back (its number has passed, and it would be dropped as a double): the router's replay delivers it, or
says why it cannot.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from backup_worker.queueing import due
from em_bridge import events, replay, streams
from em_bridge.errors import AgentBackupError, InvalidEvent, NotFound, UsageError
from em_bridge.scripts import Script

if TYPE_CHECKING:
    from redis import Redis

RETRYABLE = (streams.AGENT_STATE, streams.CONFIG_CHANGE, due.STREAM)
"""The streams onto which an event is put back."""

# KEYS: dead letters, the stream. ARGV: the letter's id, then the event's fields and values.
_PUT_BACK = Script("""
if #redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1]) == 0 then return false end
local entry = redis.call('XADD', KEYS[2], '*', unpack(ARGV, 2))
redis.call('XDEL', KEYS[1], ARGV[1])
return entry
""")


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter: where the event stood, why it could not be handled, and its fields; `at` in Unix seconds."""

    entry: str
    at: float
    source: str
    source_entry: str
    reason: str
    raw: dict[str, bytes]

    def summary(self) -> dict[str, Any]:
        """Return the letter in the form of `backup-worker dead-letters --json`."""
        raw = {key: value.decode("utf-8", "backslashreplace") for key, value in self.raw.items()}
        return {
            "entry": self.entry, "at": self.at, "stream": self.source, "stream_entry": self.source_entry,
            "reason": self.reason, "raw": raw,
        }  # fmt: skip


def newest(client: Redis, count: int | None = None) -> Iterator[Letter]:
    """Yield the dead letters, the newest first."""
    rows: Any = client.xrevrange(streams.DEAD_LETTER, count=count)
    for entry, fields in rows:
        yield _letter(entry.decode(), fields)


def get(client: Redis, entry: str) -> Letter:
    """Return one letter; raises NotFound."""
    is_id = re.fullmatch(r"\d{1,20}-\d{1,20}", entry)
    rows: Any = client.xrange(streams.DEAD_LETTER, entry, entry) if is_id else []
    if not rows:
        raise NotFound(
            f"there is no dead letter “{entry}” (any more)", hint="see `backup-worker dead-letters`"
        )
    return _letter(entry, rows[0][1])


def _letter(entry: str, fields: Any) -> Letter:
    at = streams.entry_time(entry)
    try:
        letter = events.decode(fields, stream=streams.DEAD_LETTER)
    except InvalidEvent as error:
        raw = {key.decode("utf-8", "backslashreplace"): bytes(value) for key, value in fields.items()}
        return Letter(entry, at, "?", "?", f"not readable itself: {error.message}", raw)
    assert isinstance(letter, events.DeadLetter)
    return Letter(entry, at, letter.source, letter.entry, letter.reason, dict(letter.raw))


def drop(client: Redis, entry: str) -> Letter:
    """Take a letter away for good, and return it; raises NotFound."""
    letter = get(client, entry)
    if not client.xdel(streams.DEAD_LETTER, entry):
        raise NotFound(f"there is no dead letter “{entry}” (any more)")
    return letter


def retry(client: Redis, entry: str) -> str:
    """Have an event tried again; return what became of it, in words. Raises NotFound, UsageError."""
    letter = get(client, entry)
    if letter.source == streams.MESSAGES:
        return _replay(client, letter)
    if letter.source not in RETRYABLE:
        raise UsageError(
            f"what stood on “{letter.source}” cannot be put back",
            hint="drop the letter, and have the sender publish it again",
        )
    fields = {key.encode(): value for key, value in letter.raw.items()}
    try:
        events.decode(fields, stream=letter.source)
    except InvalidEvent as error:
        raise UsageError(
            f"it still is no valid event: {error.message}", hint="mend who publishes it, and drop the letter"
        ) from error
    pairs = [part for pair in fields.items() for part in pair]
    put = cast("bytes | None", _PUT_BACK(client, (streams.DEAD_LETTER, letter.source), (entry, *pairs)))
    if put is None:
        raise NotFound(f"there is no dead letter “{entry}” (any more)")
    return f"is on “{letter.source}” again as {put.decode()}"


def _replay(client: Redis, letter: Letter) -> str:
    plan = replay.plan_replay(client, letter.source_entry, letter.source_entry)
    done = replay.execute(client, plan).as_dict()
    if not done["redelivered"]:
        why = (
            "its recipient is still not known" if done["unknown_recipient"]
            else "its recipient has newer ones of that sender already" if done["already_there"]
            else "the message log does not hold it any more" if not done["messages"]
            else "it waits for the router, or in the inbox"
        )  # fmt: skip
        raise AgentBackupError(f"it was not delivered: {why}", hint="drop the letter if nothing can be done")
    client.xdel(streams.DEAD_LETTER, letter.entry)
    return "is in the inbox of its recipient"
