"""Supervisors for the tests of the adapters: ours, a real supervisord, systemd, a small Docker API.

Where no Docker runs it is only played: what it says has the shape of the real one, and the processes behind it are
real.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

import psutil
import pytest

from tests.integration.systemds import RealSystemd, SmallSystemd
from tests.living_fleet import wait_for

PASSWORD = "se:cret"  # not one of anybody


class Supervisor(Protocol):
    """Keeps agents; `start_of` is the agent's `start` in agents.json."""

    def keep(self, name: str, command: list[str], root: Path, env: Mapping[str, str]) -> None: ...

    def start_of(self, name: str) -> dict[str, Any]: ...

    def go_away(self) -> None:
        """Stop answering, but leave the agents alone."""

    def close(self) -> None: ...


class Ourselves:
    """No supervisor: the command is run by ourselves."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands: dict[str, list[str]] = {}

    def keep(self, name: str, command: list[str], root: Path, env: Mapping[str, str]) -> None:
        self.commands[name] = command

    def start_of(self, name: str) -> dict[str, Any]:
        return {"command": self.commands[name]}

    def go_away(self) -> None: ...

    def close(self) -> None: ...


class RealSupervisord:
    """supervisord itself, on a unix socket, or with `tcp` on a port with a password."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, tcp: int = 0) -> None:
        self.folder = folder / "supervisord"
        self.folder.mkdir()
        # The path of a unix socket may have about 100 characters, a test's folder has more.
        self.socket = Path(f"/tmp/supervisord-{os.getpid()}-{id(self):x}.sock")
        self.tcp = tcp
        self.programs = ""
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def server(self) -> str:
        return (
            f"http://user:{PASSWORD.replace(':', '%3A')}@127.0.0.1:{self.tcp}"
            if self.tcp
            else f"unix://{self.socket}"
        )

    def keep(
        self, name: str, command: list[str], root: Path, env: Mapping[str, str], options: str = ""
    ) -> None:
        environment = ",".join(f'{key}="{value}"' for key, value in env.items())
        self.programs += (
            f"[program:{name}]\ncommand={shlex.join(command)}\ndirectory={root}\nenvironment={environment}\n"
            "autostart=false\nautorestart=false\nstartsecs=0\nredirect_stderr=true\n" + options
        )
        self.start()

    def start(self) -> None:
        self.close()
        own = f"[unix_http_server]\nfile={self.socket}\n"
        if self.tcp:
            own = f"[inet_http_server]\nport=127.0.0.1:{self.tcp}\nusername=user\npassword={PASSWORD}\n"
        conf = self.folder / "supervisord.conf"
        conf.write_text(
            f"[supervisord]\nnodaemon=true\nlogfile={self.folder}/log\npidfile={self.folder}/pid\n"
            f"childlogdir={self.folder}\n" + own + "[rpcinterface:supervisor]\n"
            "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface\n" + self.programs
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "supervisor.supervisord", "-c", str(conf)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        log = self.folder / "log"
        wait_for(lambda: log.exists() and "supervisord started" in log.read_text(), "supervisord")

    def start_of(self, name: str) -> dict[str, Any]:
        return {"supervisord": {"program": name, "server": self.server}}

    def go_away(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        if self.process is not None:
            for child in psutil.Process(self.process.pid).children() if self.process.poll() is None else ():
                child.kill()
            self.process.kill()
            self.process.wait()
        self.socket.unlink(missing_ok=True)
        (self.folder / "log").unlink(missing_ok=True)


class SmallDocker:
    """The part of the Docker API that is used, on a unix socket: containers are plain processes of this host."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.socket = Path(f"/tmp/docker-{os.getpid()}-{id(self):x}.sock")
        self.containers: dict[str, Container] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer()

            def do_POST(self) -> None:
                self._answer()

            def _answer(self) -> None:
                status, body = outer.answer(self.command, self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

            def address_string(self) -> str:
                return "unix"

        class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True

        self.server = Server(str(self.socket), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def keep(self, name: str, command: list[str], root: Path, env: Mapping[str, str]) -> None:
        self.containers[f"agent-{name}"] = Container(
            command, root, dict(env), self.folder / f"{name}.docker.log"
        )

    def start_of(self, name: str) -> dict[str, Any]:
        return {"docker": {"container": f"agent-{name}", "server": f"unix://{self.socket}"}}

    def answer(self, method: str, path: str) -> tuple[int, bytes]:
        parts = urlsplit(path)
        _, _, name, action = parts.path.split("/")
        options = {key: values[0] for key, values in parse_qs(parts.query).items()}
        if name not in self.containers:
            return 404, json.dumps({"message": f"No such container: {name}"}).encode()
        status, answer = getattr(self.containers[name], f"{method.lower()}_{action}")(options)
        if isinstance(answer, bytes):
            return status, answer
        return status, json.dumps(answer).encode() if answer is not None else b""

    def go_away(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.socket.unlink()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.socket.unlink(missing_ok=True)
        for container in self.containers.values():
            container.end_all()


class Container:
    """One container: a process whose tree ends with it, as a pid namespace does."""

    def __init__(self, command: list[str], root: Path, env: dict[str, str], log: Path) -> None:
        self.command, self.root, self.env, self.log = command, root, env, log
        self.process: subprocess.Popen[bytes] | None = None
        self.tree: list[psutil.Process] = []

    def runs(self) -> bool:
        if self.process is None:
            return False
        if self.process.poll() is None:
            main = psutil.Process(self.process.pid)
            self.tree += [one for one in main.children(recursive=True) if one not in self.tree]
            return True
        self.end_all()
        return False

    def end_all(self) -> None:
        for one in self.tree:
            if one.is_running():
                one.kill()
        self.tree = []
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def get_json(self, _: dict[str, str]) -> tuple[int, Any]:
        runs = self.runs()
        state = {
            "Status": "running" if runs else "exited" if self.process else "created",
            "Running": runs, "Paused": False, "Restarting": False, "Dead": False, "OOMKilled": False,
            "Pid": self.process.pid if runs and self.process else 0,
            "ExitCode": 0 if runs or not self.process else self.process.returncode,
        }  # fmt: skip
        return 200, {"Id": "0" * 64, "State": state, "Config": {"Tty": False}}

    def get_top(self, _: dict[str, str]) -> tuple[int, Any]:
        if not self.runs():
            return 409, {"message": "container is not running"}
        assert self.process is not None
        pids = [self.process.pid, *(one.pid for one in self.tree)]
        return 200, {"Titles": ["UID", "PID", "CMD"], "Processes": [["root", str(pid), "?"] for pid in pids]}

    def get_logs(self, options: dict[str, str]) -> tuple[int, bytes]:
        lines = self.log.read_bytes().splitlines(keepends=True) if self.log.exists() else []
        frames = (
            bytes([1, 0, 0, 0]) + len(line).to_bytes(4, "big") + line
            for line in lines[-int(options["tail"]) :]
        )
        return 200, b"".join(frames)

    def post_start(self, _: dict[str, str]) -> tuple[int, Any]:
        if self.runs():
            return 304, None
        try:
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    self.command, cwd=self.root, env={**os.environ, **self.env}, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            return 400, {"message": f"failed to create task for container: {error}"}
        return 204, None

    def post_stop(self, options: dict[str, str]) -> tuple[int, Any]:
        if not self.runs():
            return 304, None
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(int(options["t"]))
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process.wait()
        self.runs()
        return 204, None

    def post_kill(self, _: dict[str, str]) -> tuple[int, Any]:
        if not self.runs():
            return 409, {"message": "container is not running"}
        self.end_all()
        return 204, None


DOCKER = Path(os.environ.get("DOCKER_SOCKET", "/var/run/docker.sock"))


class RealDocker:
    """Containers of the engine that runs here, on the host's own files and pids; skips the test where none runs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Cut off by itself: the engine is not ours to stop.
        self.socket = Path(f"/tmp/docker-{os.getpid()}-{id(self):x}.sock")
        self.made: set[str] = set()
        if not shutil.which("docker") or not DOCKER.is_socket():
            pytest.skip(f"no engine of Docker runs here, at {DOCKER}")
        self.socket.symlink_to(DOCKER)
        nothing = bytes(10240)  # an archive without a file
        self._docker("import", "-", "agent-backup-nothing", input=nothing)

    def _docker(self, *words: str, **options: Any) -> None:
        argv = ["docker", "--host", f"unix://{DOCKER}", *words]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, **options)

    def _name(self, name: str) -> str:
        return f"{self.socket.stem}-{name}"

    def keep(self, name: str, command: list[str], root: Path, env: Mapping[str, str]) -> None:
        self._forget(name)
        options = ["--pid=host", "--network=host", f"--workdir={root}"]
        options += [f"--env={key}={value}" for key, value in env.items()]
        own = [one for one in Path("/").iterdir() if one.is_dir() and one.name not in ("dev", "proc", "sys")]
        options += [f"--volume={one}:{one}" for one in own]
        self._docker("create", "--name", self._name(name), *options, "agent-backup-nothing", *command)
        self.made.add(name)

    def _forget(self, name: str) -> None:
        if name in self.made:
            self._docker("rm", "--force", self._name(name))

    def start_of(self, name: str) -> dict[str, Any]:
        return {"docker": {"container": self._name(name), "server": f"unix://{self.socket}"}}

    def go_away(self) -> None:
        self.socket.unlink(missing_ok=True)

    def close(self) -> None:
        self.go_away()
        for name in self.made:
            self._forget(name)


KINDS: dict[str, type[Supervisor]] = {
    "command": Ourselves,
    "supervisord": RealSupervisord,
    "systemd": SmallSystemd,
    "systemd, real": RealSystemd,
    "docker": SmallDocker,
    "docker, real": RealDocker,
}
