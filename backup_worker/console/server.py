"""Serve the console: one process, threads for its requests, ends cleanly when it is told to.

It listens on this machine's own address, unless there are users who have to log in.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from typing import Any

import waitress

from backup_worker.console import feed
from backup_worker.console.address import checked, is_loopback
from backup_worker.console.app import create_app, warm
from backup_worker.console.live import Live
from backup_worker.runtime import Runtime
from em_bridge.errors import UsageError

log = logging.getLogger(__name__)

THREADS = 8 + feed.MOST_STREAMS
"""Eight for pages; each open stream of events holds one more."""


def serve(runtime: Runtime, listen: str) -> None:
    """Serve until SIGTERM or SIGINT. Raises UsageError for an address that is wrong, taken or not allowed."""
    host, port = checked(listen, runtime.config.schedule.state)
    loopback = is_loopback(host)
    if not loopback:
        log.warning("%s is reachable by others: put a proxy with TLS before it", listen)
    app = create_app(runtime, loopback=loopback)
    try:
        server = waitress.create_server(
            app, host=host, port=port, threads=THREADS, ident=None, clear_untrusted_proxy_headers=True,
            trusted_proxy="127.0.0.1", trusted_proxy_headers={"x-forwarded-for", "x-forwarded-proto"},
        )  # fmt: skip
    except OSError as error:
        raise UsageError(
            f"cannot listen on “{listen}”: {(error.strerror or str(error)).lower()}",
            hint="choose another port with --listen HOST:PORT",
        ) from error
    shared: Live = app.extensions["backup-worker-live"]
    events: feed.Feed = app.extensions["backup-worker-feed"]
    shared.works.start("warm", lambda: warm(app))
    log.info("console on http://%s", listen)
    with _ended_by_signals(events.close):
        try:
            server.run()
        finally:
            server.close()
            shared.close()


@contextlib.contextmanager
def _ended_by_signals(first: Callable[[], None]) -> Iterator[None]:
    """Turn SIGTERM into what Ctrl-C does, behind `first`; waitress then finishes the requests that run."""

    def end(*_: Any) -> None:
        first()
        raise SystemExit(0)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
