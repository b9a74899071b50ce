"""One way to connect: URL, TLS, Sentinel, unix socket, timeouts, and errors that name the server without its password.

Promise: a client made here gives up on a silent server within its socket timeout and never shows a password. A client
with `retrying=False` sends each command at most once: redis-py's own retry would run a command again whose reply was
lost, which doubles whatever is not idempotent. Fails with `UsageError` on a wrong URL and, inside `translate_errors`,
with `RedisUnavailable` or `RedisRefused`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

import redis
import tenacity
from redis import exceptions
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelManagedConnection, SentinelManagedSSLConnection

from em_bridge.errors import AgentBackupError, RedisRefused, RedisUnavailable, UsageError

DEFAULT_URL: Final = "redis://127.0.0.1:6379/0"
SOCKET_TIMEOUT_S: Final = 5.0
MAX_BLOCK_S: Final = 2.0
"""The longest blocking read: well below the socket timeout, or the client mistakes an idle server for a dead one."""

FIRST_PAUSE_S: Final = 0.05
LONGEST_PAUSE_S: Final = 1.0

T = TypeVar("T")

_SCHEMES: Final = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")
_FIXED_OPTIONS: Final = frozenset({"decode_responses", "encoding", "retry_on_timeout", "protocol"})
_URL_HINT: Final = (
    "use redis://HOST:PORT/DB, rediss://…, unix:///PATH or redis+sentinel://HOST:PORT,HOST:PORT/SERVICE/DB"
)
_AWAY_HINT: Final = "check --redis-url or $REDIS_URL, and that the server runs"
_REFUSED_HINT: Final = "check the user and password in --redis-url or $REDIS_URL, and the server's ACL"

# Errors in answers that pass by themselves: loading, a fail-over, a full or read-only disk, no memory.
_PASSING: Final = (
    "LOADING",
    "READONLY",
    "MASTERDOWN",
    "MISCONF",
    "OOM",
    "TRYAGAIN",
    "CLUSTERDOWN",
    "NOREPLICAS",
    # A blocking read on a primary that becomes a replica.
    "UNBLOCKED",
    "BUSY ",
)


def connect(
    url: str | None = None,
    *,
    retrying: bool = True,
    socket_timeout_s: float = SOCKET_TIMEOUT_S,
    client_name: str | None = None,
) -> redis.Redis:
    """Return a client for `url` (default `$REDIS_URL`, else the local server); nothing is sent yet.

    `retrying` repeats a command on a broken connection: only for commands that may run twice. Raises `UsageError` if
    the URL is wrong.
    """
    url = url or os.environ.get("REDIS_URL") or DEFAULT_URL
    parts = _split(url)
    backoff = ExponentialWithJitterBackoff(base=0.05, cap=1.0) if retrying else NoBackoff()
    options: dict[str, Any] = {
        "socket_timeout": socket_timeout_s,
        "socket_connect_timeout": socket_timeout_s,
        "socket_keepalive": True,
        "retry": Retry(backoff, 3 if retrying else 0),
        "client_name": client_name,
        "protocol": 2,
    }
    try:
        if parts.scheme.endswith("+sentinel"):
            return _through_sentinel(url, parts, options)
        if parts.scheme == "unix":
            del options["socket_keepalive"], options["socket_connect_timeout"]
        client = redis.Redis.from_url(url, **options)
        # An unknown option of the query is otherwise only noticed, as a TypeError, by the first command.
        client.connection_pool.connection_class(**client.connection_pool.connection_kwargs)
    except (ValueError, TypeError) as problem:
        raise UsageError(
            f"wrong redis url “{hide_password(url)}”: {_plain(problem)}", hint=_URL_HINT
        ) from None
    return client


def _split(url: str) -> SplitResult:
    shown = hide_password(url)
    # Parsed as it stands, a part of such a password would count as port or path, and be shown in a message.
    if re.match(r"[a-z+]+://[^@]*[/?#\[\]].*@", url) and not url.startswith("unix:"):
        raise UsageError(
            f"wrong redis url “{shown}”: user or password hold a character that has a meaning in a URL",
            hint="write / as %2F, ? as %3F, # as %23, [ as %5B, ] as %5D, @ as %40; " + _URL_HINT,
        )
    try:
        parts = urlsplit(url)
    except ValueError as problem:
        raise UsageError(f"wrong redis url “{shown}”: {_plain(problem)}", hint=_URL_HINT) from None
    if parts.scheme not in _SCHEMES:
        raise UsageError(
            f"wrong redis url “{shown}”: its scheme is none of {', '.join(_SCHEMES)}", hint=_URL_HINT
        )
    database = parts.path.strip("/")
    if parts.scheme in ("redis", "rediss") and database and not database.isdigit():
        raise UsageError(f"wrong redis url “{shown}”: “{database}” is not a database number", hint=_URL_HINT)
    fixed = sorted(_FIXED_OPTIONS & parse_qs(parts.query).keys())
    if fixed:
        raise UsageError(
            f"wrong redis url “{shown}”: the option “{fixed[0]}” cannot be chosen", hint=_URL_HINT
        )
    return parts


def _through_sentinel(url: str, parts: SplitResult, options: dict[str, Any]) -> redis.Redis:
    """Return a client that asks the Sentinels for the present primary on each new connection."""
    login, _, places = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    sentinels = []
    for place in places.split(","):
        host, _, port = place.rpartition(":") if re.search(r":\d+\Z", place) else (place, "", "26379")
        sentinels.append((host.strip("[]"), int(port)))
    service, _, database = parts.path.strip("/").partition("/")
    if not service or not all(host for host, _ in sentinels):
        raise ValueError("it names no service, or a Sentinel without a host")
    if database and not database.isdigit():
        raise ValueError(f"“{database}” is not a database number")
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    unknown = sorted(query.keys() - {"sentinel_username", "sentinel_password"})
    if unknown:
        raise ValueError(f"unknown option “{unknown[0]}”")
    # A Sentinel that does not answer is not asked again: the next one is.
    guard: dict[str, Any] = {"socket_timeout": options["socket_timeout"], "protocol": 2}
    guard |= {"socket_connect_timeout": options["socket_connect_timeout"], "retry": Retry(NoBackoff(), 0)}
    guard |= {key.removeprefix("sentinel_"): value for key, value in query.items()}
    data = dict(
        options, db=int(database or 0), username=unquote(user) or None, password=unquote(password) or None
    )
    if parts.scheme == "rediss+sentinel":
        guard["ssl"] = data["ssl"] = True
    # redis-py has no annotations for Sentinel.
    make: Any = Sentinel
    data["connection_class"] = _SentinelTlsConnection if "ssl" in data else _SentinelConnection
    client: redis.Redis = make(sentinels, sentinel_kwargs=guard, **data).master_for(service)
    return client


class _Resolving:
    """Asks the Sentinels before each reconnection, also one in the middle of a command that is tried again.

    redis-py 8.1 asks only on a connection's first use: a command with many tries would try a dead primary to the last.
    """

    def connect_check_health(self: Any, *args: Any, **options: Any) -> Any:
        if not self._sock:
            self.host, self.port = self.connection_pool.get_master_address()
        return super().connect_check_health(*args, **options)  # type: ignore[misc]  # of the class that it is mixed into


class _SentinelConnection(_Resolving, SentinelManagedConnection):
    """A plain one."""


class _SentinelTlsConnection(_Resolving, SentinelManagedSSLConnection):
    """One over TLS."""


def as_client(url_or_client: str | redis.Redis | None, *, retrying: bool = True) -> redis.Redis:
    """Return the client given, or a new one for the URL given."""
    if url_or_client is None or isinstance(url_or_client, str):
        return connect(url_or_client, retrying=retrying)
    return url_or_client


def hide_password(url: str) -> str:
    """Return `url` with every password in it replaced by `***`."""
    url = re.sub(r"(?<=://)([^/@:]*):(.*)@", r"\1:***@", url)
    return re.sub(r"(password=)[^&]*", r"\1***", url)


def address(client: redis.Redis) -> str:
    """Return where `client` connects to, for messages: `host:port`, a socket's path, or a Sentinel service."""
    pool = client.connection_pool
    service = getattr(pool, "service_name", None)
    if service:
        return str(service)
    place = pool.connection_kwargs
    return str(place.get("path") or f"{place.get('host', 'localhost')}:{place.get('port', 6379)}")


@contextlib.contextmanager
def translate_errors(where: redis.Redis | str = "") -> Iterator[None]:
    """Raise what redis-py raises inside as `RedisUnavailable` or `RedisRefused`, with the address and a hint.

    An error that is neither (a wrong command, a key of another type) passes unchanged.
    """
    try:
        yield
    except exceptions.RedisError as error:
        translated = translate(error, where)
        if translated is None:
            raise
        raise translated from error


def patiently(attempt: Callable[[], T], patience_s: float) -> T:
    """Call `attempt` until it succeeds, with growing pauses, for at most `patience_s`.

    Only `RedisUnavailable` is waited for, and raised in the end; a refusal and every other error are raised at once.
    `attempt` must be harmless to repeat.
    """
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(
            lambda error: isinstance(error, RedisUnavailable) and error.retryable
        ),
        stop=tenacity.stop_after_delay(patience_s),
        wait=tenacity.wait_exponential_jitter(
            multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S, jitter=FIRST_PAUSE_S
        ),
        reraise=True,
    )
    return retrying(attempt)


def translate(error: Exception, where: redis.Redis | str = "") -> AgentBackupError | None:
    """Return our error for one of redis-py, or None if it is not about reaching or entering the server."""
    place = hide_password(where) if isinstance(where, str) else address(where)
    server = f"redis at “{place}”" if place else "redis"
    refused = (exceptions.AuthenticationError, exceptions.AuthorizationError, exceptions.NoPermissionError)
    # Errors inside a transaction or a script keep the server's word at their beginning, but not their class.
    if isinstance(error, refused) or str(error).startswith(("WRONGPASS", "NOAUTH", "NOPERM")):
        return RedisRefused(f"{server} refuses us: {_plain(error)}", hint=_REFUSED_HINT)
    if isinstance(error, (exceptions.ConnectionError, exceptions.TimeoutError)):
        return RedisUnavailable(f"{server} cannot be reached: {_plain(error)}", hint=_AWAY_HINT)
    # What breaks a connection between WATCH and EXEC comes as a WatchError: the whole must be begun anew.
    passing = (
        exceptions.ReadOnlyError,
        exceptions.OutOfMemoryError,
        exceptions.ClusterDownError,
        exceptions.WatchError,
    )
    if isinstance(error, passing) or str(error).startswith(_PASSING):
        return RedisUnavailable(
            f"{server} takes no writes now: {_plain(error)}", hint="look into the server's log"
        )
    return None


def _plain(error: Exception) -> str:
    """Return the first line of an error's text in lower case, without redis-py's “Error 111 connecting to …”."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = re.sub(
        r"\AError( -?\d+)? (while )?(connecting to|reading from|writing to) \S+[ .:]*", "", lines[0]
    )
    text = re.sub(r"\A\(-?\d+, '(.*)'\)\Z", r"\1", text).strip(" .") or "no answer"
    return text[:1].lower() + text[1:]
