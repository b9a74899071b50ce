"""Recoveries of real agents, on a real server and a real repository: what must hold when things go wrong."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from backup_worker.due import STREAM, IncidentDue
from backup_worker.recovery import processes
from backup_worker.recovery.incident import CURRENT, ESCALATED, MAX_RESUMES, RECOVERED, IncidentStore
from backup_worker.recovery.locks import acting_on
from backup_worker.runtime import Runtime
from backup_worker.snapshots import evidence, swap
from em_bridge import streams
from em_bridge.connection import connect
from em_bridge.events import Heartbeat, decode
from tests.integration.conftest import ValkeyServer
from tests.living_fleet import Fleet, steps, wait_for


@pytest.fixture
def fleet(valkey: ValkeyServer, tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, valkey.url)
    yield fleet
    fleet.close()


def test_a_wiped_agent_comes_back_equal_to_its_backup_and_what_stood_there_is_kept(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.start("z")
    snapshot = fleet.backup("z")
    whole = fleet.files("z")
    fleet.wipe("z")
    wiped = fleet.files("z")
    fleet.kill("z")
    incident = fleet.recover("z")
    assert incident.state == RECOVERED, incident.steps
    assert incident.chosen == (snapshot,)
    assert fleet.files("z") == whole
    kept = Path(incident.evidence[0])
    assert {str(p.relative_to(kept)): p.read_bytes() for p in kept.rglob("*") if p.is_file()} == wiped
    assert len(fleet.running("z")) == 1
    assert fleet.alerts() == []


def test_a_recovery_is_told_and_recorded_from_its_beginning(fleet: Fleet) -> None:
    fleet.add("z", mode="silent")
    fleet.backup("z")
    opened = fleet.open("z", "no heartbeat for 60 s")
    fleet.service.advance(opened.id)
    assert fleet.alerts() == ["recovery/z"]
    first = fleet.history()[0]
    assert (first["incident"], first["step"], first["detail"]) == (opened.id, "open", "no heartbeat for 60 s")


def test_a_program_that_does_not_exist_escalates_instead_of_being_tried_for_ever(fleet: Fleet) -> None:
    fleet.add("z", start={"command": ["no-such-program"]})
    fleet.backup("z")
    incident = fleet.recover("z")
    assert incident.state == ESCALATED
    failed = next(step for step in incident.steps if step.step == "start")
    assert not failed.ok
    assert "no such file" in failed.detail
    assert not any(key.startswith("recovery/") for key in fleet.alerts())


def test_an_agent_whose_only_process_has_ended_is_not_recovered_by_its_beats(fleet: Fleet) -> None:
    fleet.add("z", mode="fade", heartbeat={"stable_beats": 4})
    fleet.backup("z")
    opened = fleet.open("z")
    fleet.service.advance(opened.id)
    wait_for(lambda: not fleet.running("z"), "z to end")
    incident = fleet.drive(opened.id)[0]
    assert incident.state == ESCALATED, steps(incident)


# ── which state ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_state_that_dies_at_its_start_gives_way_to_the_next_older_one(fleet: Fleet) -> None:
    fleet.add("z")
    old = fleet.backup("z")
    fleet.set_mode("z", "die")
    new = fleet.backup("z")
    incident = fleet.recover("z")
    assert incident.state == RECOVERED, incident.steps
    assert incident.attempts == 2
    assert incident.tried == (new,)
    assert incident.chosen == (old,)
    assert "this state kills me" in next(one for one in incident.steps if not one.ok).detail


def test_when_every_state_is_bad_a_human_gets_everything_and_the_files_stay_untouched(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.backup("z")
    damaged = fleet.folder / "backups" / fleet.backup("z") / "files" / "SOUL.md"
    damaged.chmod(0o600)
    for file in (fleet.folder / "backups").rglob("files/SOUL.md"):
        file.chmod(0o600)
        file.write_text("I am somebody else.\n")
    fleet.wipe("z")
    suspect = fleet.backup("z")
    before = fleet.files("z")
    incident = fleet.recover("z")
    assert incident.state == ESCALATED
    assert fleet.files("z") == before
    folder = Path(incident.evidence[-1])
    report = (folder / "REPORT.md").read_text()
    facts = json.loads((folder / "incident.json").read_text())
    snapshots = {one["id"]: one["status"] for one in facts["snapshots"]}
    assert sorted(snapshots.values()) == ["damaged", "damaged", "suspect"]
    assert snapshots[suspect] == "suspect"
    for identifier in snapshots:
        assert f"`{identifier}`" in report
    assert "SOUL.md" in report
    assert "**not running**" in report
    assert "nothing was restored" in report
    assert "escalation/z" in fleet.alerts()
    assert "recovery/z" not in fleet.alerts()
    assert [line["step"] for line in fleet.history()][-1] == ESCALATED


def test_an_agent_that_stays_silent_is_tried_again_after_its_deadline_and_then_left_stopped(
    fleet: Fleet,
) -> None:
    fleet.add("z", mode="silent", heartbeat={"verify_within": 0.5}, recovery={"attempts": 2})
    fleet.backup("z")
    fleet.set_mode("z", "die")
    fleet.backup("z")
    incident = fleet.recover("z")
    assert incident.state == ESCALATED
    assert incident.attempts == 2
    assert "0 of 3 beats within 0.5 s" in [one for one in incident.steps if one.step == "prove"][-1].detail
    assert fleet.running("z") == []


def test_an_agent_that_merely_crashed_keeps_what_it_learned_since_the_backup(fleet: Fleet) -> None:
    fleet.add("z", recovery={"first_try": "current"})
    fleet.backup("z")
    (fleet.root("z") / "memory" / "since.md").write_text("learned a minute ago\n")
    before = fleet.files("z")
    incident = fleet.recover("z")
    assert incident.state == RECOVERED
    assert incident.chosen == (CURRENT,)
    assert fleet.files("z") == before
    assert incident.evidence == ()


def test_a_current_state_that_is_not_sane_is_not_started_on(fleet: Fleet) -> None:
    fleet.add("z", recovery={"first_try": "current"})
    snapshot = fleet.backup("z")
    whole = fleet.files("z")
    fleet.wipe("z")
    incident = fleet.recover("z")
    assert incident.state == RECOVERED
    assert incident.attempts == 1
    assert incident.chosen == (snapshot,)
    assert fleet.files("z") == whole
    assert steps(incident)[:4] == ["open", "fence", "select!", "select"]


def test_a_current_state_that_dies_is_replaced_by_the_newest_backup(fleet: Fleet) -> None:
    fleet.add("z", recovery={"first_try": "current"})
    snapshot = fleet.backup("z")
    fleet.set_mode("z", "die")
    incident = fleet.recover("z")
    assert incident.state == RECOVERED
    assert incident.tried == (CURRENT,)
    assert incident.chosen == (snapshot,)


def test_an_insane_current_state_stays_on_the_record_when_there_is_no_backup_either(fleet: Fleet) -> None:
    fleet.add("z", recovery={"first_try": "current"})
    fleet.wipe("z")
    incident = fleet.recover("z")
    assert incident.state == ESCALATED
    assert steps(incident) == ["open", "fence", "select!", "select!"]


@pytest.mark.parametrize("critical", [True, False])
def test_a_critical_agent_calls_a_human_at_its_first_failure_and_still_comes_back(
    fleet: Fleet, critical: bool
) -> None:
    fleet.add("z", critical=critical, heartbeat={"stable_beats": 40})
    fleet.backup("z")
    fleet.set_mode("z", "die")
    bad = fleet.backup("z")
    opened = fleet.open("z")
    wait_for(lambda: fleet.service.advance(opened.id).attempts == 1, "the first failure")
    report = fleet.state / "evidence" / opened.id / "REPORT.md"
    assert ("attempt/z" in fleet.alerts()) == report.exists() == critical
    if critical:
        assert "# z did not come back; its recovery goes on" in report.read_text()
        assert f"`{bad}`" in report.read_text()
        assert json.loads(report.with_name("incident.json").read_text())["incident"]["state"] == "open"
    assert fleet.drive(opened.id)[0].state == RECOVERED
    assert fleet.alerts() == []


def test_a_critical_agent_that_cannot_be_recovered_is_escalated_once_in_the_end(fleet: Fleet) -> None:
    fleet.add("z", mode="die", critical=True, recovery={"attempts": 2, "first_try": "current"})
    fleet.backup("z")
    fleet.wipe("z")
    (fleet.root("z") / "SOUL.md").write_text("I am z.\n")
    incident = fleet.recover("z")
    assert incident.state == ESCALATED
    assert fleet.alerts() == ["escalation/z"]
    told = [line["key"] for line in fleet.history("alert")]
    assert told == ["recovery/z", "attempt/z", "escalation/z"]


# ── who lives ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_beats_of_the_old_incarnation_never_count(fleet: Fleet) -> None:
    fleet.add("z", mode="silent", heartbeat={"verify_within": 1.0}, recovery={"attempts": 1})
    fleet.backup("z")
    streams.append(fleet.client, Heartbeat("z", "old", 1))
    opened = fleet.open("z")
    for number in range(10):
        streams.append(fleet.client, Heartbeat("z", "old", 2 + number))
        fleet.service.advance(opened.id)
    incident = fleet.drive(opened.id)[0]
    assert incident.state == ESCALATED
    assert "old" in incident.old_incarnations


def test_one_that_is_started_by_hand_during_a_recovery_is_never_a_second_one(fleet: Fleet) -> None:
    fleet.add("z", heartbeat={"stable_beats": 100})
    fleet.backup("z")
    opened = fleet.open("z")
    fleet.service.advance(opened.id)
    assert fleet.service.store.get(opened.id).phase == "prove"
    command = fleet.entries["z"]["start"]["command"]
    environment = {**os.environ, "REDIS_URL": fleet.url, "AGENT_ID": "z"}
    by_hand = subprocess.Popen(command, cwd=fleet.root("z"), env=environment)
    try:
        fleet.entries["z"]["heartbeat"]["stable_beats"] = 3
        fleet.write()
        wait_for(lambda: len(fleet.running("z")) == 2, "two of them")
        incident = fleet.drive(opened.id)[0]
        assert incident.state == RECOVERED, incident.steps
        assert by_hand.wait(5) is not None
        assert len(fleet.running("z")) == 1
        assert incident.attempts == 2
        assert incident.tried == ()
        assert any(str(by_hand.pid) in one.detail for one in incident.steps if not one.ok)
    finally:
        by_hand.kill()
        by_hand.wait()


def test_one_that_is_started_by_hand_before_the_start_is_ended_first(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.add("jay", depends_on=["z"])
    fleet.backup("jay")
    opened = fleet.open("jay")
    fleet.service.advance(opened.id)
    assert fleet.service.store.get(opened.id).phase == "depend"
    environment = {**os.environ, "REDIS_URL": fleet.url, "AGENT_ID": "jay"}
    by_hand = subprocess.Popen([sys.executable, "agent.py"], cwd=fleet.root("jay"), env=environment)
    fleet.start("z")
    incident = fleet.drive(opened.id)[0]
    assert incident.state == RECOVERED
    assert incident.attempts == 1
    assert by_hand.wait(5) is not None
    assert len(fleet.running("jay")) == 1


def test_a_living_agent_is_not_restored_over(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.backup("z")
    pid = fleet.start("z")
    fleet.wipe("z")
    before = fleet.files("z")
    result = cli(fleet, "restore", "z")
    assert result.returncode == 1
    assert f"pid {pid}" in result.stderr
    assert fleet.files("z") == before


def test_nothing_is_restored_by_hand_while_a_recovery_is_at_work(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.backup("z")
    fleet.wipe("z")
    before = fleet.files("z")
    with acting_on("z", fleet.state) as held:
        assert held
        assert fleet.service.advance(fleet.open("z").id).phase == "fence"
        result = cli(fleet, "restore", "z")
    assert result.returncode == 1
    assert "a recovery of “z” is at work" in result.stderr
    assert fleet.files("z") == before


def test_one_that_beats_but_is_not_well_is_not_recovered_until_it_is(fleet: Fleet) -> None:
    health = (
        "import os, sys; print('warming up'); sys.exit(not os.path.exists(os.environ['AGENT_ID'] + '.warm'))"
    )
    fleet.add("z", health=[sys.executable, "-c", health])
    fleet.backup("z")
    opened = fleet.open("z")
    wait_for(lambda: "health!" in steps(fleet.service.advance(opened.id)), "the first examination")
    assert [one.detail for one in fleet.service.store.get(opened.id).steps][
        -1
    ] == "health: exit code 1: warming up"
    fleet.service.advance(opened.id)
    (fleet.root("z") / "z.warm").touch()
    incident = fleet.drive(opened.id)[0]
    assert incident.state == RECOVERED
    assert incident.attempts == 1
    assert steps(incident)[-3:] == ["start", "health!", "prove"], "an answer is kept once"
    assert "health: exit code 0: warming up" in incident.steps[-1].detail


def test_a_state_on_which_the_agent_beats_but_is_never_well_gives_way_to_an_older_one(fleet: Fleet) -> None:
    health = "import sys; sys.exit('poison' if 'poison' in open('SOUL.md').read() else 0)"
    fleet.add("z", health=[sys.executable, "-c", health], heartbeat={"verify_within": 1.5})
    old = fleet.backup("z")
    (fleet.root("z") / "SOUL.md").write_text("I am poison.\n")
    new = fleet.backup("z")
    incident = fleet.recover("z")
    assert incident.state == RECOVERED
    assert (incident.tried, incident.chosen) == ((new,), (old,))
    failed = next(one for one in incident.steps if one.step == "prove" and not one.ok)
    assert "beats within 1.5 s: health: exit code 1: poison" in failed.detail


def test_one_that_dies_while_it_is_examined_is_not_recovered(fleet: Fleet) -> None:
    health = "import os, signal; os.kill(int(open('pid').read()), signal.SIGKILL)"
    fleet.add("z", health=[sys.executable, "-c", health], recovery={"attempts": 1})
    program = fleet.root("z") / "agent.py"
    program.write_text("import os; open('pid', 'w').write(str(os.getpid()))\n" + program.read_text())
    fleet.backup("z")
    incident = fleet.recover("z")
    assert incident.state == ESCALATED
    assert "the new process has ended" in fleet.history()[-1]["detail"]


# ── who needs whom ──────────────────────────────────────────────────────────────────────────────────────────────


def test_an_agent_starts_only_after_what_it_needs_has_proven_that_it_lives(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.add("jay", depends_on=["z"])
    fleet.backup("z")
    fleet.backup("jay")
    jay, z = fleet.drive(fleet.open("jay").id, fleet.open("z").id)
    assert (jay.state, z.state) == (RECOVERED, RECOVERED)
    assert "wait" in steps(jay)
    started = next(one.at for one in jay.steps if one.step == "start")
    assert started >= next(one.at for one in z.steps if one.step == "prove")


def test_what_needs_an_agent_that_was_given_up_is_held_and_starts_when_that_one_is_back(fleet: Fleet) -> None:
    fleet.add("z", mode="die", recovery={"attempts": 1})
    fleet.add("jay", depends_on=["z"])
    fleet.backup("z")
    fleet.backup("jay")
    jay = fleet.open("jay")
    assert fleet.recover("z").state == ESCALATED
    held = fleet.service.advance(jay.id)
    assert (held.is_open, steps(held)[-1]) == (True, "hold")
    assert "z, which could not be recovered" in held.steps[-1].detail
    assert fleet.running("jay") == []
    # Looking again says nothing new.
    assert steps(fleet.service.advance(jay.id)) == steps(held)
    fleet.set_mode("z", "beat")
    fleet.backup("z")
    again = fleet.open("z")
    jay, z = fleet.drive(jay.id, again.id)
    assert (jay.state, z.state) == (RECOVERED, RECOVERED)


def test_one_that_may_live_without_what_it_needs_is_started_all_the_same(fleet: Fleet) -> None:
    fleet.add("z", mode="die", recovery={"attempts": 1})
    fleet.add("jay", depends_on=["z"], recovery={"without_dependencies": "start"})
    fleet.backup("z")
    fleet.backup("jay")
    jay, z = fleet.drive(fleet.open("jay").id, fleet.open("z").id)
    assert (jay.state, z.state) == (RECOVERED, ESCALATED)
    assert "depend!" in steps(jay)


def test_a_need_that_never_beats_is_given_up_when_its_death_would_have_been_noticed(fleet: Fleet) -> None:
    fleet.add("z", heartbeat={"dead_after": 0.5})
    fleet.add("jay", depends_on=["z"], heartbeat={"verify_within": 0.5})
    fleet.backup("jay")
    incident = fleet.recover("jay")
    assert incident.state == ESCALATED
    waited = next(one for one in incident.steps if one.step == "depend")
    assert not waited.ok
    assert "no beat of z" in waited.detail
    assert waited.at - next(one.at for one in incident.steps if one.step == "wait") >= 0.95


# ── opening ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_word_of_a_death_from_before_the_last_recovery_opens_nothing(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.backup("z")
    incident = fleet.recover("z")
    assert incident.closed_at
    assert fleet.service.on_state("z", "DEAD", "late", incident.closed_at - 0.01) is None
    assert fleet.service.store.open_ids() == {}
    assert fleet.service.on_state("z", "DEAD", "again", incident.closed_at + 0.01) != incident.id


def test_ten_words_of_one_death_and_three_by_hand_make_one_incident(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.backup("z")
    now = time.time()

    def tell(number: int) -> None:
        service = fleet.service
        if number % 4 == 3:
            service.open("z", "by hand")
        else:
            service.on_state("z", "DEAD", f"word {number}", now)

    with ThreadPoolExecutor(13) as pool:
        list(pool.map(tell, range(13)))
    (incident,) = fleet.service.store.all()
    assert fleet.drive(incident.id)[0].state == RECOVERED
    assert len(list(fleet.service.store.all())) == 1
    assert len(fleet.running("z")) == 1


def test_a_recovery_by_hand_is_put_before_the_workers_at_once(fleet: Fleet) -> None:
    fleet.add("z")
    incident = fleet.open("z")
    rows: Any = fleet.client.xrange(STREAM)
    assert [decode(fields) for _, fields in rows] == [IncidentDue(incident.id)]


# ── what is not there ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("start", "why"),
    [
        (None, "has no `start`"),
        ({"supervisord": {"program": "z", "server": "unix:///nowhere.sock"}}, "cannot be asked"),
    ],
)
def test_an_agent_that_cannot_be_proven_gone_is_left_alone_and_escalated(
    fleet: Fleet, start: dict[str, Any] | None, why: str
) -> None:
    fleet.add("z", start=start)
    fleet.backup("z")
    fleet.wipe("z")
    before = fleet.files("z")
    incident = fleet.recover("z")
    assert incident.state == ESCALATED
    assert steps(incident) == ["open", "fence!"]
    assert why in incident.steps[-1].detail
    assert fleet.files("z") == before
    report = (Path(incident.evidence[-1]) / "REPORT.md").read_text()
    assert "Whether it runs is not known" in report
    by_hand = cli(fleet, "restore", "z")
    assert (by_hand.returncode == 1) == (start is not None), by_hand.stderr


def test_an_agent_that_left_the_configuration_is_given_to_a_human(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.add("jay")
    fleet.backup("z")
    opened = fleet.open("z")
    del fleet.entries["z"]
    fleet.write()
    incident = fleet.drive(opened.id)[0]
    assert incident.state == ESCALATED
    assert "no longer in agents.json" in (Path(incident.evidence[-1]) / "REPORT.md").read_text()


def test_a_full_disk_while_evidence_is_kept_stops_the_restore_and_calls_a_human(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.add("z")
    older, newer = fleet.backup("z"), fleet.backup("z")
    assert older != newer
    fleet.wipe("z")
    before = fleet.files("z")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("backup_worker.snapshots.evidence._copy_evidence", full)
    incident = fleet.recover("z")
    assert incident.state == ESCALATED
    assert fleet.files("z") == before
    # No other state is tried for want of space: it would only be an older one.
    assert steps(incident) == ["open", "fence", "select", "restore!"]
    assert incident.tried == ()
    assert (Path(incident.evidence[-1]) / "REPORT.md").exists()


# ── workers that die ────────────────────────────────────────────────────────────────────────────────────────────


def die_at(number: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a wrapper that ends this process for good right before (odd) or right after (even) a call."""
    calls = itertools.count(1)

    def wrapper(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **options)
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    return wrapper


POINTS = {
    "a write of the incident": (IncidentStore, "save"),
    "the record": (Runtime, "record"),
    "the fence": (processes, "fence"),
    "copying evidence": (evidence, "_copy_evidence"),
    "keeping evidence": (evidence, "_appear"),
    "the swap": (swap, "swap"),
    "the start": (processes, "_write_record"),
}


def worker_that_dies(fleet: Fleet, incident: str, point: str, number: int) -> bool:
    """Advance the incident in a process that is killed at the `number`th moment of `point`; False if it never was."""
    child = os.fork()
    if child == 0:
        owner, name = POINTS[point]
        setattr(owner, name, die_at(number)(getattr(owner, name)))
        code = 1
        with contextlib.suppress(BaseException):
            mine = Fleet.__new__(Fleet)
            mine.__dict__ |= fleet.__dict__ | {"client": connect(fleet.url)}
            mine.drive(incident, pause_s=0.3)
            code = 0
        os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "the worker failed by itself"
    return False


@pytest.mark.parametrize("point", POINTS)
def test_a_worker_may_be_killed_at_any_moment(fleet: Fleet, point: str) -> None:
    fleet.add("z", heartbeat={"stable_beats": 2})
    fleet.backup("z")
    whole = fleet.files("z")
    for number in itertools.count(1):
        fleet.wipe("z")
        wiped = fleet.files("z")
        opened = fleet.open("z", f"killed at moment {number} of {point}")
        was_killed = worker_that_dies(fleet, opened.id, point, number)
        incident = fleet.drive(opened.id)[0]
        assert incident.state == RECOVERED, (number, incident.steps)
        assert incident.attempts == 1, (number, incident.steps)
        assert fleet.files("z") == whole, number
        assert len(fleet.running("z")) == 1, number
        kept = Path(incident.evidence[0])
        assert {str(p.relative_to(kept)): p.read_bytes() for p in kept.rglob("*") if p.is_file()} == wiped
        assert fleet.alerts() == [], number
        assert fleet.history()[-1]["step"] == RECOVERED
        if not was_killed:
            break
    # The loop really went through moments.
    assert number > 2


def test_what_kills_every_worker_is_given_to_a_human(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.backup("z")
    opened = fleet.open("z")
    for _ in range(MAX_RESUMES):
        assert worker_that_dies(fleet, opened.id, "the fence", 1)
    incident = fleet.drive(opened.id)[0]
    assert incident.state == ESCALATED
    assert f"begun {MAX_RESUMES} times" in fleet.history()[-1]["detail"]


def test_a_server_that_is_killed_in_the_middle_is_waited_out(fleet: Fleet, valkey: ValkeyServer) -> None:
    fleet.add("z")
    fleet.backup("z")
    fleet.wipe("z")
    opened = fleet.open("z")
    fleet.service.advance(opened.id)
    valkey.restart()
    incident = fleet.drive(opened.id)[0]
    assert incident.state == RECOVERED
    assert len(fleet.running("z")) == 1


# ── the commands ────────────────────────────────────────────────────────────────────────────────────────────────


def cli(fleet: Fleet, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "backup_worker", *arguments, "--config", str(fleet.folder / "config")]
    environment = {**os.environ, "REDIS_URL": fleet.url}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_recover_names_an_unknown_agent_before_it_opens_anything(fleet: Fleet) -> None:
    fleet.add("z")
    result = cli(fleet, "recover", "z", "nobody", "--redis-url", fleet.url)
    assert result.returncode == 4
    assert "nobody" in result.stderr
    assert fleet.service.store.open_ids() == {}


@pytest.mark.parametrize(("mode", "code", "state"), [("beat", 0, RECOVERED), ("die", 1, ESCALATED)])
def test_recover_waits_for_the_end_and_says_which(fleet: Fleet, mode: str, code: int, state: str) -> None:
    fleet.add("z", mode=mode, recovery={"attempts": 1})
    fleet.backup("z")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cli, fleet, "recover", "z", "z", "--wait", "--json", "--redis-url", fleet.url)
        wait_for(lambda: bool(fleet.service.store.open_ids()), "the incident")
        fleet.drive(*fleet.service.store.open_ids().values())
        result = waiting.result()
    assert result.returncode == code, result.stderr
    assert [one["state"] for one in json.loads(result.stdout)] == [state]
