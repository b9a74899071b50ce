"""The last minutes of every agent's heartbeats, as rows of bars.

One reader for all windows: each page reads on where the last one stopped, so many open tabs cost the server one pass
over the stream. What is not a heartbeat is passed over. Times are the server's (entry ids), never an agent's.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from em_bridge import streams
from em_bridge.errors import InvalidEvent
from em_bridge.events import Heartbeat, decode

if TYPE_CHECKING:
    from redis import Redis

BARS = 36
PER_LIMIT = 6
"""How many bars an agent's `dead_after` is cut into: a row shows six times that limit."""

KEPT = 720
MAX_WINDOW_S = 900.0
MAX_READ = 40_000
"""How many entries one page takes in at most; what is older is left out."""

WIDTH, HEIGHT, STEP = 4 * BARS - 1, 16, 4
BEAT, FRESH, NONE = "beat", "fresh", "none"


@dataclass(frozen=True, slots=True)
class Bars:
    """A row of bars, oldest first: `beat`, `fresh` (a new incarnation began) or `none`; each `bar_s` seconds long."""

    kinds: tuple[str, ...]
    bar_s: float
    last_at: float | None

    def path(self, kind: str) -> str:
        """Return the bars of one kind as the data of an SVG path of strokes."""
        height = HEIGHT if kind != NONE else 3
        return "".join(
            f"M{STEP * index + 1.5} {HEIGHT}v-{height}"
            for index, found in enumerate(self.kinds)
            if found == kind
        )

    @property
    def said(self) -> str:
        """What the row shows, in words."""
        with_beat = sum(kind != NONE for kind in self.kinds)
        restarts = self.kinds.count(FRESH)
        began = f", {restarts} new incarnation{'s' if restarts != 1 else ''}" if restarts else ""
        return f"beats in {with_beat} of the last {len(self.kinds)} intervals of {self.bar_s:g} s{began}"


def bars(beats: Iterable[tuple[float, str]], now: float, dead_after_s: float) -> Bars:
    """Return the row of an agent from its (time, incarnation) pairs, oldest first. Pure."""
    bar_s = dead_after_s / PER_LIMIT
    begun = now - BARS * bar_s
    kinds = [NONE] * BARS
    before: str | None = None
    last: float | None = None
    for at, incarnation in beats:
        place = int((at - begun) // bar_s)
        is_new = before is not None and incarnation != before
        before, last = incarnation, at
        if 0 <= place < BARS:
            kinds[place] = FRESH if is_new or kinds[place] == FRESH else BEAT
        elif place >= BARS:
            # It came while this page was being made.
            kinds[-1] = FRESH if is_new else BEAT
    return Bars(tuple(kinds), bar_s, last)


class Beats:
    """The recent beats of every agent; shared by the threads of a console."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cursor: str | None = None
        self._by_agent: dict[str, deque[tuple[float, str]]] = {}

    def read(self, client: Redis) -> float:
        """Take in what is new; return the server's time (Unix seconds)."""
        now = streams.server_time(client)
        with self._lock:
            if self._cursor is None or streams.entry_time(self._cursor) < now - MAX_WINDOW_S:
                self._cursor = streams.id_at(now - MAX_WINDOW_S)
                self._by_agent.clear()
            rows: Any = client.xrevrange(streams.HEARTBEATS, "+", f"({self._cursor}", count=MAX_READ)
            for raw_id, fields in reversed(rows):
                self._cursor = raw_id.decode()
                self._take(streams.entry_time(self._cursor), fields)
        return now

    def _take(self, at: float, fields: streams.Fields) -> None:
        try:
            beat = decode(fields, stream=streams.HEARTBEATS)
        except InvalidEvent:
            return
        if isinstance(beat, Heartbeat):
            known = self._by_agent.setdefault(beat.agent.lower(), deque(maxlen=KEPT))
            known.append((at, beat.incarnation))

    def of(self, agent: str, now: float, dead_after_s: float) -> Bars:
        """Return the row of `agent`."""
        with self._lock:
            found = list(self._by_agent.get(agent.lower(), ()))
        return bars(found, now, dead_after_s)
