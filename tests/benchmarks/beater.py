"""The least agent that can be recovered: it beats at once and again, with nothing imported that takes long to load.

Run as `python -I -S beater.py`; what it costs is the agents' own time, and is taken off the figures.
"""

import os
import socket
import time
from urllib.parse import unquote, urlsplit

PAUSE_S = 0.02
LATER_S = 1.0


def text(value: str) -> bytes:
    """Return msgpack of a text of up to 255 bytes."""
    raw = value.encode()
    return bytes((0xD9, len(raw))) + raw


def command(*words: bytes) -> bytes:
    """Return a Redis command as it goes over the wire."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


def connected(url: str) -> socket.socket:
    """Return a connection to the server at `url` (a unix socket, or TCP), logged in."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        link = socket.socket(socket.AF_UNIX)
        link.connect(unquote(parts.path))
    else:
        link = socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 6379))
    if parts.password:
        link.sendall(
            command(b"AUTH", *([parts.username.encode()] if parts.username else []), parts.password.encode())
        )
        link.recv(1000)
    return link


def main() -> None:
    """Beat three times at once, then every second."""
    link = connected(os.environ["REDIS_URL"])
    agent, incarnation = os.environ["AGENT_ID"], f"{os.getpid()}-{time.time_ns()}"
    number = 0
    while True:
        number += 1
        body = b"\x83" + text("agent") + text(agent) + text("incarnation") + text(incarnation)
        body += text("seq") + b"\xce" + number.to_bytes(4, "big")
        words = (b"XADD", b"em:heartbeats", b"*", b"type", b"heartbeat", b"body", body)
        link.sendall(command(*words))
        link.recv(1000)
        time.sleep(PAUSE_S if number < 3 else LATER_S)


if __name__ == "__main__":
    main()
