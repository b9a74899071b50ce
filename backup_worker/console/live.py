"""What a page works with: the configuration as it is now, Redis if it is there, the snapshots.

One `Live` belongs to an application and is shared by its threads; one `View` belongs to a request. Redis is asked once
at the beginning of a request whether it is there; whatever goes wrong with it later in the request is noted in the
view, and the page says so, instead of failing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import redis.exceptions
from flask import current_app, g

from backup_worker.approval import approvals, changes
from backup_worker.config import ConfigWatch
from backup_worker.console.background import Background
from backup_worker.console.beats import Beats
from backup_worker.console.drift import Drifts
from backup_worker.console.shelf import Shelf
from backup_worker.console.users import Users
from backup_worker.console.weights import Weights
from backup_worker.recovery import breakers
from backup_worker.runtime import Runtime
from em_bridge import clock, connection

if TYPE_CHECKING:
    from redis import Redis

    from backup_worker.config import Config
    from backup_worker.snapshots import Head

SOCKET_TIMEOUT_S = 2.0
"""How long a page waits for Redis: a person who looks at the console while Redis hangs must see that soon."""

Known = TypeVar("Known")


class Live:
    """Configuration, Redis and snapshots of the running console."""

    def __init__(self, runtime: Runtime) -> None:
        self._watch = ConfigWatch(runtime.config.directory)
        self._lock = threading.Lock()
        self._url = runtime.redis_url
        # Never retried: a page that waits is worse than a page with a banner.
        self.client: Redis | None = (
            connection.connect(self._url, retrying=False, socket_timeout_s=SOCKET_TIMEOUT_S)
            if self._url
            else runtime.client
        )
        self.shelf = Shelf()
        self.beats = Beats()
        self.drifts = Drifts()
        self.weights = Weights()
        self.works: Background[Any] = Background("works")
        """What people asked for and did not want to wait for: verifications, restores."""

    @property
    def address(self) -> str:
        """Where Redis is, without its password."""
        return connection.address(self.client) if self.client is not None else "nowhere"

    def config(self) -> tuple[Config, str | None]:
        """Return the configuration in force, and what is wrong with a newer edit."""
        with self._lock:
            self._watch.refresh()
            error = self._watch.error
            return self._watch.current, error.message if error else None

    def runtime(self, config: Config, client: Redis | None) -> Runtime:
        """Return a runtime of `config` on `client`."""
        return Runtime(config, client, self._url)

    def close(self) -> None:
        """Begin nothing any more."""
        self.drifts.close()
        self.works.close()


@dataclass(slots=True)
class View:
    """One request's sight of things. `runtime.client` is None while Redis cannot be reached."""

    live: Live
    runtime: Runtime
    now: float
    redis_problem: str | None
    config_problem: str | None
    _changes: list[changes.Change] | None = None

    @classmethod
    def open(cls, live: Live) -> View:
        """Look at the configuration, and whether Redis is there."""
        config, config_problem = live.config()
        client, problem = live.client, None
        try:
            if client is None:
                problem = "no server is configured"
            else:
                client.ping()
        except redis.exceptions.RedisError as error:
            translated = connection.translate(error, client) if client is not None else None
            problem, client = translated.message if translated else "redis does not answer", None
        return cls(live, live.runtime(config, client), clock.now(), problem, config_problem)

    @property
    def config(self) -> Config:
        """The configuration in force."""
        return self.runtime.config

    @property
    def zone(self) -> str:
        """The schedule's time zone."""
        return self.config.schedule.timezone

    @property
    def pause(self) -> breakers.Pause | None:
        """The pause that holds all recoveries, None if there is none, or while Redis is away."""
        return self.known(lambda client: breakers.paused(client, self.now), None)

    @property
    def heads(self) -> list[Head]:
        """The snapshots, oldest first."""
        return self.live.shelf.heads(self.runtime.repository)

    @property
    def changes(self) -> list[changes.Change]:
        """Every change of weights, rules or charter, the newest first; asked once a request."""
        if self._changes is None:
            rules = approvals.rules(self.config, self.now)
            self._changes = self.known(lambda client: changes.all_changes(client, rules), [])[::-1]
        return self._changes

    def known(self, ask: Callable[[Redis], Known], otherwise: Any) -> Known:
        """Return what `ask` learns from Redis, or `otherwise` (an empty thing of that kind) while it is away."""
        client, nothing = self.runtime.client, cast(Known, otherwise)
        if client is None:
            return nothing
        try:
            return ask(client)
        except redis.exceptions.RedisError as error:
            translated = connection.translate(error, client)
            self.redis_problem = translated.message if translated else f"redis: {error}"
            return nothing


def live() -> Live:
    """Return the application's `Live`."""
    found: Live = current_app.extensions["backup-worker-live"]
    return found


def view() -> View:
    """Return the request's `View`."""
    if "view" not in g:
        g.view = View.open(live())
    found: View = g.view
    return found


def users() -> Users:
    """Return the console's users, of the configuration in force."""
    config, _ = live().config()
    return Users(config.schedule.state / "console")
