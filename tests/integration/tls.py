"""A certificate authority of the test's own, and a TLS proxy before a server that speaks none."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import threading
from pathlib import Path
from types import TracebackType

from tests.tools import needs


def certificates(folder: Path) -> tuple[Path, Path, Path]:
    """Make an authority and a certificate for localhost with openssl; return (authority, certificate, key)."""
    needs("openssl", why="it makes the certificates")
    ca, ca_key = folder / "ca.pem", folder / "ca.key"
    cert, key, request = folder / "server.pem", folder / "server.key", folder / "server.csr"
    names = folder / "names"
    names.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for words in (
        ("req", "-x509", *curve, "-keyout", ca_key, "-out", ca, "-days", "2", "-subj", "/CN=test authority"),
        ("req", *curve, "-keyout", key, "-out", request, "-subj", "/CN=localhost"),
        ("x509", "-req", "-in", request, "-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-out", cert,
         "-days", "2", "-extfile", names),
    ):  # fmt: skip
        done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return ca, cert, key


class TlsProxy:
    """Listens with TLS on `port` and passes everything on to the server."""

    def __init__(self, server_port: int, cert: Path, key: Path) -> None:
        self._server_port = server_port
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(cert, key)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                plain, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(plain,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        # Reading and writing at once on one TLS socket needs care; polling with short timeouts does not.
        try:
            client = self._context.wrap_socket(plain, server_side=True)
        except (ssl.SSLError, OSError):
            plain.close()
            return
        self.connections += 1
        with client, socket.create_connection(("127.0.0.1", self._server_port)) as server:
            client.settimeout(0.002)
            server.settimeout(0.002)
            with contextlib.suppress(OSError, ssl.SSLError):
                while _pass(client, server) and _pass(server, client):
                    pass

    def __enter__(self) -> TlsProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()


def _pass(source: socket.socket, target: socket.socket) -> bool:
    """Pass on what is there; False at the end."""
    try:
        data = source.recv(1 << 16)
    except (TimeoutError, ssl.SSLWantReadError):
        return True
    if data:
        target.settimeout(5)
        target.sendall(data)
        target.settimeout(0.002)
    return bool(data)
