"""Find the change that killed an agent: the newest stored state on which it works, and the first one on which not.

Each state that its snapshots make (suspect ones too) is laid down in a scratch folder and tried there, with no way to
Redis: the agent's root, its process and the bus are never touched. A binary search tries few of them. That alone would
be fooled by an agent that works on and off, so the states behind the boundary are sampled too, the two at the boundary
are tried twice, and what was found to go back and forth is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backup_worker.config import AgentConfig, Config
from backup_worker.restoring import scratch
from backup_worker.restoring.health_command import run_health
from backup_worker.snapshots import (
    Difference,
    Repository,
    RestorePlan,
    all_states,
    diff_states,
    execute,
)
from em_bridge.errors import AgentBackupError, NotFound, UsageError

FOLDER = "bisect"
PROBES = 5
"""How many states behind the boundary are tried, spread evenly, before the search believes what it has found."""


@dataclass(slots=True)
class Search:
    """What is known of `count` states, oldest first: `results` by number, and the boundary.

    `good` is the newest that works as far as is known, `bad` the one after it; `steady` is False if one of these two
    answered differently when it was tried again.
    """

    count: int
    results: dict[int, bool] = field(default_factory=dict)
    good: int | None = None
    bad: int | None = None
    steady: bool = True

    @property
    def monotonic(self) -> bool:
        """Whether everything that was tried up to some state works, and nothing behind it."""
        working = [number for number, works in self.results.items() if works]
        failing = [number for number, works in self.results.items() if not works]
        return not working or not failing or max(working) < min(failing)


def search(count: int, works: Callable[[int], bool], *, everything: bool = False) -> Search:
    """Find the boundary among `count` states; `works` tries one. With `everything`, each is tried."""
    found = Search(count)

    def ask(number: int) -> bool:
        if number not in found.results:
            found.results[number] = works(number)
        return found.results[number]

    newest = count - 1
    wanted = range(count) if everything else [newest, *_halvings(count)]
    for number in wanted:
        if ask(number) and not everything:
            break
    found.good = max((number for number, one in found.results.items() if one), default=None)
    while found.good is not None and found.good < newest:
        _narrow(found, ask)
        if not any(ask(number) for number in _spread(found.bad or 0, newest, found.results)):
            break
        found.good = max(number for number, one in found.results.items() if one)
    if found.good is None:
        found.bad = 0
    boundary = [number for number in (found.good, found.bad) if number is not None]
    found.steady = all(works(number) == found.results[number] for number in boundary)
    return found


def _narrow(found: Search, ask: Callable[[int], bool]) -> None:
    """Move the boundary up from `good` until the state behind it is known to fail."""
    assert found.good is not None
    low = found.good
    high = min(number for number, one in found.results.items() if not one and number > low)
    while high - low > 1:
        middle = (low + high) // 2
        if ask(middle):
            low = middle
        else:
            high = middle
    found.good, found.bad = low, high


def _halvings(count: int) -> Iterator[int]:
    """Yield the oldest, then the middle, the quarters and so on: wherever the working ones are, one is found soon."""
    yield 0
    step = count
    while step > 1:
        half = (step + 1) // 2
        yield from range(half, count, half)
        step = half


def _spread(low: int, high: int, known: dict[int, bool]) -> list[int]:
    """Return up to `PROBES` untried states between `low` and `high`, spread evenly."""
    untried = [number for number in range(low + 1, high) if number not in known]
    if len(untried) <= PROBES:
        return untried
    return [untried[(2 * one + 1) * len(untried) // (2 * PROBES)] for one in range(PROBES)]


@dataclass(frozen=True, slots=True)
class Tried:
    """One state that was tried: `sources` are its snapshots, newest first, `at` is when the newest was made."""

    sources: tuple[str, ...]
    at: float
    works: bool
    detail: str

    def as_json(self) -> dict[str, Any]:
        """Return the fields for `--json`."""
        return {"state": self.sources[0], "sources": list(self.sources), "at": self.at, "works": self.works,
                "detail": self.detail}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bisection:
    """What was found about `agent`: the two states at the boundary (None if there is none), and what differs."""

    agent: str
    search: Search
    tried: tuple[Tried, ...]
    newest_working: Tried | None
    first_bad: Tried | None
    difference: Difference | None

    def as_json(self) -> dict[str, Any]:
        """Return what `backup-worker bisect --json` prints."""
        return {
            "agent": self.agent,
            "states": self.search.count,
            "tried": [one.as_json() for one in self.tried],
            "newest_working": self.newest_working.as_json() if self.newest_working else None,
            "first_bad": self.first_bad.as_json() if self.first_bad else None,
            "monotonic": self.search.monotonic,
            "steady": self.search.steady,
            "difference": self.difference.as_json() if self.difference else None,
        }


class Bisector:
    """Tries the states of one agent. Raises NotFound without any snapshot, UsageError if there is nothing to try."""

    def __init__(
        self, config: Config, repo: Repository, name: str, *, for_s: float | None, now: float
    ) -> None:
        self.config, self.repo, self.name, self.for_s, self.now = config, repo, name, for_s, now
        self.agent = config.agent(name)
        self._check(self.agent)
        self.states = all_states(repo, config.files_of(name))
        if not self.states:
            raise NotFound(f"there is no snapshot of “{name}”", hint="see `backup-worker list`")
        self.heads = {head.id: head.created_at for head in repo.snapshots(name)}
        self.tried: dict[int, Tried] = {}

    def _check(self, agent: AgentConfig) -> None:
        if self.for_s is None and agent.health is None:
            raise UsageError(
                f"“{self.name}” has no health command to judge a state by",
                hint="write `health` for it in agents.json, or start it on each state: --for SECONDS",
            )
        if self.for_s is not None and (agent.start is None or agent.start.command is None):
            raise UsageError(
                f"“{self.name}” has no start command that could be run in a scratch folder",
                hint="leave --for out, and write `health` for it in agents.json",
            )

    def run(self, *, everything: bool = False, told: Callable[[Tried], None] | None = None) -> Bisection:
        """Search; `told` hears of every state as it was tried."""

        def works(number: int) -> bool:
            one = self.tried[number] = self._try(self.states[number])
            if told is not None:
                told(one)
            return one.works

        found = search(len(self.states), works, everything=everything)
        good, bad = found.good, found.bad
        difference = diff_states(self.states[good], self.states[bad]) if good is not None and bad else None
        tried = tuple(self.tried[number] for number in sorted(self.tried))
        return Bisection(self.name, found, tried, self._at(good), self._at(bad), difference)

    def _at(self, number: int | None) -> Tried | None:
        return None if number is None else self.tried[number]

    def _try(self, state: RestorePlan) -> Tried:
        at = self.heads.get(state.state, 0.0)
        with scratch.folder(self.config.schedule.state / FOLDER) as place:
            root = place / "root"
            # A name of its own, for a lock of its own: a trial must hold up no backup and no recovery of the agent.
            stand_in = replace(state.agent, name=f"bisect-{self.name}"[:63])
            try:
                execute(replace(state, agent=stand_in), root, evidence=None, now=self.now)
            except (AgentBackupError, OSError) as error:
                return Tried(state.sources, at, False, f"it cannot be laid down: {error}")
            works, detail = self._judge(root)
        return Tried(state.sources, at, works, detail)

    def _judge(self, root: Path) -> tuple[bool, str]:
        if self.for_s is None:
            verdict = run_health(self._health, root, self.name, within_s=self.agent.heartbeat.health_within)
            return verdict.ok, str(verdict)
        ended = run_health(self._start, root, self.name, within_s=self.for_s)
        said = str(ended).partition(": ")[2]
        stayed = ended.exit_code is None
        return stayed, f"stayed up for {self.for_s:g} s" if stayed else f"ended: {said}"

    @property
    def _health(self) -> Sequence[str]:
        assert self.agent.health is not None
        return self.agent.health

    @property
    def _start(self) -> Sequence[str]:
        assert self.agent.start is not None
        assert self.agent.start.command is not None
        return self.agent.start.command
