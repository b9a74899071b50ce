"""A unit of systemd, by `systemctl` (with `--user`, one of the user's own manager).

All processes of the unit's control group belong to the agent, whatever they have forked into. A unit that waits for its
automatic restart is `activating`, so it is not down.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import psutil

from backup_worker.recovery import launch
from backup_worker.recovery.adapters.supervised import (
    ANSWER_WITHIN_S,
    AdapterError,
    Supervised,
    Word,
    processes_of,
    tree_of,
)

DOWN = frozenset({"inactive", "failed"})
"""The other states are `active`, `reloading`, `activating`, `deactivating`, `maintenance`, `refreshing`."""

CGROUPS = tuple(map(Path, ("/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd")))
"""Where the control groups are: version 2 alone, beside version 1, and version 1 alone."""


class SystemdAdapter(Supervised):
    """The unit `unit`."""

    def __init__(self, name: str, root: Path, state: Path, unit: str, *, user: bool = False) -> None:
        super().__init__(name, root, state)
        self.unit, self.user = unit, user
        self._control_group = ""

    def describe(self) -> str:
        """Return the unit's name."""
        return f"systemd's {'user ' if self.user else ''}unit “{self.unit}”"

    def word(self) -> Word:
        """Return its state."""
        # What begins with a dash would be an option.
        lines = self._systemctl(
            "show", "--property=LoadState,ActiveState,SubState,MainPID,ControlGroup", "--", self.unit
        )
        facts = dict(line.split("=", 1) for line in lines.splitlines() if "=" in line)
        if facts.get("LoadState") != "loaded":
            raise AdapterError(
                f"{self.describe()} of agent “{self.name}” is “{facts.get('LoadState', 'unknown')}”",
                hint="correct `start.systemd` in agents.json, or install the unit and `systemctl daemon-reload`",
            )
        # A unit that is down says no more where its processes were, and some of them may have stayed.
        self._control_group = facts.get("ControlGroup") or self._control_group
        state = facts.get("ActiveState", "unknown")
        return Word(
            state not in DOWN, int(facts.get("MainPID") or 0), f"{state} ({facts.get('SubState', '')})"
        )

    def members(self, word: Word) -> list[psutil.Process]:
        """Return the processes of the control group and of the main process."""
        found = {one.pid: one for one in (*tree_of(word.pid), *processes_of(self._in_group()))}
        return list(found.values())

    def _in_group(self) -> list[int]:
        group = self._control_group.strip("/")
        pids: list[int] = []
        for place in (place for top in CGROUPS if group for place, _, _ in os.walk(top / group)):
            # A group goes away with its last process.
            with contextlib.suppress(OSError):
                pids += map(int, (Path(place) / "cgroup.procs").read_text().split())
        return pids

    def ask_stop(self, term_grace_s: float) -> None:
        """Stop it; systemd will not restart it by itself."""
        self._systemctl("stop", "--no-block", "--", self.unit)

    def ask_kill(self) -> None:
        """Kill every process of its control group."""
        self._systemctl("kill", "--signal=KILL", "--", self.unit)

    def ask_start(self) -> None:
        """Start it, also if it has failed too often for systemd's own limit."""
        self._systemctl("reset-failed", "--", self.unit, may_fail=True)
        self._systemctl("start", "--no-block", "--", self.unit)

    def last_end(self) -> str:
        """Return the exit code or signal of its main process, and systemd's own word for it."""
        lines = self._systemctl(
            "show", "--property=ExecMainCode,ExecMainStatus,Result", "--", self.unit, may_fail=True
        )
        facts = dict(line.split("=", 1) for line in lines.splitlines() if "=" in line)
        # As `waitid` has them: 1 is an exit, 2 a signal, 3 a signal with a core dump; 0 is none so far.
        code, status = facts.get("ExecMainCode", "0"), facts.get("ExecMainStatus", "")
        if code == "0" or not status.isdigit():
            return ""
        ended = f"exit code {status}" if code == "1" else launch.signalled(int(status))
        return f"{ended} ({facts.get('Result', '')})"

    def log_lines(self, count: int = 50) -> list[str]:
        """Return its last lines in the journal."""
        unit = f"--user-unit={self.unit}" if self.user else f"--unit={self.unit}"
        try:
            return self._run(
                "journalctl", unit, f"--lines={count}", "--no-pager", "--output=cat"
            ).splitlines()
        except AdapterError:
            # There may be no journal, or no right to read it: not worth failing a recovery for.
            return []

    def _systemctl(self, *arguments: str, may_fail: bool = False) -> str:
        manager = ("--user",) if self.user else ()
        try:
            return self._run("systemctl", *manager, "--no-pager", "--no-ask-password", *arguments)
        except AdapterError:
            if may_fail:
                return ""
            raise

    def _run(self, *command: str) -> str:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=ANSWER_WITHIN_S, check=True,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.CalledProcessError as error:
            what = " ".join((error.stderr or error.stdout or f"exit code {error.returncode}").split())
        except (OSError, subprocess.TimeoutExpired) as error:
            what = str(error)
        else:
            return done.stdout
        raise AdapterError(
            f"“{' '.join(command)}” failed for agent “{self.name}”: {what}",
            hint="try the command by hand; `start.systemd.user` is for units of the user's own manager",
        )
