"""From the word of a death to an agent that is proven alive: what of that is ours, how it grows, what a kill costs.

The agents are the least that can be recovered (`beater`): they beat as soon as they run. From the launch of an agent to
the heartbeat that proves it is its own time; what is left is ours: events, jobs, fence, evidence, restore, record.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgpack
import psutil
import redis

from backup_worker import backups
from backup_worker.config import load
from backup_worker.recovery.adapters import adapter_for
from backup_worker.recovery.incident import FENCE, RECOVERED, Incident, IncidentStore
from backup_worker.recovery.service import RecoveryService
from backup_worker.runtime import Runtime
from em_bridge import Publisher, streams
from em_bridge.events import DEAD, Heartbeat, decode
from tests.benchmarks import bus, data
from tests.benchmarks.measure import OURS, Settings, Table, environment, remove
from tests.benchmarks.parts import started

BEATER = [sys.executable, "-I", "-S", str(Path(__file__).with_name("beater.py"))]
WAVES = {"z": [], "jay": ["z"], "rick": ["z"], "leroy": ["jay", "rick"]}
WORKERS = 2
"""As many recovery workers as `up` starts."""


@dataclass
class Fleet:
    """Agents with one backup each, and the parts that recover them."""

    folder: Path
    url: str
    client: redis.Redis
    agents: list[str]

    @property
    def config(self) -> Path:
        """The folder of the configuration."""
        return self.folder / "config"

    def running(self) -> dict[str, int]:
        """Return agent -> pid of every agent that runs."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                env = process.environ() if process.cmdline()[1:4] == BEATER[1:4] else {}
                if env.get("AGENT_ROOT", "").startswith(str(self.folder)):
                    found[env["AGENT_ID"]] = process.pid
        return found

    def kill(self) -> None:
        """End every agent that runs."""
        for pid in self.running().values():
            os.kill(pid, signal.SIGKILL)

    def incidents(self, since: float) -> list[Incident]:
        """Return the incidents that were opened since."""
        return [one for one in IncidentStore(self.client).all() if one.opened_at >= since]

    def recover_all(self) -> tuple[float, list[Incident]]:
        """Tell of every death at once, and wait for the last recovery; return when it was told, and the incidents."""
        told_at = streams.server_time(self.client)
        with Publisher(self.url) as em:
            for agent in self.agents:
                em.agent_state(agent, DEAD, reason="measured", at=told_at)
        deadline = time.monotonic() + 600
        while True:
            found = self.incidents(told_at)
            if len(found) == len(self.agents) and not any(one.is_open for one in found):
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{sum(one.is_open for one in found)} recoveries have not ended")
            time.sleep(0.02 if len(self.agents) < 20 else 0.2)
        failed = [one for one in found if one.state != RECOVERED]
        if failed:
            raise RuntimeError(f"{failed[0].id}: {failed[0].steps[-1].detail}")
        return told_at, found


@contextlib.contextmanager
def _fleet(
    settings: Settings,
    name: str,
    agents: Mapping[str, Sequence[str]],
    *,
    files: int,
    mean_bytes: int,
    **entry: object,
) -> Iterator[Fleet]:
    """Make agents (name -> what it depends on), back them up, and run a dispatcher and the recovery workers."""
    folder = settings.folder / name
    made = data.make_small_files(folder / "made", agents=len(agents), files=files, mean_bytes=mean_bytes)
    entries = {}
    for agent, own in zip(agents, made.agents, strict=True):
        (made.root / own).rename(made.root / agent)
        entries[agent] = {
            "root": str(made.root / agent), "files": data.CLASSES, "required": ["SOUL.md"],
            "start": {"command": BEATER}, "depends_on": list(agents[agent]),
            "heartbeat": {"stable_beats": 3, "dead_after": 60, "verify_within": 300},
            "recovery": {"stable_for": 0, "max_recoveries": 1000, "stop_within": 5},
        } | entry  # fmt: skip
    (folder / "config").mkdir()
    schedule = {
        "timezone": "UTC", "repository": "../backups", "history": "../backups/system-history.jsonl", "state": "../var",
        "limits": {"fleet_recoveries": 100_000, "reserve_bytes": 0},
        "tiers": {"weekly": {"cron": "0 23 * * 0", "include": ["*"], "slot": "%G-W%V", "keep": 9}},
    }  # fmt: skip
    (folder / "config" / "backup_schedule.json").write_text(json.dumps(schedule))
    (folder / "config" / "agents.json").write_text(json.dumps({"agents": entries}))
    with bus.server(settings, f"{name}-valkey") as (url, client):
        runtime = Runtime(load(folder / "config"), client, url)
        for agent in agents:
            backups.by_hand(runtime, agent, "weekly", now=time.time())
        parts = [["backup_worker", "dispatcher"]]
        parts += [["backup_worker", "worker", "--queue", "recovery", "--processes", str(WORKERS)]]
        fleet = Fleet(folder, url, client, list(agents))
        env = {"REDIS_URL": url, "BACKUP_CONFIG": str(folder / "config")}
        with started(parts, env, folder / "parts.log"):
            try:
                yield fleet
            finally:
                fleet.kill()
    remove(folder)


def _own(client: redis.Redis, incidents: Sequence[Incident]) -> dict[str, float]:
    """Return agent -> seconds from its launch to the heartbeat that proved it."""
    wanted = {one.agent: one for one in incidents}
    beats: dict[str, list[float]] = {agent: [] for agent in wanted}
    for entry, fields in streams.read_range(client, streams.HEARTBEATS):
        beat = decode(fields)
        is_wanted = isinstance(beat, Heartbeat) and beat.agent in wanted
        if is_wanted and streams.id_order(entry) > streams.id_order(wanted[beat.agent].start_mark):
            beats[beat.agent].append(streams.entry_time(entry))
    launched = {agent: _at(one, "start") for agent, one in wanted.items()}
    return {agent: max(0.0, beats[agent][2] - launched[agent]) for agent in wanted}


def _at(incident: Incident, step: str) -> float:
    return next(one.at for one in incident.steps if one.step == step)


def waves(settings: Settings) -> Iterator[Table]:
    """Four agents in three waves: from the word of their deaths until the last one is verified."""
    totals, own_times, told_to = [], [], []
    restarts = _supervisord(settings)
    with _fleet(settings, "waves", WAVES, files=20, mean_bytes=5_500) as fleet:
        fleet.recover_all()
        for _ in range(settings.runs):
            fleet.kill()
            for agent in fleet.agents:
                (fleet.folder / "made" / agent / "SOUL.md").write_text("")
            told_at, incidents = fleet.recover_all()
            own = _own(fleet.client, incidents)
            by_agent = {one.agent: one for one in incidents}
            path = _slowest_path(by_agent)
            totals.append(max(one.closed_at or 0.0 for one in incidents) - told_at)
            own_times.append(sum(own[agent] for agent in path))
            told_to.append(min(_at(one, "confirm") for one in incidents) - told_at)
    table = Table(
        "Four agents wiped and killed (100 kB each), three waves: word of the deaths → the last one verified",
        ("what", "median s", "least to most s"),
    )
    ours = [total - own for total, own in zip(totals, own_times, strict=True)]
    for what, values in (
        (f"{OURS}, in all", totals),
        ("of that the agents' own: launch to third heartbeat, three after one another", own_times),
        (f"of that {OURS}'s: fence, evidence, restore, proofs, record, jobs", ours),
        ("until the first of them is acted on", told_to),
        ("supervisord: kill → all four beat again; no order, nothing restored or proven", restarts),
    ):
        if values:
            table.add(what, f"{statistics.median(values):.3f}", f"{min(values):.3f} to {max(values):.3f}")
    table.notes.append(f"one dispatcher, {WORKERS} recovery workers; aim: at most 1 s of our own")
    yield table


def _slowest_path(incidents: Mapping[str, Incident]) -> list[str]:
    """Return the agents that waited for one another, from the one that was verified last."""
    path = [max(incidents, key=lambda name: incidents[name].closed_at or 0.0)]
    while WAVES[path[-1]]:
        path.append(max(WAVES[path[-1]], key=lambda name: incidents[name].closed_at or 0.0))
    return path


def _supervisord(settings: Settings) -> list[float]:
    """Return the seconds from the kill of four programs until each has beaten again, if supervisord is there."""
    program = Path(sys.executable).with_name("supervisord")
    if not program.exists():
        return []
    folder = settings.folder / "supervisord"
    folder.mkdir()
    results = []
    with bus.server(settings, "supervisord-valkey") as (url, client):
        programs = "".join(
            f"[program:{agent}]\ncommand={shlex.join(BEATER)}\nautorestart=true\nstartsecs=0\n"
            f'environment=AGENT_ID="{agent}",AGENT_ROOT="{folder}",REDIS_URL="{url.replace("%", "%%")}"\n'
            for agent in WAVES
        )
        (folder / "supervisord.conf").write_text(
            f"[supervisord]\nnodaemon=true\nlogfile={folder}/log\npidfile={folder}/pid\n{programs}"
        )
        argv = [str(program), "-n", "-c", str(folder / "supervisord.conf")]
        process = subprocess.Popen(
            argv, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        fleet = Fleet(folder, url, client, list(WAVES))
        try:
            _until_all_beat(client, "0-0")
            for _ in range(settings.runs):
                time.sleep(1.5)
                running = fleet.running()
                mark, killed_at = streams.last_id(client, streams.HEARTBEATS), streams.server_time(client)
                for pid in running.values():
                    os.kill(pid, signal.SIGKILL)
                results.append(_until_all_beat(client, mark) - killed_at)
        finally:
            process.terminate()
            process.wait(20)
    return results


def _until_all_beat(client: redis.Redis, mark: str) -> float:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        first: dict[str, float] = {}
        for entry, fields in streams.read_range(client, streams.HEARTBEATS, start=f"({mark}"):
            beat = decode(fields)
            if isinstance(beat, Heartbeat) and beat.seq == 1:
                first.setdefault(beat.agent, streams.entry_time(entry))
        if first.keys() >= WAVES.keys():
            return max(first.values())
        time.sleep(0.01)
    raise TimeoutError("the supervised programs do not beat")


def fleet_of_dead(settings: Settings) -> Iterator[Table]:
    """From 10 to 200 agents dead at once: until the last one is verified, beside copying and starting them."""
    size_mb = 1 if settings.quick else 10
    table = Table(
        f"Many agents wiped and killed at once ({size_mb} MB each), word of the deaths → the last one verified",
        (
            "agents",
            f"{OURS} s",
            "each, ms",
            "of that processor, ms",
            "cp -a, sync and start, two at a time, s",
            "times as long",
        ),
    )
    for count in (10, 50, 100, 200):
        agents: dict[str, Sequence[str]] = {f"b{number:03d}": () for number in range(count)}
        with _fleet(settings, f"dead{count}", agents, files=50, mean_bytes=size_mb * 20_000) as fleet:
            for agent in fleet.agents:
                (fleet.folder / "made" / agent / "SOUL.md").write_text("")
            os.sync()
            before = _processor_s()
            told_at, incidents = fleet.recover_all()
            worked = _processor_s() - before
            ours = max(one.closed_at or 0.0 for one in incidents) - told_at
            fleet.kill()
            theirs = _copied(fleet)
        table.add(
            str(count), f"{ours:.1f}", f"{ours / count * 1e3:.0f}", f"{worked / count * 1e3:.0f}",
            f"{theirs:.1f}", f"{ours / theirs:.1f}",
        )  # fmt: skip
    table.notes.append(
        "one run each; the peer keeps no evidence, proves nothing before or after, and waits for one heartbeat of each"
    )
    yield table


def _processor_s() -> float:
    """Return the seconds of processor time that our parts, their jobs and the server have used so far."""
    total = 0.0
    for one in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = one.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def _copied(fleet: Fleet) -> float:
    """Return the seconds in which a shell copies each agent's backup over it, syncs and starts it."""
    script = (
        'agent=$1; root="$2/made/$agent"; rm -rf "$root"; cp -a "$2"/backups/weekly/*/"$agent"/files "$root"; '
        f'sync -f "$root"; cd "$root"; AGENT_ID=$agent AGENT_ROOT=$root {shlex.join(BEATER)} >/dev/null 2>&1 &'
    )
    mark, begun = streams.last_id(fleet.client, streams.HEARTBEATS), time.monotonic()
    argv = ["xargs", "-P", str(WORKERS), "-I", "{}", "sh", "-c", script, "sh", "{}", str(fleet.folder)]
    subprocess.run(
        argv, input="\n".join(fleet.agents), text=True, check=True, env=environment({"REDIS_URL": fleet.url})
    )
    while True:
        alive = {
            beat.agent
            for _, fields in streams.read_range(fleet.client, streams.HEARTBEATS, start=f"({mark}")
            if isinstance(beat := decode(fields), Heartbeat)
        }
        if alive >= set(fleet.agents):
            return time.monotonic() - begun
        if time.monotonic() - begun > 300:
            raise TimeoutError("the copied agents do not beat")
        time.sleep(0.05)


def detection(settings: Settings) -> Iterator[Table]:
    """From an agent's last heartbeat to the word of its death, beside its `dead_after`."""
    table = Table(
        "Last heartbeat of a killed agent → word of its death, by the server's clock",
        ("dead_after s", "median s later than that", "least to most s"),
    )
    for dead_after in (1.0, 2.0, 5.0):
        late = []
        with bus.server(settings, f"detection{dead_after:g}") as (url, client):
            env = {"REDIS_URL": url}
            with started([["em_bridge", "em"]], env, settings.folder / "em.log"):
                for number in range(settings.runs):
                    late.append(_one_death(url, client, f"d{number}", dead_after) - dead_after)
        table.add(f"{dead_after:g}", f"{statistics.median(late):.3f}", f"{min(late):.3f} to {max(late):.3f}")
    table.notes.append("the monitor looks every 0.25 s")
    yield table


def _one_death(url: str, client: redis.Redis, agent: str, dead_after: float) -> float:
    client.hset(streams.FLEET, agent, msgpack.packb({"dead_after": dead_after}))
    env = environment({"REDIS_URL": url, "AGENT_ID": agent, "AGENT_ROOT": "/nowhere"})
    process = subprocess.Popen(BEATER, env=env)
    time.sleep(2.5)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for entry, fields in streams.read_range(client, streams.AGENT_STATE):
            event = decode(fields)
            if getattr(event, "agent", "") == agent and getattr(event, "state", "") == DEAD:
                beats = [
                    streams.entry_time(one)
                    for one, raw in streams.read_range(client, streams.HEARTBEATS)
                    if getattr(decode(raw), "agent", "") == agent
                ]
                return streams.entry_time(entry) - max(beats)
        time.sleep(0.01)
    raise TimeoutError("nobody has noticed the death")


def killed_worker(settings: Settings) -> Iterator[Table]:
    """A worker and its child killed in the middle of a step: until another one has taken the step up."""
    stubborn = ["/bin/sh", "-c", "trap '' TERM; while :; do sleep 1; done"]
    taken_up = []
    with _fleet(
        settings, "killed", {"z": ()}, files=5, mean_bytes=1000, start={"command": stubborn}
    ) as fleet:
        for _ in range(settings.runs):
            taken_up.append(_killed_in_the_fence(fleet))
    table = Table(
        "A worker and its child killed with -9 in the middle of a step → another one works on that step",
        ("what", "median s", "least to most s"),
    )
    table.add(OURS, f"{statistics.median(taken_up):.1f}", f"{min(taken_up):.1f} to {max(taken_up):.1f}")
    table.notes.append("the step is a fence that waits for a process which ignores TERM; there is no peer")
    yield table


def _killed_in_the_fence(fleet: Fleet) -> float:
    runtime = Runtime(load(fleet.config), fleet.client, fleet.url)
    service = RecoveryService(runtime)
    agent = runtime.config.agent("z")
    adapter_for("z", agent, runtime.config.schedule.state).start(redis_url=fleet.url)
    opened = service.open("z", "measured")
    _until(lambda: service.store.get(opened.id).resumes == 1, "the fence")
    time.sleep(0.3)
    child = psutil.Process(_holder(runtime.config.schedule.state / "locks" / "z.lock"))
    worker = child.parent()
    begun = time.monotonic()
    for process in (worker, child):
        if process is not None:
            process.kill()
    _until(lambda: service.store.get(opened.id).resumes > 1, "another worker")
    taken_s = time.monotonic() - begun
    # It never beats: what counts has been seen, and the next round begins anew.
    _until(lambda: service.store.get(opened.id).phase not in (FENCE, "select", "restore"), "the step's end")
    incident = service.store.get(opened.id)
    service.store.save(incident.closed(RECOVERED, time.time(), "0-0"), wake_at=None)
    adapter_for("z", agent, runtime.config.schedule.state).stop(term_grace_s=0.1)
    return taken_s


def _holder(lock: Path) -> int:
    """Return the process that holds the kernel's lock on a file."""
    inode = f":{lock.stat().st_ino} "
    return next(
        int(line.split()[4]) for line in Path("/proc/locks").read_text().splitlines() if inode in line
    )


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited in vain for {what}")
        time.sleep(0.01)
