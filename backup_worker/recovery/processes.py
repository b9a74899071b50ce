"""Find, end and start the process of an agent on this host.

`find` sees an agent by what a process cannot lose by forking: the `AGENT_ID` and `AGENT_ROOT` it was started with,
the session of the process that we started, and, for one started by hand, its command line together with its working
folder. `fence` returns only when nothing of it is left; a stopped process is continued so that it can obey, and what
ignores TERM is killed. It signals through pidfds, so that a recycled pid is never hit. If something survives,
`FenceFailed` names it, and the caller must not touch the agent's files.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from backup_worker.recovery import launch, proc
from backup_worker.snapshots import disk
from em_bridge import clock
from em_bridge.errors import AgentBackupError

TERM_GRACE_S = 5.0
KILL_GRACE_S = 5.0
LOG_LIMIT_BYTES = 10 * 1024 * 1024
WATCHED_S = 900
"""For how long after its start it is noted how a process ends: as long as its recovery may depend on it."""

_launchers: list[subprocess.Popen[bytes]] = []


class FenceFailed(AgentBackupError):
    """A process of the agent could not be ended, so its files must not be touched."""


@dataclass(frozen=True, slots=True)
class Running:
    """A live process of an agent. A pid of 0: its supervisor is about to start one."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.command[:60]})" if self.pid else self.command


@dataclass(frozen=True, slots=True)
class Agent:
    """What is needed to find and start an agent's process: `root` is absolute, `command` its argument list."""

    name: str
    root: Path
    command: tuple[str, ...] = ()
    state: Path | None = None
    """The state folder: run records and logs live there."""

    @property
    def record_file(self) -> Path | None:
        """Where `start` notes which process it started."""
        return self.state / "run" / f"{self.name}.json" if self.state else None

    @property
    def end_file(self) -> Path | None:
        """Where it is noted how that process has ended."""
        return self.state / "run" / f"{self.name}.end" if self.state else None

    @property
    def log_file(self) -> Path | None:
        """Where the output of the process goes."""
        return self.state / "logs" / f"{self.name}.log" if self.state else None


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The process that we started, made unique: no two of one `boot` have both the same pid and the same start.

    `token` is what it and all its descendants carry in their environment as `AGENT_RUN`.
    """

    pid: int
    started: int
    """When, in clock ticks since the boot: unlike a time of day, a step of the clock does not change it."""
    boot: str
    token: str


def find(name: str, root: Path, *, command: Sequence[str] = (), state: Path | None = None) -> list[Running]:
    """Return the live processes of agent `name`; a zombie is not alive. The caller's own ancestors never count."""
    return find_agent(Agent(name, root, tuple(command), state))


def find_agent(agent: Agent) -> list[Running]:
    """Return the live processes of `agent`; see `find`."""
    spared, look = proc.family(os.getpid()), _Look.of(agent)
    found = []
    for pid in proc.pids():
        if pid in spared:
            continue
        with contextlib.suppress(OSError):
            if _belongs(pid, look) and not proc.is_zombie(pid):
                found.append(Running(pid, " ".join(proc.command_line(pid)) or proc.name(pid)))
    return found


@dataclass(frozen=True, slots=True)
class _Look:
    """What every process is compared with, found out once: the real root, and which arguments are the agent's files."""

    agent: Agent
    session: int | None
    home: str
    own: tuple[bool, ...]

    @classmethod
    def of(cls, agent: Agent) -> _Look:
        home = os.path.realpath(agent.root)
        own = tuple(_is_own_file(Path(home), word) for word in agent.command[1:])
        return cls(agent, _recorded_session(agent), home, own)


def strangers(agent: Agent, running: Iterable[Running]) -> list[Running]:
    """Return those of `running` that do not descend from the process that `start` started last."""
    record = read_record(agent)
    if record is None:
        return []
    session = _recorded_session(agent)
    return [one for one in running if not _descends(one.pid, record, session)]


def _descends(pid: int, record: RunRecord, session: int | None) -> bool:
    try:
        if session is not None and os.getsid(pid) == session:
            return True
        return proc.environment(pid, "AGENT_RUN").get("AGENT_RUN") == record.token
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False


def _belongs(pid: int, look: _Look) -> bool:
    try:
        environment = proc.environment(pid, "AGENT_ID", "AGENT_ROOT")
    except PermissionError:
        environment = {}
    claims, name = environment.get("AGENT_ID"), look.agent.name
    if claims == name and _is_at(environment.get("AGENT_ROOT"), look.home):
        return True
    # One that was started by an agent of ours, but as another agent, is not that agent's child but a life of its own.
    if look.session is not None and claims in (None, name) and os.getsid(pid) == look.session:
        return True
    # Many agents may share one program: who says that it is another one, is.
    if claims not in (None, name):
        return False
    return bool(look.agent.command) and _runs(look, pid)


def _runs(look: _Look, pid: int) -> bool:
    """Tell by its argument list and its working folder whether a process was started as the agent.

    A script's interpreter stands before it, a launcher may have replaced the program by its full path, and a file of
    the agent's own may be named from another folder, if that makes it the same file. A file outside of its root may be
    every agent's program, and proves nothing.
    """
    command = look.agent.command
    line, wanted = proc.command_line(pid), command[1:]
    program, given = line[: len(line) - len(wanted)], line[len(line) - len(wanted) :]
    if not program or not any(_same_program(word, command[0]) for word in (program[0], program[-1])):
        return False
    folder = proc.folder(pid)
    # What the kernel says of a folder is its real path.
    at_home = folder == look.home
    if at_home and list(given) == list(wanted):
        return True
    return (at_home or any(look.own)) and all(
        _is_at(os.path.join(folder, word), os.path.realpath(os.path.join(look.home, expected)))
        if is_file
        else word == expected
        for word, expected, is_file in zip(given, wanted, look.own, strict=True)
    )


def _is_own_file(root: Path, word: str) -> bool:
    path = root / word
    return path.exists() and path.resolve().is_relative_to(root)


def _same_program(word: str, wanted: str) -> bool:
    """Compare names without folder and version: `/usr/bin/python3.11` is `python3`, but `agent.log` is not `agent`."""
    names = [re.sub(r"[\d.]*$", "", os.path.basename(name)) for name in (word, wanted)]
    return names[0] == names[1]


def _is_at(text: str | None, place: str) -> bool:
    """Tell whether the path `text` leads to the real path `place`."""
    return text is not None and (text == place or os.path.realpath(text) == place)


def _recorded_session(agent: Agent) -> int | None:
    """Return the session of the process we started, unless its number now belongs to somebody else."""
    record = read_record(agent)
    if record is None or record.boot != _boot():
        return None
    # The leader may be gone while its children still live in the session; the kernel does not reuse the number
    # of a session that has members.
    return record.pid if proc.started(record.pid) in (None, record.started) else None


def _boot() -> str:
    """Return what a pid means something in: this boot of the machine, and this namespace of pids."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def read_record(agent: Agent) -> RunRecord | None:
    """Return what is known of the process that `start` started, or None."""
    path = agent.record_file
    if path is None:
        return None
    try:
        return RunRecord(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def fence(agent: Agent, *, term_grace_s: float = TERM_GRACE_S) -> list[Running]:
    """End every process of `agent`, and return those that were ended.

    Raises FenceFailed, naming the survivors, if one is still there after KILL.
    """
    ended: dict[int, Running] = {}
    for signum, grace_s in (
        (signal.SIGTERM, term_grace_s),
        (signal.SIGKILL, KILL_GRACE_S),
        (signal.SIGKILL, 1.0),
    ):
        # Found anew for each round: between two looks a process may have forked. Nothing found is looked at twice:
        # a child that is born while its parent is read stands in no list of the first look.
        running = find_agent(agent) or find_agent(agent)
        if not running:
            return list(ended.values())
        ended.update((process.pid, process) for process in running)
        _signal_and_wait(agent, (process.pid for process in running), signum, grace_s)
    survivors = find_agent(agent)
    if survivors:
        names = ", ".join(f"{process.pid} ({process.command[:60]})" for process in survivors)
        raise FenceFailed(
            f"agent “{agent.name}” is still running and cannot be ended: pid {names}",
            hint="end it by hand (it may belong to another user, or hang in the kernel), then recover again",
        )
    return list(ended.values())


def _signal_and_wait(agent: Agent, pids: Iterable[int], signum: signal.Signals, grace_s: float) -> None:
    look = _Look.of(agent)
    poller = select.poll()
    opened: set[int] = set()
    awaited: set[int] = set()
    try:
        for pid in pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                descriptor = os.pidfd_open(pid)
                opened.add(descriptor)
                # The number may have changed hands since it was found; from here on the descriptor holds it.
                if not _belongs(pid, look):
                    continue
                poller.register(descriptor, select.POLLIN)
                awaited.add(descriptor)
                signal.pidfd_send_signal(descriptor, signum)
                # A stopped process acts on TERM only once it is continued.
                signal.pidfd_send_signal(descriptor, signal.SIGCONT)
        deadline = clock.monotonic() + grace_s
        while awaited and (left_s := deadline - clock.monotonic()) > 0:
            for descriptor, _ in poller.poll(left_s * 1000):
                poller.unregister(descriptor)
                awaited.discard(descriptor)
    finally:
        for descriptor in opened:
            os.close(descriptor)


def start(agent: Agent, *, redis_url: str, extra_env: Mapping[str, str] | None = None) -> int:
    """Start `agent` in its root, as the leader of a session of its own, and return its pid.

    Its output is appended to its log file. Raises AgentBackupError if the program or the root does not exist.
    """
    if not agent.command:
        raise AgentBackupError(
            f"agent “{agent.name}” has no start command", hint="write `start` for it in agents.json"
        )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RQ_")}
    # Programs that were installed beside us (`em-bridge`) are found also where our environment is not activated.
    path = os.pathsep.join([environment.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    token = uuid.uuid4().hex
    environment |= {
        "PATH": path,
        "AGENT_RUN": token,
        "AGENT_ID": agent.name,
        "AGENT_ROOT": str(agent.root),
        "REDIS_URL": redis_url,
        **(extra_env or {}),
    }
    program = shutil.which(agent.command[0], path=path) or agent.command[0]
    try:
        pid = _launch(agent, [program, *agent.command[1:]], environment)
    except OSError as error:
        raise AgentBackupError(
            f"cannot start agent “{agent.name}” with “{' '.join(agent.command)}” in “{agent.root}”: "
            f"{(error.strerror or str(error)).lower()}",
            hint="check `start` and `root` of the agent in agents.json",
        ) from error
    _write_record(agent, pid, token)
    return pid


def _launch(agent: Agent, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Start a program by way of `launch`, which stays to see how it ends; raises OSError."""
    if agent.end_file is not None:
        agent.end_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        agent.end_file.unlink(missing_ok=True)
    words = [str(agent.end_file or ""), str(WATCHED_S), str(len(arguments)), *arguments]
    words += [f"{name}={value}" for name, value in environment.items()]
    output = _open_log(agent)
    try:
        launcher = subprocess.Popen(
            [sys.executable, "-I", "-S", launch.__file__],
            cwd=agent.root,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            start_new_session=True,
        )
    finally:
        os.close(output)
    assert launcher.stdin is not None
    assert launcher.stdout is not None
    with launcher.stdin, launcher.stdout:
        launcher.stdin.write(b"".join(os.fsencode(word) + b"\0" for word in words))
        launcher.stdin.close()
        answer = launcher.stdout.readline().split()
    _launchers.append(launcher)
    # Those that have gone meanwhile are no zombies of ours any longer.
    _launchers[:] = [one for one in _launchers if one.poll() is None]
    if len(answer) == 1:
        return int(answer[0])
    raise OSError(int(answer[1]), os.strerror(int(answer[1]))) if answer else OSError("nothing was started")


def last_end(agent: Agent) -> str:
    """Return how the process that `start` started last has ended, or nothing if that is not known."""
    record = read_record(agent)
    try:
        text = agent.end_file.read_text() if agent.end_file is not None else ""
        pid, status = map(int, text.split())
    except (OSError, ValueError):
        return ""
    return launch.described(status) if record is not None and record.pid == pid else ""


def _open_log(agent: Agent) -> int:
    if agent.log_file is None:
        return os.open(os.devnull, os.O_WRONLY)
    agent.log_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if agent.log_file.stat().st_size > LOG_LIMIT_BYTES:
            agent.log_file.replace(agent.log_file.with_suffix(".log.1"))
    return os.open(agent.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _write_record(agent: Agent, pid: int, token: str) -> None:
    if agent.record_file is None:
        return
    agent.record_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Nobody has waited for the process yet, so even one that has ended already is still there to be read.
    record = RunRecord(pid, proc.started(pid) or 0, _boot(), token)
    disk.replace_own(agent.record_file, json.dumps(asdict(record)).encode())


def last_log_lines(agent: Agent, count: int = 50) -> list[str]:
    """Return the last `count` lines that the agent wrote, or nothing if there is no log."""
    if agent.log_file is None:
        return []
    try:
        with agent.log_file.open("rb") as file:
            file.seek(max(0, agent.log_file.stat().st_size - 64 * 1024))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        # There may be no log, or no right to read it: not worth failing a recovery for.
        return []
