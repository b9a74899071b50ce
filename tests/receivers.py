"""Receivers of alerts for the tests: a phone of our own, a real HTTP receiver and a real SMTP server."""

from __future__ import annotations

import contextlib
import email
import email.policy
import json
import socket
import socketserver
import threading
from dataclasses import dataclass, field
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from backup_worker.alerts.receivers import Sent


@dataclass
class Phone:
    """Stands in for apprise: writes down (url, title, body), and some receivers are out of order."""

    broken: set[str] = field(default_factory=set)
    got: list[tuple[str, str, str]] = field(default_factory=list)

    def __call__(self, url: str, title: str, body: str, severity: str) -> Sent:
        if url in self.broken:
            return Sent(False, url, "FAILURE")
        self.got.append((url, title, body))
        return Sent(True, url, "SUCCESS")

    def titles(self) -> list[str]:
        """Return the titles that came since the last call."""
        titles = [title for _, title, _ in self.got]
        self.got.clear()
        return titles


class _Server:
    """A server in a thread, for a `with` block."""

    server: socketserver.BaseServer

    def __enter__(self) -> Any:
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


class WebHook(_Server):
    """An HTTP receiver. `mode`: `ok`, `error` (500), `close` (hangs up without a word) or `hang` (until released)."""

    def __init__(self) -> None:
        self.mode = "ok"
        self.got: list[dict[str, Any]] = []
        self.requests: list[tuple[str, str, bytes]] = []
        self.release = threading.Event()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                hook.requests.append((self.command, self.path, body))
                if hook.mode == "hang":
                    hook.release.wait(30)
                if hook.mode in ("hang", "close"):
                    self.close_connection = True
                    with contextlib.suppress(OSError):
                        self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if hook.mode == "ok" and self.headers["Content-Type"] == "application/json":
                    hook.got.append(json.loads(body))
                self.send_response(200 if hook.mode == "ok" else 500)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.server = self.http

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.http.server_port}"

    @property
    def url(self) -> str:
        """The apprise URL."""
        return f"json://me:hunter2@{self.place}/alerts"

    def __exit__(self, *why: Any) -> None:
        self.release.set()
        super().__exit__(*why)


class MailServer(_Server):
    """An SMTP server that speaks as RFC 5321 wants it; `mails` are what arrived. It can refuse every recipient."""

    def __init__(self) -> None:
        self.mails: list[EmailMessage] = []
        self.refuses = False
        mails = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self._say("220 test ESMTP")
                while line := self.rfile.readline().decode().strip():
                    word = line.split(" ")[0].upper()
                    if word == "QUIT":
                        self._say("221 bye")
                        return
                    if word == "RCPT" and mails.refuses:
                        self._say("550 no such user")
                    elif word == "DATA":
                        self._say("354 go on")
                        mails.mails.append(self._mail())
                        self._say("250 taken")
                    else:
                        self._say("250 ok")

            def _mail(self) -> EmailMessage:
                lines = []
                while (line := self.rfile.readline()) != b".\r\n":
                    lines.append(line.removeprefix(b".") if line.startswith(b"..") else line)
                return email.message_from_bytes(b"".join(lines), policy=email.policy.default)  # type: ignore[return-value]  # the policy makes it one

            def _say(self, text: str) -> None:
                self.wfile.write(f"{text}\r\n".encode())

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True

        self.server = Server(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        """The apprise URL."""
        port = self.server.server_address[1]  # type: ignore[index]  # an address of IPv4 is a pair
        return f"mailto://127.0.0.1:{port}?from=backup@example.com&to=kari@example.com"
