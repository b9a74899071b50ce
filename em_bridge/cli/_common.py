"""What several commands share: the server to talk to, and options."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import redis

RecipientOption = Annotated[
    str | None, typer.Option("--recipient", metavar="AGENT", help="Only messages to this agent.")
]

PATIENCE_S = 5.0
"""A person waits at the prompt: shorter than the EM's patience."""


def server_url(redis_url: str | None, config: Path) -> str | None:
    """Return the URL given, else that of the embedded server of the configuration, if there is one."""
    from em_bridge.nearby import embedded_url

    return redis_url or embedded_url(config)


@contextlib.contextmanager
def reached(redis_url: str | None, config: Path, *, retrying: bool = True) -> Iterator[redis.Redis]:
    """Yield a client whose errors become ours."""
    from em_bridge.connection import connect, translate_errors

    url = server_url(redis_url, config)
    with contextlib.closing(connect(url, retrying=retrying)) as client, translate_errors(client):
        yield client
