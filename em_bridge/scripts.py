"""Lua scripts: sent once, then called by their hash; the fence that keeps a deposed holder's writes out.

Promise: a `Script` runs as one step on the server. A fenced script does nothing at all, and raises `LeaseLost`, when a
newer holder of the lease exists. What a kept script has answered outlives a fail-over (see `replicas`); it may be
repeated, and writes something in each call, also where there is nothing to do: what a replica is asked for is the last
write of this connection, and without one it is asked for nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

import redis
from redis import exceptions

from em_bridge import replicas
from em_bridge.errors import LeaseLost

Arg = str | bytes | int | float

FENCE: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return redis.error_reply('FENCED a newer holder has the lease')
end
"""
"""First lines of a fenced script: KEYS[1] is the lease's epoch key, ARGV[1] the caller's epoch."""


class Script:
    """One Lua script. `keys` and `args` are as in EVAL; the answer is redis-py's."""

    def __init__(self, lua: str, *, fenced: bool = False, kept: bool = False) -> None:
        self.lua = FENCE + lua if fenced else lua
        self.kept = kept
        self.sha = hashlib.sha1(self.lua.encode(), usedforsecurity=False).hexdigest()

    def __call__(self, client: redis.Redis, keys: Sequence[str] = (), args: Sequence[Arg] = ()) -> Any:
        """Run the script. Raises `LeaseLost` if it is fenced and the epoch has passed, else what redis-py raises."""
        execute = replicas.kept(client) if self.kept else client.execute_command
        try:
            try:
                return execute("EVALSHA", self.sha, len(keys), *keys, *args)
            except exceptions.NoScriptError:
                return execute("EVAL", self.lua, len(keys), *keys, *args)
        except exceptions.ResponseError as error:
            if "FENCED" in str(error):
                raise LeaseLost("a newer holder has the lease; the write was refused") from None
            raise
