"""How long the last backup of each agent and tier took: for graphs, not for decisions, so losing it costs nothing."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import redis.exceptions

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger(__name__)

TOOK = "backup:took"
"""Redis hash: `<tier>/<agent>` -> seconds."""


def note(client: Redis | None, tier: str, agent: str, seconds: float) -> None:
    """Write down that a backup took `seconds`; a backup never fails for it."""
    if client is None:
        return
    try:
        client.hset(TOOK, f"{tier}/{agent}", f"{seconds:.3f}")
    except redis.exceptions.RedisError as error:
        log.warning("how long the %s backup of %s took is not noted: %s", tier, agent, error)


def last(client: Redis) -> dict[tuple[str, str], float]:
    """Return (agent, tier) -> how many seconds its last backup took."""
    found: Any = client.hgetall(TOOK)
    pairs = ((name.decode().partition("/"), value) for name, value in found.items())
    return {(agent, tier): float(value) for (tier, _, agent), value in pairs}
