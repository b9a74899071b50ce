"""Proxies before a server: one swallows replies, one pauses and cuts connections, as a network does."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType


class ReplyThief:
    """Listens on `port`; after `steal_replies_of(word)` the next requests holding `word` are done but not answered."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.stolen = 0
        self._word = b""
        self._left = 0
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def steal_replies_of(self, word: str, *, times: int = 1) -> None:
        with self._lock:
            self._word, self._left = word.encode(), times

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.create_connection(("127.0.0.1", self._server_port))
        doomed = threading.Event()
        threading.Thread(target=self._answer, args=(server, client, doomed), daemon=True).start()
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 20):
                with self._lock:
                    if self._left and self._word in data:
                        self._left -= 1
                        doomed.set()
                server.sendall(data)
        server.close()

    def _answer(self, server: socket.socket, client: socket.socket, doomed: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 20):
                # NOSCRIPT means that nothing was done yet: that answer is not worth stealing.
                if doomed.is_set() and not data.startswith(b"-NOSCRIPT"):
                    with self._lock:
                        self.stolen += 1
                    break
                client.sendall(data)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
        client.close()
        server.close()

    def __enter__(self) -> ReplyThief:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()


class Wire:
    """A connection to the server at `server_port` that can be paused (nothing is lost, nothing moves) and cut."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._open = threading.Event()
        self._open.set()
        self._ends: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def pause(self) -> None:
        """Let nothing through, in either direction, until `go_on`; connections stay open."""
        self._open.clear()

    def go_on(self) -> None:
        """Let everything through again, what has come meanwhile first."""
        self._open.set()

    def cut(self) -> None:
        """Close every connection that there is now; what was under way is lost."""
        with self._lock:
            ends, self._ends = self._ends, set()
        for end in ends:
            _close(end)

    def close(self) -> None:
        """Cut, and take no new connections."""
        self._listener.close()
        self.cut()
        self.go_on()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._join, args=(client,), daemon=True).start()

    def _join(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self._server_port))
        except OSError:
            client.close()
            return
        with self._lock:
            self._ends |= {client, server}
        threading.Thread(target=self._carry, args=(server, client), daemon=True).start()
        self._carry(client, server)

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._open.wait()
                target.sendall(data)
        for end in (source, target):
            _close(end)
        with self._lock:
            self._ends -= {source, target}


def _close(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
