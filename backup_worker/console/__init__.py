"""The web console, with the RQ dashboard at /rq: everything a person on duty needs, and nothing that needs a build.

Promise: it shows what is known and says what is not. While Redis is away, pages answer with what the disk knows under
a banner. Nobody gets in who is not named in the users' file; without users it serves this machine alone. No page
sends a traceback, runs a script that is not ours, or changes anything by GET.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backup_worker.console.app import create_app
    from backup_worker.console.server import serve

__all__ = ["create_app", "serve"]


def __getattr__(name: str) -> Any:
    # Lazily: `backup-worker user` works on the users without Flask.
    if name == "create_app":
        from backup_worker.console.app import create_app

        return create_app
    if name == "serve":
        from backup_worker.console.server import serve

        return serve
    raise AttributeError(name)
