"""A proxy before a server that lets requests through and swallows replies: how a network loses an answer."""

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
