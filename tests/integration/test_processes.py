"""Finding, ending and starting real processes of every unpleasant kind."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from backup_worker.recovery import proc, processes
from backup_worker.recovery.processes import Agent, FenceFailed, RunRecord
from em_bridge.errors import AgentBackupError
from tests.integration.programs import (
    DAEMON,
    FAMILY,
    NAMELESS,
    POLITE,
    READY,
    SLEEPER,
    STUBBORN,
    URL,
    Place,
    is_alive,
)
from tests.living_fleet import wait_for


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.close()


def pids_of(agent: Agent) -> set[int]:
    return {running.pid for running in processes.find_agent(agent)}


# ── ending ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_agent_may_say_goodbye_before_it_ends(place: Place) -> None:
    agent = place.agent(POLITE)
    pid = place.start(agent)
    assert [one.pid for one in processes.fence(agent)] == [pid]
    assert (agent.root / "goodbye").exists()
    assert processes.find_agent(agent) == []


def test_what_ignores_term_is_killed_after_its_grace(place: Place) -> None:
    agent = place.agent(STUBBORN)
    pid = place.start(agent)
    began = time.monotonic()
    processes.fence(agent, term_grace_s=0.3)
    assert 0.3 <= time.monotonic() - began < 3
    assert not is_alive(pid)


def test_a_stopped_process_is_continued_so_that_it_can_obey(place: Place) -> None:
    agent = place.agent(POLITE)
    pid = place.start(agent)
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, "the stop")
    assert pids_of(agent) == {pid}
    processes.fence(agent, term_grace_s=5)
    assert (agent.root / "goodbye").exists()
    assert not is_alive(pid)


def test_a_zombie_is_not_alive(place: Place) -> None:
    agent = place.agent()
    pid = place.by_hand(*agent.command, cwd=agent.root).pid
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, "a zombie")
    assert processes.find_agent(agent) == []
    assert processes.fence(agent) == []


@pytest.mark.parametrize(
    ("program", "ended"),
    [
        ("raise SystemExit(7)", "exit code 7"),
        ("pass", "exit code 0"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "ended by SIGKILL, as the kernel does when the memory is used up",
        ),
    ],
)
def test_it_is_known_how_a_process_has_ended(place: Place, program: str, ended: str) -> None:
    agent = place.agent(READY + "ready(); " + program)
    place.start(agent)
    wait_for(lambda: processes.last_end(agent) != "", "its end")
    assert processes.last_end(agent) == ended
    agent = place.agent()
    pid = place.start(agent)
    assert processes.last_end(agent) == "", "that of an earlier process says nothing about this one"
    assert psutil.Process(pid).ppid() != os.getpid()
    assert pids_of(agent) == {pid}, "who watches it is not taken for it"


def test_grandchildren_in_sessions_of_their_own_end_too(place: Place) -> None:
    agent = place.agent(FAMILY)
    place.start(agent, ready=3)
    assert pids_of(agent) == set(place.pids)
    assert len(processes.fence(agent, term_grace_s=0.2)) == 3
    assert place.alive() == []


def test_a_daemon_that_forked_twice_is_found_after_its_starter_has_gone(place: Place) -> None:
    agent = place.agent(DAEMON)
    started = place.start(agent)
    assert not is_alive(started)
    assert pids_of(agent) == set(place.pids)
    assert processes.strangers(agent, processes.find_agent(agent)) == []
    processes.fence(agent)
    assert place.alive() == []


def test_a_child_without_name_and_environment_is_found_by_the_session(place: Place) -> None:
    agent = place.agent(NAMELESS)
    started = place.start(agent)
    assert not is_alive(started)
    assert pids_of(agent) == set(place.pids)
    processes.fence(agent)
    assert place.alive() == []


def test_a_step_of_the_clock_does_not_hide_the_session(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = place.agent(NAMELESS)
    place.start(agent)
    boot = psutil.boot_time()
    monkeypatch.setattr(psutil, "boot_time", lambda: boot + 3600)
    assert pids_of(agent) == set(place.pids)


def test_what_cannot_be_ended_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = place.agent()
    pid = place.start(agent)

    def forbidden(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(signal, "pidfd_send_signal", forbidden)
    monkeypatch.setattr(processes, "KILL_GRACE_S", 0.1)
    with pytest.raises(FenceFailed, match=f"pid {pid} "):
        processes.fence(agent, term_grace_s=0.1)


def test_a_number_that_changed_hands_after_it_was_found_is_not_signalled(place: Place) -> None:
    agent = place.agent()
    innocent = place.start(place.agent(name="innocent"))
    processes._signal_and_wait(agent, [innocent], signal.SIGKILL, 0.2)
    time.sleep(0.1)
    assert is_alive(innocent)


# ── finding ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_started_by_hand_with_the_configured_command_is_found_and_ended(place: Place) -> None:
    agent = place.agent()
    process = place.by_hand(*agent.command, cwd=agent.root)
    assert pids_of(agent) == {process.pid}
    assert processes.find(agent.name, agent.root, command=agent.command)[0].pid == process.pid
    processes.fence(agent)
    assert not is_alive(process.pid)


def test_one_started_by_hand_from_another_folder_by_the_whole_path_is_found(place: Place) -> None:
    agent = place.agent()
    process = place.by_hand(
        "/usr/bin/env", "python3", "-u", agent.root / "agent.py", f"{place.ready}/", cwd=place.base
    )
    assert pids_of(agent) == {process.pid}


def test_a_stranger_with_the_same_command_in_another_folder_is_left_alone(place: Place) -> None:
    agent, stranger = place.agent(), place.agent(name="stranger")
    process = place.by_hand(*stranger.command, cwd=stranger.root)
    assert processes.find_agent(agent) == []
    processes.fence(agent)
    assert is_alive(process.pid)


def test_agents_that_share_one_program_are_told_apart(place: Place) -> None:
    shared = place.base / "shared.py"
    shared.write_text(SLEEPER)
    command = (sys.executable, str(shared), f"{place.ready}/")
    z, jay, rick = (
        dataclasses.replace(place.agent(name=name), command=command) for name in ("z", "jay", "rick")
    )
    first, second = place.start(z), place.start(jay)
    elsewhere = place.by_hand(*command, cwd=place.base)
    assert (pids_of(z), pids_of(jay), pids_of(rick)) == ({first}, {second}, set())
    processes.fence(z)
    assert is_alive(second)
    assert is_alive(elsewhere.pid), "nothing says whose it is"


def test_an_agent_of_the_same_name_with_another_root_is_left_alone(place: Place) -> None:
    agent, other = place.agent(), place.agent(name="other")
    env = {**os.environ, "AGENT_ID": agent.name, "AGENT_ROOT": str(other.root)}
    place.by_hand(*other.command, cwd=other.root, env=env)
    assert processes.find_agent(agent) == []


def test_somebody_who_only_reads_the_log_in_the_agents_folder_is_left_alone(place: Place) -> None:
    agent = dataclasses.replace(place.agent(), command=("agent",))
    (agent.root / "agent.log").write_text("")
    reader = subprocess.Popen(["tail", "-f", "agent.log"], cwd=agent.root)
    place.started.append(reader)
    wait_for(lambda: psutil.Process(reader.pid).name() == "tail", "tail")
    assert processes.find_agent(agent) == []


def test_an_agent_that_another_agent_started_is_not_that_agents_child(place: Place) -> None:
    jay = place.agent(name="jay")
    em = place.agent(
        READY + "import subprocess\n"
        f"env = dict(os.environ, AGENT_ID='jay', AGENT_ROOT={str(jay.root)!r})\n"
        f"subprocess.Popen({list(jay.command)!r}, cwd={str(jay.root)!r}, env=env)\n"
        "ready(); time.sleep(60)",
        name="em",
    )
    pid = place.start(em, ready=2)
    assert pids_of(em) == {pid}
    processes.fence(em)
    assert len(processes.find_agent(jay)) == 1


def test_a_record_whose_number_was_recycled_points_at_nobody(place: Place) -> None:
    agent = place.agent()
    place.start(agent)
    processes.fence(agent)
    program = ("-c", SLEEPER, f"{place.ready}/")
    innocent = place.by_hand("setsid", sys.executable, *program, cwd=place.base).pid
    mine = dataclasses.replace(processes.read_record(agent) or RunRecord(0, 0, "", ""), pid=innocent)
    started = proc.started(innocent)
    assert started
    assert agent.record_file
    agent.record_file.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(mine, started=started))))
    assert pids_of(agent) == {innocent}
    for stale in (
        dataclasses.replace(mine, started=started - 1),
        dataclasses.replace(mine, started=started, boot="an earlier one"),
    ):
        agent.record_file.write_text(json.dumps(dataclasses.asdict(stale)))
        assert processes.find_agent(agent) == []
        processes.fence(agent)
        assert is_alive(innocent)
    agent.record_file.write_text("{torn")
    assert processes.find_agent(agent) == []


def test_the_callers_ancestors_are_spared(place: Place) -> None:
    # A shell in the agent's folder, with the agent's environment, that runs the command to restore it.
    agent = place.agent()
    program = (
        "import subprocess, sys; from pathlib import Path; from backup_worker.recovery import processes as p;"
        f"print([r.pid for r in p.find({agent.name!r}, Path({str(agent.root)!r}))])"
    )
    env = {**os.environ, "AGENT_ID": agent.name, "AGENT_ROOT": str(agent.root)}
    shell = ["sh", "-c", f"{sys.executable} -c '{program.replace(chr(39), chr(34))}'; true"]
    answer = subprocess.run(shell, env=env, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_a_second_one_beside_the_one_we_started_is_a_stranger(place: Place) -> None:
    agent = place.agent(FAMILY)
    place.start(agent, ready=3)
    assert processes.strangers(agent, processes.find_agent(agent)) == []
    (agent.root / "agent.py").write_text(SLEEPER)
    process = place.by_hand(*agent.command, cwd=agent.root)
    assert [one.pid for one in processes.strangers(agent, processes.find_agent(agent))] == [process.pid]


# ── starting ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("command", "root", "reason"),
    [
        (("no-such-program",), "z", "no such file"),
        ((sys.executable, "agent.py"), "nowhere", "no such file"),
        (("./agent.py",), "z", "permission denied"),
        ((), "z", "no start command"),
    ],
)
def test_what_cannot_be_started_says_why(
    place: Place, command: tuple[str, ...], root: str, reason: str
) -> None:
    place.agent()
    agent = Agent("z", place.base / root, command, place.base / "var")
    with pytest.raises(AgentBackupError, match=reason) as caught:
        processes.start(agent, redis_url=URL)
    assert caught.value.hint
    assert processes.find_agent(agent) == []


def test_it_runs_in_its_root_in_a_session_of_its_own_with_its_environment(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RQ_WORKER_ID", "secret")
    agent = place.agent(READY + "print(os.getcwd(), os.environ, flush=True); ready(); time.sleep(60)")
    pid = processes.start(agent, redis_url=URL, extra_env={"EXTRA": "1"})
    place.await_ready(1)
    process = psutil.Process(pid)
    assert Path(process.cwd()) == agent.root
    assert os.getsid(pid) == pid
    environment = process.environ()
    assert environment["AGENT_ID"] == "z"
    assert environment["AGENT_ROOT"] == str(agent.root)
    assert environment["REDIS_URL"] == URL
    assert environment["EXTRA"] == "1"
    assert not any(name.startswith("RQ_") for name in environment)


def test_the_output_of_every_start_is_kept_and_the_log_is_rotated(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = place.agent(READY + "print('out', flush=True); print('err', file=sys.stderr); ready()")
    place.start(agent)
    wait_for(lambda: processes.last_log_lines(agent) == ["out", "err"], "the output")
    place.start(agent)
    wait_for(lambda: len(processes.last_log_lines(agent)) == 4, "the output of both")
    assert processes.last_log_lines(agent, 1) == ["err"]
    monkeypatch.setattr(processes, "LOG_LIMIT_BYTES", 10)
    place.start(agent)
    wait_for(lambda: processes.last_log_lines(agent) == ["out", "err"], "a new log")
    assert agent.log_file
    assert agent.log_file.with_suffix(".log.1").read_text() == "out\nerr\n" * 2
    assert agent.log_file.stat().st_mode & 0o077 == 0


def test_an_agent_outlives_the_worker_that_started_it(place: Place) -> None:
    agent = place.agent()
    child = os.fork()
    if child == 0:
        processes.start(agent, redis_url=URL)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    place.await_ready(1)
    assert pids_of(agent) == set(place.pids)
    assert place.alive() == place.pids
