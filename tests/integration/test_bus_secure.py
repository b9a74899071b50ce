"""TLS, users and unix sockets by URL; and a password is nowhere to be read."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
import redis

from em_bridge import Agent, ExecutionManager, Publisher, streams
from em_bridge.connection import connect
from em_bridge.errors import RedisRefused, RedisUnavailable
from tests.integration.conftest import ValkeyServer, free_port
from tests.integration.processes import EM_BRIDGE, Process, em_bridge, eventually
from tests.integration.tls import TlsProxy, certificates

pytestmark = pytest.mark.valkey

PASSWORD = "s3cr3t/w0rd?#@[:&%"


def works(url: str, client: redis.Redis, folder: Path) -> None:
    """Publish, send, route and receive through `url`; what comes is looked at through `client`."""
    folder.mkdir()
    with Publisher(url) as em:
        em.agent_state("moe", "ALIVE")
    assert client.xlen(streams.AGENT_STATE) >= 1
    with (
        ExecutionManager(url, message_log=folder / "log") as manager,
        Agent("z", url, outbox=folder / "z") as z,
        Agent("jay", url, outbox=folder / "jay") as jay,
    ):
        assert manager.wait_until_leading(10)
        eventually(lambda: client.sismember(streams.SEEN, "jay"))
        for number in range(20):
            z.send("jay", b"%d" % number)
        for number in range(20):
            message = jay.receive(10)
            assert message is not None and message.payload == b"%d" % number
            jay.ack(message)


# TLS


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return certificates(tmp_path_factory.mktemp("pki"))


def test_everything_works_over_tls(
    locked_valkey: ValkeyServer, tmp_path: Path, pki: tuple[Path, Path, Path]
) -> None:
    ca, cert, key = pki
    with TlsProxy(locked_valkey.port, cert, key) as proxy:
        url = f"rediss://:{quote('correct horse')}@localhost:{proxy.port}/0?ssl_ca_certs={ca}"
        works(url, locked_valkey.client(), tmp_path / "work")
        assert proxy.connections >= 5


def test_a_server_whose_certificate_is_not_trusted_gets_no_password(
    locked_valkey: ValkeyServer, pki: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    ca, cert, key = pki
    (tmp_path / "other").mkdir()
    stranger, _, _ = certificates(tmp_path / "other")
    with TlsProxy(locked_valkey.port, cert, key) as proxy:
        for options in (f"?ssl_ca_certs={stranger}", ""):
            url = f"rediss://:secret@localhost:{proxy.port}/0{options}"
            with (
                pytest.raises(RedisUnavailable, match="certificate") as caught,
                Publisher(url, patience_s=0) as em,
            ):
                em.agent_state("z", "DEAD")
            assert "secret" not in str(caught.value)
        # The name must be right as well.
        url = f"rediss://:secret@127.0.0.2:{proxy.port}/0?ssl_ca_certs={ca}"
        with pytest.raises(RedisUnavailable), Publisher(url, patience_s=0) as em:
            em.agent_state("z", "DEAD")
        assert proxy.connections == 0


# users and sockets


def test_a_user_and_a_password_of_any_characters_open_a_unix_socket_and_a_port(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    socket = tmp_path / "valkey.sock"
    server = ValkeyServer(tmp_path_factory.mktemp("unix"), options={"unixsocket": str(socket)})
    try:
        client = server.client()
        client.acl_setuser(
            "em+user", enabled=True, passwords=[f"+{PASSWORD}"], keys=["*"], commands=["+@all"]
        )
        login = f"{quote('em+user', safe='')}:{quote(PASSWORD, safe='')}"
        for number, url in enumerate(
            (f"redis://{login}@127.0.0.1:{server.port}/0", f"unix://{login}@{socket}?db=0")
        ):
            assert connect(url).acl_whoami() == "em+user"
            works(url, client, tmp_path / str(number))
        with (
            pytest.raises(RedisRefused) as caught,
            Publisher(f"unix://x:{quote(PASSWORD, safe='')}@{socket}") as em,
        ):
            em.agent_state("z", "DEAD")
        assert PASSWORD not in str(caught.value)
        with (
            pytest.raises(RedisUnavailable, match=r"no\.sock"),
            Publisher(f"unix://{tmp_path}/no.sock", patience_s=0) as em,
        ):
            em.agent_state("z", "DEAD")
    finally:
        server.close()


# passwords


def test_a_password_is_in_no_output_and_in_no_process_list(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    server = ValkeyServer(tmp_path_factory.mktemp("valkey"))
    try:
        server.client().acl_setuser(
            "kari", enabled=True, passwords=[f"+{PASSWORD}"], keys=["*"], commands=["+@all"]
        )
        encoded = quote(PASSWORD, safe="")
        url = f"redis://kari:{encoded}@127.0.0.1:{server.port}/0"
        outbox = str(tmp_path / "o")
        commands: list[list[str]] = [
            ["em", "--message-log", str(tmp_path / "log")],
            ["agent", "jay", "--outbox", outbox],
            ["run", "rick", "--", "sleep", "60"],
            ["log", "--follow"],
        ]
        started = [em_bridge(tmp_path, words[0], url, *words) for words in commands]
        with started[0] as em, started[1] as agent, started[2], started[3]:
            eventually(lambda: server.client().scard(streams.SEEN) == 3)
            told = [part for process in started for part in _process_list(process)]
            server.kill()
            eventually(lambda: "cannot be reached" in em.err.read_text() + agent.err.read_text())
            server.start()
            # The user is gone with the server's memory: refused, and said so.
            eventually(lambda: "refuses us" in em.err.read_text() and "refuses us" in agent.err.read_text())
        dead = f"redis://kari:{encoded}@127.0.0.1:{free_port()}/0"
        wrong = f"redis://kari:{PASSWORD}@127.0.0.1:{server.port}/0"
        for bad in (url, dead, wrong, url + "?nonsense=1"):
            for words in (
                ["log"],
                ["send", "z", "jay", "hi"],
                ["lag"],
                ["export", str(tmp_path / "x")],
                *([["em"]] if bad != dead else []),
            ):
                done = subprocess.run(
                    [EM_BRIDGE, *words], env=os.environ | {"REDIS_URL": bad}, capture_output=True, text=True,
                    check=False, timeout=30,
                )  # fmt: skip
                assert done.returncode in (2, 3), (words, done)
                told += [done.stdout, done.stderr]
        told += [path.read_text() for path in [*tmp_path.glob("*.err"), *tmp_path.glob("*.out")]]
        told += [path.read_text() for path in (tmp_path / "log").glob("*.log")]
        assert len(told) > 40 and any("cannot be reached" in text for text in told)
        for text in told:
            assert PASSWORD not in text and encoded not in text and "w0rd" not in text, text
    finally:
        server.close()


def _process_list(process: Process) -> list[str]:
    found = psutil.Process(process.process.pid)
    return [json.dumps(one.cmdline()) for one in [found, *found.children(recursive=True)]]
