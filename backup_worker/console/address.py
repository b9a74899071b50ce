"""Where the console may listen: on this machine's own address, unless there are users who have to log in.

Known without Flask, so that `up` can refuse what its console would refuse, once, instead of starting it for ever.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path

from backup_worker.console.users import Users
from em_bridge.errors import UsageError

_LISTEN_HINT = "write it as HOST:PORT, for example 127.0.0.1:8080"


def parse_listen(listen: str) -> tuple[str, int]:
    """Return host and port; raises UsageError."""
    host, separator, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"“{listen}” is not an address to listen on", hint=_LISTEN_HINT)
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def checked(listen: str, state: Path) -> tuple[str, int]:
    """Return host and port. Raises UsageError for what is no address, or open to others while there are no users."""
    host, port = parse_listen(listen)
    if not is_loopback(host) and not Users(state / "console").names():
        raise UsageError(
            f"the console has no users, so it does not listen on “{listen}”",
            hint="add one with `backup-worker user add NAME`, or listen on 127.0.0.1",
        )
    return host, port
