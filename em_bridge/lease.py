"""One holder at a time, and a number that grows with each holder, so that a deposed one can be refused.

Promise: at most one holder has a lease at a moment of the server's clock, and a write that carries an older epoch than
the newest holder's is refused (`scripts.FENCE`), even if the deposed holder still believes in itself. When the server
is away nobody can acquire or renew; what redis-py raises passes through.

A holder that was killed would block its successor until the lease runs out. Where the successor can prove that the
holder's process is gone (same host, same boot, same process namespace), it takes over at once.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from typing import Final

import redis

from em_bridge.errors import LeaseLost
from em_bridge.scripts import Script

# KEYS: lease, epoch. ARGV: holder, time to live in ms, a holder that is known to be gone (or empty).
# A lost epoch key starts again from the clock, not from 1: an epoch must never come back. So it must not be lost by a
# fail-over either, behind which another holder would get the same number.
_ACQUIRE = Script(
    """
local held = redis.call('GET', KEYS[1])
if held == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return redis.call('GET', KEYS[2])
end
if held and held ~= ARGV[3] then return false end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
if redis.call('EXISTS', KEYS[2]) == 0 then redis.call('SET', KEYS[2], redis.call('TIME')[1]) end
return tostring(redis.call('INCR', KEYS[2]))
""",
    kept=True,
)

# A lease that ran out and that nobody took since (the epoch is still ours) may go on.
_RENEW = Script("""
local held = redis.call('GET', KEYS[1])
if held == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return 1
end
if not held and redis.call('GET', KEYS[2]) == ARGV[3] then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  return 1
end
return 0
""")

_RELEASE = Script("""
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
""")

_CHECK = Script("return 1", fenced=True)

_STAT_AFTER_NAME: Final = 19
"""Fields of `/proc/PID/stat` between the command's closing bracket and the start time."""


class Lease:
    """The lease `name`, as `holder` (unique per process start) would hold it for `ttl_s` after each renewal."""

    def __init__(self, client: redis.Redis, name: str, *, holder: str, ttl_s: float) -> None:
        self.name = name
        self.holder = holder
        self.ttl_s = ttl_s
        self.key = f"em:lease:{name}"
        self.epoch_key = epoch_key(name)
        self._client = client
        self._epoch: int | None = None

    @property
    def epoch(self) -> int | None:
        """The epoch under which this holder acquired the lease; None if it never did, or released it."""
        return self._epoch

    def acquire(self, *, gone: Callable[[str], bool] | None = None) -> int | None:
        """Take the lease if it is free (or ours); return the epoch, or None while somebody else has it.

        `gone` says whether a holder is proven dead, see `process_is_gone`; such a holder's lease counts as free.
        """
        dead = ""
        if gone is not None:
            current = self.current_holder()
            if current is not None and current != self.holder and gone(current):
                dead = current
        answer = _ACQUIRE(self._client, (self.key, self.epoch_key), (self.holder, self._ttl_ms(), dead))
        self._epoch = None if answer is None else int(answer)
        return self._epoch

    def renew(self) -> bool:
        """Hold on for another `ttl_s`; False if the lease is no longer ours."""
        if self._epoch is None:
            return False
        args = (self.holder, self._ttl_ms(), self._epoch)
        return bool(_RENEW(self._client, (self.key, self.epoch_key), args))

    def release(self) -> None:
        """Let go, so that the next holder need not wait; harmless if the lease is not ours."""
        self._epoch = None
        _RELEASE(self._client, (self.key,), (self.holder,))

    def check(self) -> None:
        """Raise `LeaseLost` unless this holder's epoch is the newest."""
        if self._epoch is None:
            raise LeaseLost(f"the lease “{self.name}” is not held")
        _CHECK(self._client, (self.epoch_key,), (self._epoch,))

    def current_holder(self) -> str | None:
        """Return who has the lease now, or None."""
        held = self._client.get(self.key)
        return held.decode() if isinstance(held, bytes) else None

    def _ttl_ms(self) -> int:
        return max(1, int(self.ttl_s * 1000))


def epoch_key(name: str) -> str:
    """Return the key that a fenced script compares with the caller's epoch."""
    return f"em:epoch:{name}"


def new_holder() -> str:
    """Return a holder's name, unique per call, from which the same host can tell whether the process still lives."""
    pid = os.getpid()
    return "|".join((_host(), str(pid), _started(pid) or "?", uuid.uuid4().hex[:12]))


def process_is_gone(holder: str) -> bool:
    """Say whether the process of `holder` is proven dead; False if it lives, or if this host cannot know."""
    host, pid, started = ([*holder.split("|"), "", "", ""])[:3]
    if not pid.isdigit() or started == "?" or host != _host() or host == "?":
        return False
    return _started(int(pid)) != started


def _host() -> str:
    """Return what two processes share only if each can see the other's pid: boot and pid namespace; `?` if unknown."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot:
        return f"{boot.read().strip()}:{os.readlink('/proc/self/ns/pid')}"
    return "?"


def _started(pid: int) -> str | None:
    """Return when the process started, in clock ticks since boot; None if there is none, or only its zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[_STAT_AFTER_NAME]


__all__ = ["Lease", "epoch_key", "new_holder", "process_is_gone"]
