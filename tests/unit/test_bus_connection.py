"""URLs: which are taken, which are refused, and that no password is shown."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import redis

from em_bridge.connection import address, connect, hide_password, translate
from em_bridge.errors import RedisRefused, RedisUnavailable, UsageError


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("redis://example:7000/3", "example:7000"),
        ("rediss://user:secret@example:7000", "example:7000"),
        ("unix:///run/valkey.sock?db=2", "/run/valkey.sock"),
        ("redis+sentinel://:secret@one:26379,two/fleet/1", "fleet"),
        ("redis://[::1]:6379/0", "::1:6379"),
    ],
)
def test_every_kind_of_url_gives_a_client(url: str, place: str) -> None:
    assert address(connect(url)) == place


@pytest.mark.parametrize(
    "url",
    [
        "http://example",
        "example:6379",
        "redis://example:port",
        "redis://example:99999",
        "redis://example/notanumber",
        "redis://example?no_such_option=1",
        "redis://example?decode_responses=1",
        "redis+sentinel://example",
        "redis+sentinel://:secret@example/fleet/x",
        "redis://user:secret@[::1/0",
        "redis://:secret@example:x/0",
        "redis://:12/secret@example/0",
        "redis://u:secret#12@example/0",
        "redis://u:12?secret@example/0",
        "redis+sentinel://:12/secret@example/fleet",
        "rediss://u:12[secret@example/0",
    ],
)
def test_a_wrong_url_is_refused_with_a_hint_and_without_its_password(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        connect(url)
    assert caught.value.exit_code == 2 and "redis://HOST" in (caught.value.hint or "")
    assert "secret" not in str(caught.value)


def test_passwords_are_hidden() -> None:
    assert hide_password("redis://user:se:cr@et@host:1/0") == "redis://user:***@host:1/0"
    assert hide_password("redis://:x@host") == "redis://:***@host"
    assert (
        hide_password("redis+sentinel://h/s?sentinel_password=x&a=b")
        == "redis+sentinel://h/s?sentinel_password=***&a=b"
    )
    assert hide_password("redis://host") == "redis://host"


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("Error 111 connecting to h:1. Connection refused.", "connection refused"),
        (
            "Error while reading from 127.0.0.1:7398 : (104, 'Connection reset by peer')",
            "connection reset by peer",
        ),
        ("Error -2 connecting to nohost:6379. Name or service not known.", "name or service not known"),
        ("Connection closed by server.", "connection closed by server"),
        ("", "connectionerror"),
    ],
)
def test_the_reason_is_said_in_plain_words(raised: str, said: str) -> None:
    found = translate(redis.ConnectionError(raised), "redis://:secret@h:1")
    assert found is not None
    assert found.message.lower() == f"redis at “redis://:***@h:1” cannot be reached: {said}"


def test_errors_say_whether_waiting_helps() -> None:
    for error in (
        redis.ConnectionError("Error 111 connecting to h:1. Connection refused."),
        redis.TimeoutError("Timeout reading from socket"),
        redis.BusyLoadingError("LOADING"),
        redis.ReadOnlyError("READONLY"),
        redis.ResponseError(
            "MISCONF Valkey is configured to save RDB snapshots, but it is unable to persist"
        ),
        redis.ResponseError("UNBLOCKED force unblock from blocking operation, instance state changed"),
        redis.WatchError("A BusyLoadingError occurred while watching one or more keys"),
        redis.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
    ):
        found = translate(error, "redis://h:1")
        assert isinstance(found, RedisUnavailable) and found.retryable and found.exit_code == 3
    for error in (
        redis.AuthenticationError("invalid username-password pair"),
        redis.exceptions.NoPermissionError("this user has no permissions"),
        redis.ResponseError("NOPERM in a script"),
    ):
        found = translate(error, "redis://h:1")
        assert isinstance(found, RedisRefused) and not found.retryable
    assert translate(redis.ResponseError("WRONGTYPE"), "") is None


def test_the_bus_needs_only_redis_msgpack_and_tenacity() -> None:
    """An EM imports it without the rest of what this project is made of."""
    import em_bridge

    modules = sorted(
        path.stem
        for path in Path(em_bridge.__file__).parent.glob("*.py")
        if path.stem not in ("terminal", "cli", "__main__")
    )
    assert len(modules) > 10
    code = f"""
        import importlib, sys
        class Refuse:
            allowed = {{"redis", "msgpack", "tenacity", "hiredis", "em_bridge", "async_timeout"}}
            def find_spec(self, name, path=None, target=None):
                top = name.partition(".")[0]
                if top not in self.allowed and top not in sys.stdlib_module_names:
                    raise ModuleNotFoundError(name, name=name)
        sys.meta_path.insert(0, Refuse())
        for name in {modules!r}:
            importlib.import_module("em_bridge" if name == "__init__" else f"em_bridge.{{name}}")
        import em_bridge
        for name in em_bridge.__all__:
            getattr(em_bridge, name)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
