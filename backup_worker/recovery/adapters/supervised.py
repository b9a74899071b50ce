"""What the adapters of supervisors have in common: the supervisor's word, and the proof that it is true.

A supervisor that says “stopped” knows only the process that it started. So the members of the agent are looked up
before it is told to stop, and what is left of them afterwards is killed; and whatever runs anywhere on this host with
the agent's `AGENT_ID` and `AGENT_ROOT` in its environment is ended as well. An agent whose supervisor does not set
these two loses only this last look: children that had left its process tree before it died cannot be found then.
"""

from __future__ import annotations

import contextlib
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from backup_worker.recovery import processes
from backup_worker.recovery.processes import FenceFailed, Running
from em_bridge import clock
from em_bridge.errors import AgentBackupError

POLL_S = 0.05
START_LOOK_S = 5.0
"""How long a start waits for the pid of the new process; whether it lives is proven by its beats."""

ANSWER_WITHIN_S = 10.0
"""How long a supervisor may take to answer."""


class AdapterError(AgentBackupError):
    """A supervisor could not be asked, or refused: whether the agent runs is unknown."""


@dataclass(frozen=True, slots=True)
class Word:
    """What the supervisor says: whether it runs the agent or is about to, its main process (0: none), its own term."""

    busy: bool
    pid: int
    text: str


class Supervised(ABC):
    """An agent that a supervisor runs. Subclasses translate; what is proven, and in which order, stands here."""

    def __init__(self, name: str, root: Path, state: Path) -> None:
        self.name = name
        # Without a command: only what says that it is this agent is a process of it.
        self.outside = processes.Agent(name, root, (), state)

    @abstractmethod
    def word(self) -> Word:
        """Ask the supervisor; raises AdapterError."""

    @abstractmethod
    def ask_stop(self, term_grace_s: float) -> None:
        """Have it send TERM and start the agent no more; need not wait, and not longer than `term_grace_s` and KILL."""

    @abstractmethod
    def ask_kill(self) -> None:
        """Have it send KILL."""

    @abstractmethod
    def ask_start(self) -> None:
        """Have it start the agent; raises AdapterError if it refuses."""

    @abstractmethod
    def log_lines(self, count: int = 50) -> list[str]:
        """Return the last lines that the supervisor keeps, or nothing."""

    @abstractmethod
    def last_end(self) -> str:
        """Return how its last process has ended, as the supervisor tells it, or nothing."""

    @abstractmethod
    def describe(self) -> str:
        """Return who runs it and as what."""

    def members(self, word: Word) -> list[psutil.Process]:
        """Return the live processes behind the supervisor's word: its main process, and what that one started."""
        return tree_of(word.pid)

    def running(self) -> list[Running]:
        """Return its live processes, those that the supervisor does not know of too."""
        word = self.word()
        found = {one.pid: one for one in processes.find_agent(self.outside)}
        found |= {one.pid: one for one in map(_as_running, self.members(word)) if one is not None}
        if word.busy and not found:
            return [Running(0, f"{self.describe()} is {word.text}")]
        return list(found.values())

    def strangers(self, running: Sequence[Running]) -> list[Running]:
        """Return those that the supervisor did not start."""
        ours = {process.pid for process in self.members(self.word())}
        return [one for one in running if one.pid and one.pid not in ours and _is_alive(one.pid)]

    def stop(self, *, term_grace_s: float) -> list[Running]:
        """Have it stopped, prove it, and end what the supervisor leaves or never knew of; raises FenceFailed."""
        word = self.word()
        members = self.members(word)
        ended = {one.pid: one for one in map(_as_running, members) if one is not None}
        # A stopped process acts on TERM only once it is continued.
        _send(members, signal.SIGCONT)
        self.ask_stop(term_grace_s)
        if not self._wait_until_down(term_grace_s):
            members += [one for one in self.members(self.word()) if one not in members]
            self.ask_kill()
            if not self._wait_until_down(processes.KILL_GRACE_S):
                raise FenceFailed(
                    f"agent “{self.name}” is still {self.word().text}: {self.describe()} could not be stopped",
                    hint="stop it by hand, then recover again",
                )
        _send(members, signal.SIGKILL)
        if not _wait(lambda: not any(map(_lives, members)), processes.KILL_GRACE_S):
            names = ", ".join(str(one.pid) for one in members if _lives(one))
            raise FenceFailed(
                f"agent “{self.name}” is still running and cannot be ended: pid {names}",
                hint="end it by hand (it may belong to another user, or hang in the kernel), then recover again",
            )
        ended |= {one.pid: one for one in processes.fence(self.outside, term_grace_s=term_grace_s)}
        last = self.word()
        if last.busy:
            raise FenceFailed(
                f"agent “{self.name}” was stopped, and is {last.text} again: something starts {self.describe()}",
                hint="find out who starts it, and recover again",
            )
        return list(ended.values())

    def _wait_until_down(self, within_s: float) -> bool:
        return _wait(lambda: not self.word().busy, within_s)

    def start(self, *, redis_url: str) -> int | None:
        """Have it started, and return the pid of its main process; its environment is the supervisor's matter."""
        self.ask_start()
        _wait(lambda: (word := self.word()).pid > 0 or not word.busy, START_LOOK_S)
        word = self.word()
        if not word.busy:
            raise AdapterError(
                f"agent “{self.name}” was started and is {word.text}: {self.describe()}",
                hint=f"its last lines: {' / '.join(self.log_lines(3)) or 'it wrote nothing'}",
            )
        return word.pid or None


def tree_of(pid: int) -> list[psutil.Process]:
    """Return the live process `pid` with its descendants and the rest of its process group; nothing for 0."""
    if pid <= 0:
        return []
    try:
        main = psutil.Process(pid)
        found = [main, *main.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    # A child whose parent has ended is no descendant any more, but has kept its group, if that is the agent's own.
    if _group(pid) == pid:
        known = {one.pid for one in found}
        found += [one for one in psutil.process_iter() if one.pid not in known and _group(one.pid) == pid]
    return [one for one in found if _lives(one)]


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def processes_of(pids: Iterable[int]) -> list[psutil.Process]:
    """Return those of `pids` that are live processes of this host."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    return [one for one in found if _lives(one)]


def _lives(process: psutil.Process) -> bool:
    # `is_running` compares the time of the start: a number that changed hands is not the process any more.
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_alive(pid: int) -> bool:
    return bool(processes_of([pid]))


def _as_running(process: psutil.Process) -> Running | None:
    try:
        return Running(process.pid, " ".join(process.cmdline()) or process.name())
    except psutil.Error:
        return None


def _send(members: Iterable[psutil.Process], signum: signal.Signals) -> None:
    for process in members:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signum)


def _wait(condition: Callable[[], bool], within_s: float) -> bool:
    deadline = clock.monotonic() + within_s
    while not condition():
        if clock.monotonic() >= deadline:
            return False
        clock.sleep(POLL_S)
    return True
