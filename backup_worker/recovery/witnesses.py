"""Is it really dead? Silence is one witness; this asks for the second before anything is ended or overwritten.

The second witness is whoever runs the agent, saying that no process of it is left, or else a second silence as long as
the first. What nobody can say is never taken for death by itself: who cannot be asked is asked again. An agent that
beats steadily lives, whatever was said of it.

If much of the fleet fell silent at once, the cause is rather the bus or the host than each of them. Both are proven
well first, and then only the word that no process is left counts: half a fleet that runs, but is not heard, must not be
ended. Such agents are held until they beat, end, or a human says `backup-worker recover`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from backup_worker.recovery import proc
from em_bridge import clock, streams
from em_bridge.events import DEAD
from em_bridge.monitor import read_record

if TYPE_CHECKING:
    from redis import Redis

    from backup_worker.config import Config

AT_LEAST = 3
"""Fewer agents than this that fall silent together are no mass, however small the fleet."""

TOGETHER_S = 30.0
"""Deaths that are told within this time of one another count as one instant: limits differ from agent to agent."""

LEAST_MEMORY = 0.02
"""With less of the memory free than this share, what is started next is killed next."""

GONE, SILENT, ALIVE, UNSURE = "gone", "silent", "alive", "unsure"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`finding`: its process is `gone`, it was `silent` for a second time, it is `alive`, or nobody can say yet."""

    finding: str
    detail: str = ""

    @property
    def is_dead(self) -> bool:
        """Whether there are two witnesses."""
        return self.finding in (GONE, SILENT)


def judge(
    running: Sequence[object] | None, *, steady: bool, silent_s: float, limit_s: float, mass: bool
) -> Verdict:
    """Return what the witnesses say. Pure.

    `running` are its processes, None if nobody can be asked; `steady`: it has beaten often enough since; `silent_s` is
    for how long it was not heard since its death was told; `mass`: it fell silent together with many.
    """
    if steady:
        return Verdict(ALIVE, "it beats after all; nothing was changed")
    if running is not None and not running:
        return Verdict(GONE, "no process of it is left")
    what = "whether it runs is not known" if running is None else f"{', '.join(map(str, running))} still runs"
    if not mass and silent_s >= limit_s:
        return Verdict(SILENT, f"{what}, and it was silent for another {limit_s:g} s")
    return Verdict(UNSURE, what)


def silent_together(client: Redis, config: Config, agent: str, at: float) -> list[str]:
    """Return the agents that were told dead within `TOGETHER_S` of `at`, if with `agent` they are a mass; else nobody.

    From the states that the EM keeps: it writes those of one instant together, so the first to be looked at sees all.
    """
    raw: Any = client.hgetall(streams.STATES)
    names = {name.lower(): name for name in config.agents}
    found = {agent}
    for key, value in raw.items():
        name, record = names.get(key.decode("utf-8", "replace").lower()), read_record(value)
        is_near = abs(record.get("since", 0.0) - at) <= TOGETHER_S
        if name is not None and record.get("state") == DEAD and is_near:
            found.add(name)
    is_mass = len(found) >= AT_LEAST and len(found) > config.schedule.limits.mass_silence * len(config.agents)
    return sorted(found) if is_mass else []


def unwell(client: Redis, state: Path, *, up_for_s: float) -> list[str]:
    """Return what is wrong with the bus and this host; nothing if both are proven well just now.

    `up_for_s`: a server that started less than this ago has explained the silence by itself. Redis that is away raises
    what redis-py raises: then nobody is recovered either.
    """
    return [*_of_the_bus(client, up_for_s), *_of_the_host(state)]


def _of_the_bus(client: Redis, up_for_s: float) -> list[str]:
    facts: Any = client.info()
    token, key = uuid.uuid4().hex, "backup:recovery:probe"
    client.set(key, token, ex=60)
    said: Any = client.get(key)
    problems = []
    if facts.get("loading"):
        problems.append("the bus still loads its data")
    if facts.get("role", "master") != "master":
        problems.append("the bus we see is a replica")
    if facts.get("uptime_in_seconds", up_for_s) < min(up_for_s, TOGETHER_S):
        problems.append(f"the bus was started {facts['uptime_in_seconds']} s ago")
    if said is None:
        problems.append("the bus does not keep what is written")
    return problems


def _of_the_host(state: Path) -> list[str]:
    problems = []
    memory = psutil.virtual_memory()
    if memory.available < LEAST_MEMORY * memory.total:
        problems.append(f"of the host's memory only {memory.available // 2**20} MiB are left")
    probe = state / f".probe-{uuid.uuid4().hex}"
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(descriptor, b"well")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
            probe.unlink(missing_ok=True)
    except OSError as error:
        problems.append(f"“{state}” cannot be written: {(error.strerror or str(error)).lower()}")
    return problems


def last_heard(client: Redis, agent: str) -> float | None:
    """Return when `agent` beat last (Unix seconds, the server's clock), as far as the EM has noted it."""
    raw: Any = client.hget(streams.STATES, agent)
    found: float | None = read_record(raw).get("last_beat") if raw else None
    return found


def up_s() -> float:
    """Return for how many seconds this host, or this container, is up: by no clock that anybody can set."""
    started_s = (proc.started(1) or 0) / os.sysconf("SC_CLK_TCK")
    return clock.since_boot() - started_s
