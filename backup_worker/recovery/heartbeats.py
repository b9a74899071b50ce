"""What heartbeats prove: that an agent lived after a certain entry, and that a new incarnation lives steadily.

Positions in the heartbeat stream are entry ids, given by the server, so no clock of an agent or of ours matters.
`Beats` is a pure fold over entries; `read` feeds it from Redis.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from em_bridge import streams
from em_bridge.errors import InvalidEvent
from em_bridge.events import Heartbeat, decode
from em_bridge.monitor import read_record

if TYPE_CHECKING:
    from redis import Redis

REMEMBERED = 256
"""How many beats of an agent are kept: far more than any `stable_beats`."""


@dataclass(slots=True)
class Beats:
    """The recent heartbeats of every agent, in stream order, and the last entry that was seen."""

    cursor: str = "0-0"
    by_agent: dict[str, deque[tuple[str, str]]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=REMEMBERED))
    )
    """Agent -> (entry id, incarnation), oldest first."""

    def feed(self, entry_id: str, beat: Heartbeat | None) -> None:
        """Take in the next entry; None is one that was not a heartbeat."""
        self.cursor = entry_id
        if beat is not None:
            self.by_agent[beat.agent.lower()].append((entry_id, beat.incarnation))

    def lived_after(self, agent: str, mark: str) -> bool:
        """Tell whether `agent` beat behind entry `mark`."""
        beats = self.by_agent.get(agent.lower(), ())
        return any(streams.id_order(entry_id) > streams.id_order(mark) for entry_id, _ in beats)

    def last_at(self, agent: str) -> float | None:
        """Return when `agent` beat last (Unix seconds), or None if it did not."""
        beats = self.by_agent.get(agent.lower())
        return streams.entry_time(beats[-1][0]) if beats else None

    def incarnations(self, agent: str) -> tuple[str, ...]:
        """Return the incarnations of `agent` that beat, in no particular order."""
        return tuple({incarnation for _, incarnation in self.by_agent.get(agent.lower(), ())})

    def is_steady(self, agent: str, mark: str, count: int, since: float) -> bool:
        """Tell whether `agent` beat `count` times in a row behind `mark`, the last time not before `since`."""
        beats = self.by_agent.get(agent.lower(), ())
        fresh = any(streams.entry_time(entry_id) >= since for entry_id, _ in beats)
        return fresh and self.streak(agent, mark, ())[1] >= count

    def streak(
        self, agent: str, mark: str, old: Collection[str], *, until: float | None = None
    ) -> tuple[str, int]:
        """Return the incarnation that beat last behind `mark`, and how many beats in a row were its own.

        An incarnation in `old` never counts, and breaks the row of another one. What came after `until` (Unix seconds)
        came too late. ("", 0) if there is none.
        """
        incarnation, count = "", 0
        for entry_id, sender in self.by_agent.get(agent.lower(), ()):
            if streams.id_order(entry_id) <= streams.id_order(mark):
                continue
            if until is not None and streams.entry_time(entry_id) > until:
                break
            if sender in old:
                incarnation, count = "", 0
            elif sender == incarnation:
                count += 1
            else:
                incarnation, count = sender, 1
        return incarnation, count


def survivors(client: Redis, agent: str, mark: str, window_s: float) -> set[str]:
    """Return the incarnations of `agent` that lived before the entry `mark`.

    The EM's notes, and those that beat since its last one, or since `window_s` before the mark.
    """
    raw: Any = client.hget(streams.STATES, agent)
    noted = read_record(raw)
    known = {noted["incarnation"], *noted.get("retired", ())} if noted.get("incarnation") else set()
    since = streams.id_at(max(0.0, streams.entry_time(mark) - window_s))
    cursor = max(since, noted.get("last_entry") or since, key=streams.id_order)
    return known | set(read(client, Beats(cursor=cursor), only=[agent]).incarnations(agent))


def read(client: Redis, beats: Beats, *, only: Collection[str] | None = None) -> Beats:
    """Feed `beats` with everything behind its cursor (of the agents `only`, if given), and return it."""
    names = None if only is None else [name.lower().encode() for name in only]
    for entry_id, fields in streams.read_range(client, streams.HEARTBEATS, start=f"({beats.cursor}"):
        # A large fleet beats much: what cannot be about these agents is not worth decoding.
        body = fields.get(b"body", b"")
        is_other = names is not None and not any(name in body.lower() for name in names)
        beats.feed(entry_id, None if is_other else _heartbeat(fields))
    return beats


def _heartbeat(fields: streams.Fields) -> Heartbeat | None:
    try:
        event = decode(fields)
    except InvalidEvent:
        # A stray writer must not stop a recovery; the EM's monitor reports such entries.
        return None
    return event if isinstance(event, Heartbeat) else None


def earliest(marks: Iterable[str]) -> str:
    """Return the smallest of `marks`, or the beginning of the stream."""
    return min(marks, key=streams.id_order, default="0-0")
