"""What every adapter promises, on each of them; and what is peculiar to one."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from backup_worker.config import AgentConfig
from backup_worker.doctor import examine
from backup_worker.recovery.adapters import Adapter, adapter_for
from backup_worker.recovery.adapters.supervised import AdapterError
from em_bridge.errors import AgentBackupError
from tests.integration.conftest import ValkeyServer, free_port
from tests.integration.programs import FAMILY, POLITE, READY, SLEEPER, URL, Place, is_alive
from tests.integration.supervisors import KINDS, PASSWORD, RealSupervisord, Supervisor
from tests.integration.systemds import RealSystemd, SmallSystemd
from tests.living_fleet import Fleet, cli, steps, wait_for

SUPERVISED = [kind for kind in KINDS if kind != "command"]


class Kept:
    """One agent, kept by `supervisor`."""

    def __init__(self, place: Place, supervisor: Supervisor) -> None:
        self.place, self.supervisor = place, supervisor
        self.root = place.base / "z"

    def adapter(self, program: str = SLEEPER, *command: str) -> Adapter:
        agent = self.place.agent(program)
        self.supervisor.keep("z", list(command or agent.command), agent.root, self.env)
        return self.again()

    def again(self) -> Adapter:
        start = self.supervisor.start_of("z")
        config = AgentConfig.model_validate({"root": str(self.root), "start": start})
        return adapter_for("z", config, self.place.base / "var")

    @property
    def env(self) -> dict[str, str]:
        return {"AGENT_ID": "z", "AGENT_ROOT": str(self.root)}

    def start(self, adapter: Adapter, ready: int = 1) -> int:
        before = len(self.place.pids)
        pid = adapter.start(redis_url=URL)
        self.place.await_ready(before + ready)
        assert pid
        return pid


@pytest.fixture(params=KINDS)
def kept(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    place = Place(tmp_path)
    supervisor = KINDS[request.param](tmp_path, monkeypatch)
    yield Kept(place, supervisor)
    place.close()
    supervisor.close()


def start_as_seen_by_doctor(fleet: Fleet) -> str:
    checks = examine(fleet.folder / "config", fleet.url, now=time.time())
    # What cannot be asked is a fault of the agent's check.
    found = [one.status for one in checks if one.check in ("start of z", "agent z")]
    return found[-1]


only_supervised = pytest.mark.parametrize("kept", SUPERVISED, indirect=True)


# ── all of them ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_was_started_runs_until_it_is_stopped_and_can_be_started_again(kept: Kept) -> None:
    adapter = kept.adapter(POLITE)
    assert adapter.running() == []
    pid = kept.start(adapter)
    assert [one.pid for one in adapter.running()] == [pid]
    assert adapter.strangers(adapter.running()) == []
    assert [one.pid for one in adapter.stop(term_grace_s=10)] == [pid]
    assert (kept.root / "goodbye").exists()
    assert not is_alive(pid)
    assert adapter.running() == []
    assert adapter.stop(term_grace_s=10) == []
    second = kept.start(adapter)
    assert [one.pid for one in kept.again().running()] == [second] != [pid]


def test_what_ignores_term_is_killed_after_its_grace_with_all_its_children(kept: Kept) -> None:
    adapter = kept.adapter(
        FAMILY.replace("for depth", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nfor depth")
    )
    kept.start(adapter, ready=3)
    assert {one.pid for one in adapter.running()} == set(kept.place.pids)
    began = time.monotonic()
    adapter.stop(term_grace_s=0.5)
    assert 0.5 <= time.monotonic() - began < 8
    assert kept.place.alive() == []
    assert adapter.running() == []


def test_children_that_outlive_their_parent_do_not_outlive_the_stop(kept: Kept) -> None:
    adapter = kept.adapter(FAMILY)
    kept.start(adapter, ready=3)
    adapter.stop(term_grace_s=0.5)
    assert kept.place.alive() == []


def test_a_stopped_process_is_continued_so_that_it_may_say_goodbye(kept: Kept) -> None:
    adapter = kept.adapter(POLITE)
    pid = kept.start(adapter)
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, "the stop")
    assert [one.pid for one in adapter.running()] == [pid]
    adapter.stop(term_grace_s=10)
    assert (kept.root / "goodbye").exists()
    assert not is_alive(pid)


def test_one_that_was_killed_is_not_running(kept: Kept) -> None:
    adapter = kept.adapter()
    pid = kept.start(adapter)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: adapter.running() == [], "the end")
    assert adapter.stop(term_grace_s=1) == []


def test_one_started_by_hand_is_seen_is_a_stranger_and_is_ended_too(kept: Kept) -> None:
    adapter = kept.adapter()
    by_hand = kept.place.by_hand(
        sys.executable, "agent.py", f"{kept.place.ready}/", cwd=kept.root, env={**os.environ, **kept.env}
    )
    assert [one.pid for one in adapter.running()] == [by_hand.pid]
    ours = kept.start(adapter)
    running = adapter.running()
    assert {one.pid for one in running} == {ours, by_hand.pid}
    assert [one.pid for one in adapter.strangers(running)] == [by_hand.pid]
    adapter.stop(term_grace_s=5)
    assert kept.place.alive() == []


def test_an_agent_of_another_name_is_left_alone(kept: Kept) -> None:
    adapter = kept.adapter()
    kept.start(adapter)
    other = kept.place.start(kept.place.agent(name="other"))
    adapter.stop(term_grace_s=5)
    assert is_alive(other)


def test_its_last_words_are_kept(kept: Kept) -> None:
    adapter = kept.adapter(
        READY
        + "print('first\\nout', flush=True); print('err', file=sys.stderr, flush=True); ready(); time.sleep(60)"
    )
    kept.start(adapter)
    wait_for(lambda: adapter.log_lines(2) == ["out", "err"], "the output")
    adapter.stop(term_grace_s=1)
    assert adapter.log_lines() == ["first", "out", "err"]


def test_it_is_told_how_the_last_process_has_ended(kept: Kept) -> None:
    adapter = kept.adapter(
        READY + "ready()\nwhile not os.path.exists('end'): time.sleep(0.02)\nraise SystemExit(3)"
    )
    kept.start(adapter)
    assert adapter.last_end() == "", "it has not ended"
    (kept.root / "end").touch()
    wait_for(lambda: adapter.last_end() != "", "the word of its end")
    assert adapter.last_end().startswith("exit code 3")
    adapter.stop(term_grace_s=1)


def test_a_program_that_does_not_exist_is_an_error_or_never_runs(kept: Kept) -> None:
    adapter = kept.adapter(SLEEPER, "/no/such/program")
    with pytest.raises(AgentBackupError) as caught:
        adapter.start(redis_url=URL)
    assert caught.value.hint
    assert adapter.stop(term_grace_s=1) == []
    assert adapter.running() == []


# ── those of a supervisor ───────────────────────────────────────────────────────────────────────────────────────


@only_supervised
def test_a_supervisor_that_cannot_be_asked_never_means_dead(kept: Kept) -> None:
    adapter = kept.adapter()
    pid = kept.start(adapter)
    kept.supervisor.go_away()
    for question in (adapter.running, lambda: adapter.stop(term_grace_s=1)):
        with pytest.raises(AdapterError) as caught:
            question()
        assert caught.value.hint
    assert is_alive(pid)


@only_supervised
def test_one_without_a_name_in_its_environment_is_known_by_its_supervisor(kept: Kept) -> None:
    agent = kept.place.agent(FAMILY)
    kept.supervisor.keep("z", list(agent.command), agent.root, {})
    adapter = kept.again()
    kept.start(adapter, ready=3)
    running = adapter.running()
    assert {one.pid for one in running} == set(kept.place.pids)
    assert adapter.strangers(running) == []
    adapter.stop(term_grace_s=0.5)
    assert kept.place.alive() == []


@only_supervised
def test_what_the_supervisor_does_not_know_is_never_taken_for_dead(kept: Kept) -> None:
    kept.adapter()
    start = {kind: {**facts} for kind, facts in kept.supervisor.start_of("z").items()}
    for facts in start.values():
        facts |= {key: "misspelt" for key in ("program", "unit", "container") if key in facts}
    config = AgentConfig.model_validate({"root": str(kept.root), "start": start})
    adapter = adapter_for("z", config, kept.place.base / "var")
    with pytest.raises(AdapterError, match="misspelt") as caught:
        adapter.stop(term_grace_s=1)
    assert "agents.json" in (caught.value.hint or "")


@only_supervised
def test_a_wiped_agent_comes_back_by_its_supervisor(kept: Kept, valkey: ValkeyServer) -> None:
    fleet = Fleet(kept.place.base / "fleet", valkey.url)
    try:
        fleet.add("z")
        fleet.backup("z")
        whole = fleet.files("z")
        env = {"AGENT_ID": "z", "AGENT_ROOT": str(fleet.root("z")), "REDIS_URL": fleet.url}
        kept.supervisor.keep("z", [sys.executable, "agent.py"], fleet.root("z"), env)
        fleet.entries["z"]["start"] = kept.supervisor.start_of("z")
        fleet.write()
        first = fleet.recover("z")
        assert first.state == "recovered", first.steps
        fleet.wipe("z")
        before = fleet.files("z")
        refused = cli(fleet, "restore", "z")
        assert refused.returncode == 1
        assert f"pid {first.pid} " in refused.stderr
        assert fleet.files("z") == before
        second = fleet.recover("z")
        assert steps(second)[-3:] == ["depend", "start", "prove"]
        assert fleet.files("z") == whole
        assert [one.pid for one in fleet.running("z")] == [second.pid] != [first.pid]
        assert start_as_seen_by_doctor(fleet) == "ok"
        kept.supervisor.go_away()
        assert start_as_seen_by_doctor(fleet) == "fail"
    finally:
        fleet.close()


# ── supervisord ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kept", ["supervisord"], indirect=True)
def test_what_supervisord_starts_again_and_again_is_held_down(kept: Kept) -> None:
    assert isinstance(kept.supervisor, RealSupervisord)
    agent = kept.place.agent(SLEEPER)
    kept.supervisor.keep("z", list(agent.command), agent.root, kept.env, "autorestart=true\n")
    adapter = kept.again()
    first = kept.start(adapter)
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: len(kept.place.pids) == 2, "the restart")
    adapter.stop(term_grace_s=5)
    time.sleep(1.2)
    assert kept.place.alive() == []
    assert adapter.running() == []


@pytest.mark.parametrize("kept", ["supervisord"], indirect=True)
def test_what_supervisord_is_about_to_start_counts_as_running(kept: Kept) -> None:
    assert isinstance(kept.supervisor, RealSupervisord)
    agent = kept.place.agent("import sys; sys.exit(3)")
    kept.supervisor.keep("z", list(agent.command), agent.root, kept.env, "startsecs=1\nstartretries=9\n")
    adapter = kept.again()
    adapter.start(redis_url=URL)
    wait_for(lambda: any("BACKOFF" in str(one) for one in adapter.running()), "the pause between two starts")
    adapter.stop(term_grace_s=1)
    assert adapter.running() == []


def test_supervisord_is_reached_over_tcp_with_a_password_that_is_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path)
    supervisor = RealSupervisord(tmp_path, monkeypatch, tcp=free_port())
    try:
        kept = Kept(place, supervisor)
        adapter = kept.adapter()
        pid = kept.start(adapter)
        assert [one.pid for one in adapter.stop(term_grace_s=5)] == [pid]
        supervisor.go_away()
        with pytest.raises(AdapterError) as caught:
            adapter.running()
        assert "se" + "%3Acret" not in str(caught.value)
        assert PASSWORD not in str(caught.value)
        assert "127.0.0.1" in str(caught.value)
    finally:
        place.close()
        supervisor.close()


# ── systemd ─────────────────────────────────────────────────────────────────────────────────────────────────────

only_real_systemd = pytest.mark.parametrize("kept", ["systemd, real"], indirect=True)


def kept_by_systemd(kept: Kept, program: str, options: str, env: dict[str, str]) -> Adapter:
    assert isinstance(kept.supervisor, RealSystemd)
    agent = kept.place.agent(program)
    kept.supervisor.keep("z", list(agent.command), agent.root, env, options)
    return kept.again()


@only_real_systemd
def test_what_systemd_starts_again_and_again_is_held_down(kept: Kept) -> None:
    adapter = kept_by_systemd(kept, SLEEPER, "Restart=always\nRestartSec=0.1\n", kept.env)
    os.kill(kept.start(adapter), signal.SIGKILL)
    wait_for(lambda: len(kept.place.pids) == 2, "the restart")
    adapter.stop(term_grace_s=5)
    time.sleep(0.5)
    assert kept.place.alive() == []
    assert adapter.running() == []


@only_real_systemd
def test_what_systemd_is_about_to_start_counts_as_running(kept: Kept) -> None:
    adapter = kept_by_systemd(kept, "raise SystemExit(3)", "Restart=always\nRestartSec=600\n", kept.env)
    adapter.start(redis_url=URL)
    wait_for(lambda: any("auto-restart" in str(one) for one in adapter.running()), "the pause before it")
    adapter.stop(term_grace_s=1)
    assert adapter.running() == []


@only_real_systemd
def test_what_only_the_control_group_knows_runs_and_is_ended(kept: Kept) -> None:
    adapter = kept_by_systemd(kept, FAMILY, "KillMode=process\n", {})
    main = kept.start(adapter, ready=3)
    os.kill(main, signal.SIGKILL)
    wait_for(lambda: not is_alive(main), "its end")
    assert {one.pid for one in adapter.running()} == set(kept.place.pids) - {main}
    adapter.stop(term_grace_s=0.5)
    assert kept.place.alive() == []


def test_a_user_unit_is_asked_of_the_users_own_manager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    systemd = SmallSystemd(tmp_path, monkeypatch)
    systemd.keep("z", ["true"], tmp_path, {})
    called = tmp_path / "called"
    program = tmp_path / "bin" / "systemctl"
    real = program.rename(program.with_name("real"))
    program.write_text(f'#!/bin/sh\necho "$@" >> {called}\nexec {real} "$@"\n')
    program.chmod(0o755)
    for user in (True, False):
        start = {"systemd": {"unit": "z.service", "user": user}}
        config = AgentConfig.model_validate({"root": str(tmp_path), "start": start})
        assert adapter_for("z", config, tmp_path / "var").running() == []
    with_user, without = called.read_text().splitlines()
    assert with_user.startswith("--user ")
    assert "--user" not in without
