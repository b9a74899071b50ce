"""The human's pager in the demo: a small HTTP server on loopback that takes what apprise's `json://` sends."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType


class Pager:
    """Context manager; `pages` are the (title, message) pairs that arrived, `url` is the apprise URL to send to."""

    def __init__(self) -> None:
        self.pages: list[tuple[str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, name="pager", daemon=True)

    @property
    def url(self) -> str:
        """Where alerts are to be sent."""
        return f"json://127.0.0.1:{self._server.server_port}/pager"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        pages = self.pages

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                pages.append((body["title"], body["message"]))
                self.send_response(204)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing: the demo prints what arrives."""

        return Handler

    def __enter__(self) -> Pager:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
