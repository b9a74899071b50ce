"""HTTP to a server on this machine: over its unix socket, or over TCP."""

from __future__ import annotations

import http.client
import socket
from urllib.parse import urlsplit


class UnixConnection(http.client.HTTPConnection):
    """An HTTP connection over the unix socket at `path`."""

    def __init__(self, path: str, *, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        """Open the socket; raises OSError."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def connection_to(server: str, timeout_s: float) -> http.client.HTTPConnection:
    """Return a connection to `unix:///path`, `tcp://host:port`, `http://host:port` or `https://…`, not yet opened.

    Raises ValueError for anything else.
    """
    parts = urlsplit(server)
    if parts.scheme == "unix" and parts.path:
        return UnixConnection(parts.path, timeout=timeout_s)
    if parts.scheme in ("tcp", "http") and parts.hostname:
        return http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=timeout_s)
    if parts.scheme == "https" and parts.hostname:
        return http.client.HTTPSConnection(parts.hostname, parts.port or 443, timeout=timeout_s)
    raise ValueError(f"“{parts.scheme}://…” is not the address of a server")


def without_password(server: str) -> str:
    """Return the address as it may be shown."""
    parts = urlsplit(server)
    return server if parts.password is None else server.replace(f":{parts.password}@", ":***@", 1)
