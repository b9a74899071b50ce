"""The dead man's switch outside: it is told by us while all is well, and calls somebody when it hears nothing.

The protocol is that of healthchecks.io: a round of a tier begins (`/start`), every configured agent's snapshot of it is
there, proven and good (the URL itself), or one is not (`/fail`); the text says which. Success is only ever told when
the repository itself shows it. A ping blocks no backup: it is sent by a job of its own, tried again after pauses that
double, and one that fails is on the record, and alerts when it keeps failing. The URL is a secret and is never shown.
"""

from __future__ import annotations

import logging
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import msgpack

from backup_worker import schedule, slots
from backup_worker.config import Config
from backup_worker.runtime import Runtime
from backup_worker.snapshots import Head, newest
from backup_worker.units import counted

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger(__name__)

TASK: Final = "ping"
STATES: Final = "backup:pings"
"""Redis hash: tier -> msgpack map of a `State`."""

TIMEOUT_S: Final = 10.0
FIRST_RETRY_S: Final = 60.0
LONGEST_RETRY_S: Final = 3600.0
ALERT_AFTER: Final = 3
"""After so many failures in a row somebody is told."""

BODY_LENGTH: Final = 10_000
NOT_TAKEN: Final = ("not found", "rate limited")
"""What stands in a reply that looks like success and is none."""

_SPACE: Final = uuid.UUID("8f1c1bd2-6a3b-4c5b-9a44-0d7a2b7f4b6e")

Signal = Literal["start", "fail", "success"]
_PATHS: Final[Mapping[Signal, str]] = {"start": "/start", "fail": "/fail", "success": ""}


@dataclass(frozen=True, slots=True)
class State:
    """What the switch of a tier was told of the round `slot`, and how often it could not be reached since."""

    slot: str = ""
    said: str = ""
    failures: int = 0
    retry_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Ping:
    """What the switch of `tier` is to be told of the round `slot`."""

    tier: str
    slot: str
    signal: Signal
    body: str


def plan(
    config: Config,
    heads: Sequence[Head],
    failed: Collection[str],
    states: Mapping[str, State],
    now: float,
) -> list[Ping]:
    """Return what is to be told at `now`. Pure; `failed` are the slots (`tier/slot/agent`) of which a try failed."""
    last = newest(heads)
    wanted = []
    for name, tier in config.schedule.tiers.items():
        if tier.ping is None or tier.cron is None or not config.agents:
            continue
        fire_at = schedule.previous_run(tier, config.schedule.timezone, now)
        slot = schedule.slot_name(tier, config.schedule.timezone, fire_at)
        state = states.get(name, State())
        said = state.said if state.slot == slot else ""
        here = {
            agent: head for (of, agent), head in last.items() if of == name and head.created_at >= fire_at
        }
        missing = [agent for agent in config.agents if agent not in here]
        unsound = [head for agent, head in here.items() if agent in config.agents and not head.is_good]
        tried = [agent for agent in missing if f"{name}/{slot}/{agent}" in failed]
        late = now - fire_at > config.schedule.limits.overdue_minutes * 60
        signal: Signal = "success"
        if unsound or tried or (missing and late):
            signal = "fail"
        elif missing:
            signal = "start"
        body = _body(name, slot, here, missing, unsound)
        if signal != said and (signal, said) not in (("start", "fail"), ("start", "success")):
            wanted.append(Ping(name, slot, signal, body))
    return wanted


def run(runtime: Runtime, now: float) -> dict[str, Any]:
    """Send the pings that are due, and write down what came of them."""
    told = {}
    for ping in due(runtime, runtime.repository.snapshots(), now):
        told[ping.tier] = _send(runtime, ping, now)
    return {"pings": told}


def due(runtime: Runtime, heads: Sequence[Head], now: float) -> list[Ping]:
    """Return the pings that are to be sent now: those that are planned, and not held back by a failure."""
    if not any(tier.ping for tier in runtime.config.schedule.tiers.values()):
        return []
    states = known_states(runtime.redis)
    wanted = plan(runtime.config, heads, slots.waiting(runtime.redis), states, now)
    return [ping for ping in wanted if states.get(ping.tier, State()).retry_at <= now]


def known_states(client: Redis) -> dict[str, State]:
    """Return what each tier's switch was told."""
    rows: Any = client.hgetall(STATES)
    return {tier.decode(): State(**msgpack.unpackb(value)) for tier, value in rows.items()}


def post(url: str, ping: Ping) -> str | None:
    """Tell a switch; return why it was not told, without its URL, or None if it was."""
    run_id = uuid.uuid5(_SPACE, f"{ping.tier}/{ping.slot}")
    address = f"{url.rstrip('/')}{_PATHS[ping.signal]}?rid={run_id}"
    # The configuration takes nothing but http and https.
    request = urllib.request.Request(address, ping.body.encode()[:BODY_LENGTH], method="POST")  # noqa: S310 - see above
    request.add_header("Content-Type", "text/plain; charset=utf-8")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310 - see above
            said = answer.read(200).decode(errors="replace").lower()
    except urllib.error.HTTPError as error:
        return f"it answered {error.code}"
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return f"{type(reason).__name__}: {getattr(reason, 'strerror', None) or 'no answer'}".lower()
    return next((f"it answered “{word}”" for word in NOT_TAKEN if word in said), None)


def host_of(url: str) -> str:
    """Return what of a switch's URL may be shown."""
    return urllib.parse.urlsplit(url).hostname or "?"


def _send(runtime: Runtime, ping: Ping, now: float) -> bool:
    url = runtime.config.schedule.tiers[ping.tier].ping
    assert url is not None, "only tiers with a ping are planned"
    problem = post(url, ping)
    key, host = f"ping/{ping.tier}", host_of(url)
    facts = {"tier": ping.tier, "slot": ping.slot, "signal": ping.signal, "to": host}
    if problem is None:
        state = State(ping.slot, ping.signal)
        runtime.record("ping", **facts, ok=True)
        runtime.resolve(key)
    else:
        before = known_states(runtime.redis).get(ping.tier, State())
        pause_s = min(FIRST_RETRY_S * 2.0 ** min(before.failures, 16), LONGEST_RETRY_S)
        state = State(before.slot, before.said, before.failures + 1, now + pause_s)
        log.warning("the ping “%s” of %s did not reach %s: %s", ping.signal, ping.tier, host, problem)
        runtime.record("ping", **facts, ok=False, error=problem)
        if state.failures >= ALERT_AFTER:
            title = f"the dead man's switch of {ping.tier} cannot be reached"
            body = (
                f"{host}: {problem}, {counted(state.failures, 'time')} in a row; it may call you for nothing"
            )
            runtime.alert(key, "warning", title, body)
    runtime.redis.hset(STATES, ping.tier, msgpack.packb(asdict(state)))
    return problem is None


def _body(
    tier: str, slot: str, here: Mapping[str, Head], missing: Sequence[str], unsound: Sequence[Head]
) -> str:
    count, size = sum(head.files for head in here.values()), sum(head.bytes for head in here.values())
    lines = [f"{tier} {slot}: {len(here)} snapshots, {count} files, {size} bytes"]
    lines += [f"{head.id} is {head.status}" for head in unsound]
    lines += [f"{agent}: there is no snapshot yet" for agent in missing]
    return "\n".join(lines)
