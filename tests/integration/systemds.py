"""systemd for the tests of its adapter: a small `systemctl` everywhere, and the real thing where it may run.

The real one is a user's manager with a journal of its own, in control groups and a `/run` of its own: it takes root,
and touches nothing of the host's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from backup_worker.recovery.adapters import systemd
from tests.living_fleet import wait_for

PROGRAMS = Path("/usr/lib/systemd")
HIERARCHIES = [place for place in systemd.CGROUPS if (place / "cgroup.procs").exists()]

SYSTEMCTL = '''#!%s
import json, os, pathlib, signal, subprocess, sys
import psutil

units = pathlib.Path(%r)
words = [word for word in sys.argv[1:] if not word.startswith("-")]
verb, unit = words[0], words[-1]
file = units / (unit + ".json")
if not units.exists():
    sys.exit("Failed to connect to bus: Host is down")
if not file.exists():
    if verb == "show":
        print("LoadState=not-found\\nActiveState=inactive\\nSubState=dead\\nMainPID=0\\nControlGroup=")
        sys.exit(0)
    print(f"Failed to {verb} {unit}: Unit {unit} not found.", file=sys.stderr)
    sys.exit(5)
facts = json.loads(file.read_text())

def alive(process):
    return process.status() != psutil.STATUS_ZOMBIE

def members():
    """Those that a control group holds: whatever descends from the start, known by its invocation."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("INVOCATION_ID") == facts.get("invocation", "none") and alive(process):
                found.append(process)
        except (psutil.Error, OSError):
            pass
    return found

def send(signum):
    for process in members():
        try:
            process.send_signal(signum)
            if signum == signal.SIGTERM:
                process.send_signal(signal.SIGCONT)
        except psutil.Error:
            pass

def keep():
    file.write_text(json.dumps(facts))

if verb == "show":
    inside = members()
    main = [one for one in inside if one.pid == facts.get("pid")]
    state = "active" if main else "inactive"
    if facts.get("stopping"):
        state = "deactivating" if inside else "inactive"
    group = pathlib.Path(%r) / "system.slice" / unit
    group.mkdir(parents=True, exist_ok=True)
    (group / "cgroup.procs").write_text("".join(f"{one.pid}\\n" for one in inside))
    print("LoadState=loaded", f"ActiveState={state}", "SubState=running", sep="\\n")
    print(f"MainPID={main[0].pid if main else 0}", f"ControlGroup=/system.slice/{unit}", sep="\\n")
    status = facts.get("status")
    print(f"ExecMainCode={0 if status is None else 1 if status >= 0 else 2}")
    print(f"ExecMainStatus={abs(status or 0)}")
elif verb == "start":
    facts |= {"stopping": False, "invocation": os.urandom(8).hex()}
    log = open(units / (unit + ".log"), "ab")
    env = {**os.environ, **facts["env"], "INVOCATION_ID": facts["invocation"]}
    facts.pop("status", None)
    started, told = os.pipe()
    if os.fork() == 0:
        os.setsid()
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        try:
            child = subprocess.Popen(facts["command"], cwd=facts["root"], env=env, stdout=log, stderr=log, stdin=-3,
                                     start_new_session=True)
            facts["pid"] = child.pid
        except OSError as error:
            log.write(str(error).encode())
            facts["pid"] = 0
        keep()
        os.close(told)
        if facts["pid"]:
            status = child.wait()
            facts = json.loads(file.read_text()) | {"status": status}
            keep()
        os._exit(0)
    os.close(told)
    os.read(started, 1)
elif verb == "stop":
    facts["stopping"] = True
    keep()
    send(signal.SIGTERM)
elif verb == "kill":
    send(signal.SIGKILL)
'''

JOURNALCTL = """#!/bin/sh
for word in "$@"; do
  case "$word" in
    --unit=*) unit=${word#--unit=} ;;
    --lines=*) lines=${word#--lines=} ;;
  esac
done
exec tail -n "$lines" %s/"$unit".log
"""


class SmallSystemd:
    """A `systemctl` and a `journalctl` on the PATH, which play the system's manager."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.units = folder / "units"
        self.units.mkdir()
        groups = folder / "cgroups"
        programs = folder / "bin"
        programs.mkdir()
        (programs / "systemctl").write_text(SYSTEMCTL % (sys.executable, str(self.units), str(groups)))
        (programs / "journalctl").write_text(JOURNALCTL % self.units)
        for program in programs.iterdir():
            program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        monkeypatch.setattr(systemd, "CGROUPS", (groups,))

    def keep(self, name: str, command: list[str], root: Path, env: Mapping[str, str]) -> None:
        unit = {"command": command, "root": str(root), "env": dict(env)}
        (self.units / f"{name}.service.json").write_text(json.dumps(unit))

    def start_of(self, name: str) -> dict[str, Any]:
        return {"systemd": {"unit": f"{name}.service"}}

    def go_away(self) -> None:
        self.units.rename(self.units.with_name("gone"))

    def close(self) -> None: ...


REAL = """
set -e
for place in "$@"; do mkdir -p $place; echo $$ > $place/cgroup.procs; done
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system /run/log/journal
/usr/lib/systemd/systemd-journald &
exec /usr/lib/systemd/systemd --user --log-target=null
"""
"""Without `/run/systemd/system` a manager believes that there is no systemd at all."""


class RealSystemd:
    """A user's manager of systemd; skips the test where none may run."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        needed = (PROGRAMS / "systemd", PROGRAMS / "systemd-journald", *HIERARCHIES[:1])
        if os.geteuid() != 0 or not HIERARCHIES or not all(one.exists() for one in needed):
            pytest.skip("a systemd of our own takes systemd, its control groups and root")
        self.units = folder / "units"
        self.units.mkdir()
        (self.units / "default.target").write_text("[Unit]\nDescription=Nothing\n")
        # The path of its socket may have about 100 characters, a test's folder has more.
        self.own = Path(f"/tmp/systemd-{os.getpid()}-{id(self):x}")
        self.own.mkdir(mode=0o700)
        # The journal knows a user's unit by the name of its manager's group.
        top, manager = f"{self.own.name.replace('-', '_')}.slice", f"user@{os.geteuid()}.service"
        self.tops = [place / top for place in HIERARCHIES]
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(self.own))
        monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS", raising=False)
        self.manager = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", REAL, "sh", *(str(one / manager) for one in self.tops)],
            env={**os.environ, "SYSTEMD_UNIT_PATH": str(self.units)},
        )
        programs = folder / "bin"
        programs.mkdir()
        journal = programs / "journalctl"
        real = shutil.which("journalctl")
        journal.write_text(f'#!/bin/sh\nexec nsenter --target {self.manager.pid} --mount {real} "$@"\n')
        journal.chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        wait_for((self.own / "systemd" / "private").exists, "systemd")

    def keep(self, name: str, command: list[str], root: Path, env: Mapping[str, str], more: str = "") -> None:
        (self.units / f"{name}.service").write_text(
            "[Unit]\nDefaultDependencies=no\n[Service]\n"
            f"ExecStart={shlex.join(command)}\nWorkingDirectory={root}\n"
            + "".join(f'Environment="{key}={value}"\n' for key, value in env.items())
            + more
        )
        subprocess.run(["systemctl", "--user", "daemon-reload"], check=True)

    def start_of(self, name: str) -> dict[str, Any]:
        return {"systemd": {"unit": f"{name}.service", "user": True}}

    def go_away(self) -> None:
        self.manager.kill()
        self.manager.wait()

    def close(self) -> None:
        self.go_away()
        wait_for(lambda: self._end_all() == 0, "the end of all that systemd has started")
        for top in self.tops:
            for place in sorted(top.rglob("*/"), reverse=True):
                place.rmdir()
            top.rmdir()
        shutil.rmtree(self.own)

    def _end_all(self) -> int:
        """Kill what is left, and return how many these are."""
        found = set(self._members())
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(found)

    def _members(self) -> Iterator[int]:
        for top in self.tops:
            for file in top.rglob("cgroup.procs"):
                yield from map(int, file.read_text().split())
