"""The fleet on one page: what is known of each agent, and how bad it is. Pure, but for `look`, which asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from backup_worker import alerts, schedule
from backup_worker.config import AgentConfig, Tier
from backup_worker.console.beats import Bars
from backup_worker.console.drift import Drift
from backup_worker.console.live import View
from backup_worker.maintenance import lookout
from backup_worker.queueing import backpressure, hosts, queues
from backup_worker.recovery.incident import Incident, IncidentStore
from backup_worker.restoring import proofs
from backup_worker.snapshots import Head, newest
from em_bridge import streams
from em_bridge.monitor import read_states

if TYPE_CHECKING:
    from redis import Redis

ALIVE, DEGRADED, DEAD, UNKNOWN = "ALIVE", "DEGRADED", "DEAD", "UNKNOWN"
TONES = ("bad", "warn", "none", "good")
"""From the worst to the best."""


@dataclass(frozen=True, slots=True)
class TierCell:
    """An agent's newest good snapshot in a tier; `limit_s` is the age at which it is overdue, None without a cron."""

    tier: str
    good: Head | None
    newest: Head | None
    age_s: float | None
    limit_s: float | None
    overdue: str | None
    failing: bool

    @property
    def tone(self) -> str:
        """`bad`, `warn`, `good` or `none`."""
        if self.overdue or self.failing:
            return "bad"
        if self.newest is not None and not self.newest.is_good:
            return "warn"
        return "good" if self.good else "none"

    @property
    def percent(self) -> int | None:
        """How much of the allowed age is used up, 0 to 100."""
        if self.age_s is None or not self.limit_s:
            return None
        return max(0, min(100, round(100 * self.age_s / self.limit_s)))


@dataclass(frozen=True, slots=True)
class Card:
    """One agent."""

    name: str
    config: AgentConfig
    state: str
    since: float | None
    reason: str
    last_beat: float | None
    incident: Incident | None
    tiers: tuple[TierCell, ...]
    needed_by: tuple[str, ...] = ()

    @property
    def tone(self) -> str:
        """`bad`, `warn`, `good` or `none`: the worst of what is known."""
        if self.state == DEAD or self.incident is not None or any(cell.tone == "bad" for cell in self.tiers):
            return "bad"
        if self.state == DEGRADED or any(cell.tone == "warn" for cell in self.tiers):
            return "warn"
        return "good" if self.state == ALIVE else "none"


@dataclass(frozen=True, slots=True)
class Detail:
    """What is looked up only for the agents on the page."""

    bars: Bars | None
    proof: proofs.Note | None
    proof_overdue: bool
    drift: Drift | None
    host: str | None
    """The other host where its files are."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """The page `/`."""

    cards: tuple[Card, ...]
    states: Mapping[str, int]
    statuses: Mapping[str, int]
    runs: tuple[tuple[str, Tier, float | None], ...]
    overdue: int
    alerts: tuple[alerts.OpenAlert, ...] = ()
    waiting: Mapping[str, int] = field(default_factory=dict)
    lag_s: float | None = None
    dead_letters: int | None = None


def queue_lengths(client: Redis) -> dict[str, int]:
    """Return how many jobs wait in each queue that exists, the three of every installation first."""
    stored: Any = client.smembers("rq:queues")
    others = sorted(name.decode(errors="replace").removeprefix("rq:queue:") for name in stored)
    names = dict.fromkeys([*queues.QUEUES, *others])
    return backpressure.lengths(client, list(names))


@dataclass(frozen=True, slots=True)
class QueueRow:
    """How many jobs of a queue wait, run, and have failed."""

    name: str
    waiting: int
    running: int
    failed: int


def queue_rows(client: Redis) -> list[QueueRow]:
    """Return every queue as the RQ dashboard counts it."""
    rows = []
    for name, waiting in queue_lengths(client).items():
        running: Any = client.zcard(f"rq:wip:{name}")
        failed: Any = client.zcard(f"rq:failed:{name}")
        rows.append(QueueRow(name, waiting, int(running), int(failed)))
    return rows


def age_limit_s(tier: Tier, zone: str, grace_s: float, now: float) -> float | None:
    """Return the age at which a snapshot of `tier` is overdue: the time between two runs, and the grace."""
    if tier.cron is None:
        return None
    return schedule.next_run(tier, zone, now) - schedule.previous_run(tier, zone, now) + grace_s


def look(view: View) -> Fleet:
    """Gather what is known now."""
    config, now, zone = view.config, view.now, view.zone
    states = view.known(read_states, {})
    incidents = {
        one.agent: one for one in view.known(lambda client: IncidentStore(client).open_incidents(), [])
    }
    overdue = lookout.missing_backups(view.runtime, now, view.heads)
    failing = view.runtime.repository.failing()
    good, last = newest(head for head in view.heads if head.is_good), newest(view.heads)
    grace_s = config.schedule.limits.overdue_minutes * 60
    limits = {name: age_limit_s(tier, zone, grace_s, now) for name, tier in config.schedule.tiers.items()}
    needed_by: dict[str, list[str]] = {}
    for name, agent in config.agents.items():
        for other in agent.depends_on:
            needed_by.setdefault(other, []).append(name)
    cards = []
    for name, agent in config.agents.items():
        cells = tuple(
            TierCell(
                tier, good.get((tier, name)), last.get((tier, name)),
                now - good[tier, name].created_at if (tier, name) in good else None,
                limits[tier], overdue[tier, name].slot if (tier, name) in overdue else None, (name, tier) in failing,
            )
            for tier in config.schedule.tiers
        )  # fmt: skip
        state = states.get(name.lower(), {})
        cards.append(
            Card(
                name, agent, str(state.get("state", UNKNOWN)), state.get("since"), str(state.get("reason", "")),
                state.get("last_beat"), incidents.get(name), cells,
                tuple(needed_by.get(name, ())),
            )
        )  # fmt: skip
    return Fleet(
        cards=tuple(cards),
        states=Counter(card.state for card in cards),
        statuses=Counter(status_of(head) for head in view.heads),
        runs=next_runs(view),
        overdue=len(overdue),
        alerts=tuple(view.known(alerts.open_alerts, [])),
        waiting=view.known(queue_lengths, {}),
        lag_s=view.known(lambda _: lookout.oldest_waiting(view.runtime, now), None),
        dead_letters=view.known(lambda client: int(client.xlen(streams.DEAD_LETTER)), None),
    )


def details(view: View, cards: Sequence[Card]) -> dict[str, Detail]:
    """Return the details of `cards`, by agent."""
    shared, repository = view.live, view.runtime.repository
    limit_s = view.config.schedule.drill.days * 86400
    server_now = view.known(shared.beats.read, None)
    drifts = shared.drifts.of(view.runtime, [card.name for card in cards])
    found = {}
    for card in cards:
        note = proofs.note_of(repository, card.name)
        proven_at = note.proven_at if note else None
        dead_after = card.config.heartbeat.dead_after
        found[card.name] = Detail(
            shared.beats.of(card.name, server_now, dead_after) if server_now is not None else None,
            note,
            proven_at is not None and view.now - proven_at > limit_s,
            drifts.get(card.name),
            hosts.elsewhere(view.config, card.name),
        )
    return found


def next_runs(view: View) -> tuple[tuple[str, Tier, float | None], ...]:
    """Return each tier with the time of its next run (Unix seconds), None for those that wait for events."""
    return tuple(
        (name, tier, schedule.next_run(tier, view.zone, view.now) if tier.cron else None)
        for name, tier in view.config.schedule.tiers.items()
    )


def status_of(head: Head) -> str:
    """Return the status as the console shows it: damage that was found since counts more than what it was."""
    return "damaged" if head.damaged else head.status
