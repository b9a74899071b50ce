"""Writes that outlive a fail-over: behind Sentinel, an answer counts only when a replica has the write, too.

Promise: what `kept` runs returns the server's answer only once a replica has confirmed that write, or once a majority
of the Sentinels agrees that this server is the primary and that no replica lives which they could promote instead.
Else it raises what a server with `min-replicas-to-write` would answer (`NOREPLICAS`), and whether the write stands is
unknown: only for commands that may be repeated, and that write something each time. Without Sentinel nobody is
promoted, and nothing is waited for.

A replica confirms what it has in memory. Of a primary and a replica that lose their power together, each keeps what its
own append-only file has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import redis
from redis import exceptions
from redis.sentinel import SentinelConnectionPool

GLANCE_MS: Final = 50
"""How long the first wait for a replica is: longer than one that keeps up ever takes."""
WAIT_MS: Final = 1000
"""How long a replica that lives, but lags behind, is waited for; well below the socket timeout."""


def kept(client: redis.Redis) -> Callable[..., Any]:
    """Return what runs a command as `client.execute_command` does, and answers when its write outlives a fail-over."""
    # redis-py has no annotations for connections.
    pool: Any = client.connection_pool
    if not isinstance(pool, SentinelConnectionPool):
        return client.execute_command

    def execute(*command: Any) -> Any:
        # WAIT speaks of the connection that it comes by, so both take the same, and neither is repeated on another.
        connection: Any = pool.get_connection()
        try:
            answer = _ask(connection, *command)
            if (
                _ask(connection, "WAIT", 1, GLANCE_MS)
                or _is_alone(pool, (connection.host, connection.port))
                or _ask(connection, "WAIT", 1, WAIT_MS)
            ):
                return answer
        except exceptions.ResponseError:
            raise
        except BaseException:
            connection.disconnect()
            raise
        else:
            # Perhaps another server is the primary by now, and this one has not been told: the next try asks anew.
            connection.disconnect()
            raise exceptions.ResponseError("NOREPLICAS no replica has confirmed the write")
        finally:
            pool.release(connection)

    return execute


def _ask(connection: Any, *command: Any) -> Any:
    connection.send_command(*command)
    return connection.read_response()


def _is_alone(pool: Any, primary: tuple[str, int]) -> bool:
    """Return whether a majority of Sentinels takes `primary` for the primary, and none of its replicas for alive."""
    service = pool.service_name
    for sentinel in pool.sentinel_manager.sentinels:
        try:
            # One that is cut off from the others does not know whom they promote.
            sentinel.execute_command("SENTINEL", "CKQUORUM", service)
            host, port = sentinel.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)
            replicas = sentinel.sentinel_slaves(service)
        except (exceptions.RedisError, OSError):
            continue
        promoted = (host.decode(), int(port))
        return promoted == primary and all(replica["is_sdown"] for replica in replicas)
    return False
