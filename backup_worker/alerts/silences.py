"""Silences: for a while, some alerts are not sent. They are still raised, shown and on the record.

A silence always ends. It means what it names: kinds of alerts, agents, or single alerts by their key; with both kinds
and agents it means these kinds of these agents. The loudest kinds (`by_name_only` in the table of kinds) are not
silenced by naming their agent alone. What somebody was told before the silence is told its end all the same.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import msgpack

from backup_worker.alerts import kinds
from em_bridge.errors import NotFound, UsageError

if TYPE_CHECKING:
    from redis import Redis

    from backup_worker.alerts.book import OpenAlert

SILENCES: Final = "backup:silences"
"""Redis hash: id -> msgpack map."""

LAST: Final = "backup:silences:last"
"""The number of the newest silence."""

LONGEST_S: Final = 30 * 86400.0


@dataclass(frozen=True, slots=True)
class Silence:
    """What is silent, from when until when (Unix seconds), by whom and why."""

    id: str
    kinds: tuple[str, ...]
    agents: tuple[str, ...]
    keys: tuple[str, ...]
    since: float
    until: float
    by: str
    why: str

    def covers(self, alert: OpenAlert, now: float) -> bool:
        """Tell whether `alert` is not to be sent at `now`."""
        if not self.since <= now < self.until:
            return False
        if alert.key in self.keys:
            return True
        kind = kinds.of(alert.key)
        if self.kinds:
            return kind.name in self.kinds and (not self.agents or alert.agent in self.agents)
        return bool(self.agents) and alert.agent in self.agents and not kind.by_name_only

    def as_json(self) -> dict[str, Any]:
        """Return the silence as a map for `--json`, the record and the console."""
        return asdict(self)


def sort_out(names: Sequence[str], agents: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return which of `names` are kinds, agents and keys. Raises `NotFound` and `UsageError`. Pure."""
    if not names:
        raise UsageError(
            "name what is to be silent", hint="a kind (missing), an agent (z), or an alert's key"
        )
    found: dict[str, list[str]] = {"kinds": [], "agents": [], "keys": []}
    for name in names:
        if "/" in name:
            found["keys"].append(name)
        elif name in kinds.KINDS and name in agents:
            hint = "an alert's whole key is never mistaken: see `backup-worker alerts`"
            raise UsageError(f"“{name}” is a kind of alert and an agent", hint=hint)
        elif name in kinds.KINDS:
            found["kinds"].append(name)
        elif name in agents:
            found["agents"].append(name)
        else:
            known = f"the kinds are {', '.join(kinds.KINDS)}"
            raise NotFound(f"“{name}” is neither a kind of alert nor an agent", hint=known)
    return {what: tuple(dict.fromkeys(some)) for what, some in found.items()}


def begin(
    client: Redis,
    names: Sequence[str],
    agents: Collection[str],
    *,
    for_s: float,
    by: str,
    why: str,
    now: float,
) -> Silence:
    """Begin a silence of `for_s` seconds. Raises `UsageError` for one without an end in sight or a reason."""
    sorted_out = sort_out(names, agents)
    if not 0 < for_s <= LONGEST_S:
        raise UsageError(
            f"a silence lasts for at most {LONGEST_S / 86400:.0f} days", hint="write for example --for 2h"
        )
    if not why.strip():
        raise UsageError("a silence needs a reason", hint='write for example --why "moving the disks"')
    number = int(client.incr(LAST))
    silence = Silence(f"s{number}", **sorted_out, since=now, until=now + for_s, by=by, why=why.strip())
    client.hset(SILENCES, silence.id, msgpack.packb(asdict(silence)))
    return silence


def end(client: Redis, identifier: str) -> Silence:
    """End a silence early and return it. Raises `NotFound`."""
    value: Any = client.hget(SILENCES, identifier)
    if value is None or not client.hdel(SILENCES, identifier):
        raise NotFound(f"there is no silence “{identifier}”", hint="see `backup-worker silences`")
    return _load(value)


def active(client: Any, now: float) -> list[Silence]:
    """Return the silences that last, those that end first before the others."""
    return sorted(
        (one for one in _all(client) if now < one.until), key=lambda one: (one.until, one.since, one.id)
    )


def take_ended(client: Redis, now: float) -> list[Silence]:
    """Forget the silences whose time is over and return them; of many that ask, each is returned to one."""
    over = [one for one in _all(client) if one.until <= now]
    return [one for one in over if client.hdel(SILENCES, one.id)]


def _all(client: Any) -> list[Silence]:
    return [_load(value) for value in client.hgetall(SILENCES).values()]


def _load(value: bytes) -> Silence:
    fields = msgpack.unpackb(value)
    for name in ("kinds", "agents", "keys"):
        fields[name] = tuple(fields[name])
    return Silence(**{key: fields[key] for key in Silence.__dataclass_fields__})
