"""Recoveries of real agents, on a real server and a real repository: what must hold when things go wrong."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from backup_worker import alerts, backups
from backup_worker.queueing.due import STREAM, IncidentDue
from backup_worker.recovery.incident import (
    AGAIN_AFTER_S,
    DEADLINES,
    ESCALATED,
    MAX_RESUMES,
    QUEUED_AGAIN_S,
    RECOVERED,
)
from backup_worker.recovery.locks import acting_on
from em_bridge.events import decode
from tests.integration.conftest import ValkeyServer
from tests.integration.dying_worker import POINTS, worker_that_dies
from tests.living_fleet import Fleet, cli, steps, wait_for


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


def test_memory_alone_is_no_state_to_go_back_to_where_the_charter_is_gone(fleet: Fleet) -> None:
    fleet.add("z", files={"memory": ["memory/**"]})
    schedule = fleet.folder / "config" / "backup_schedule.json"
    document = json.loads(schedule.read_text())
    document["tiers"]["daily"] = {"cron": "0 7 * * *", "include": ["memory"], "slot": "%Y-%m-%d", "keep": 9}
    schedule.write_text(json.dumps(document))
    daily = backups.by_hand(fleet.runtime, "z", "daily", now=time.time()).id
    (fleet.root("z") / "memory" / "notes.md").unlink()
    assert fleet.recover("z").chosen == (daily,), "the charter stands there"
    fleet.kill("z")
    (fleet.root("z") / "SOUL.md").write_text("")
    incident = fleet.recover("z")
    assert incident.state == ESCALATED
    assert f"{daily} does not hold “SOUL.md”" in incident.steps[-1].detail
    assert fleet.running("z") == []


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


@contextlib.contextmanager
def disk(folder: Path, size: int, *, left: int) -> Iterator[None]:
    """Put `folder` on a disk of `size` bytes, of which `left` are free."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("a small disk takes the right to mount one")
    try:
        (folder / "locks").mkdir()
        with contextlib.suppress(OSError), (folder / "others").open("wb", buffering=0) as file:
            while file.tell() < size - left:
                file.write(bytes(4096))
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("left", [0, 400_000])
def test_a_full_disk_while_evidence_is_kept_stops_the_restore_and_calls_a_human(
    fleet: Fleet, left: int
) -> None:
    fleet.add("z")
    (fleet.root("z") / "memory" / "long").write_bytes(os.urandom(1_000_000))
    older, newer = fleet.backup("z"), fleet.backup("z")
    assert older != newer
    fleet.wipe("z")
    before = fleet.files("z")
    with disk(fleet.state, 2_000_000, left=left):
        incident = fleet.recover("z")
        report = Path(incident.evidence[-1]) / "REPORT.md"
        # Where there is no room for a report either, the human is told so, and is called all the same.
        assert report.exists() == (left > 0)
        [told] = [one for one in alerts.open_alerts(fleet.client) if one.key == "escalation/z"]
        assert (str(report) in told.body) == (left > 0)
    assert incident.state == ESCALATED
    assert fleet.files("z") == before
    # No other state is tried for want of space: it would only be an older one.
    assert steps(incident) == ["open", "fence", "select", "restore!"]
    assert incident.tried == ()


def test_who_finds_another_worker_at_work_has_it_looked_at_again_soon(fleet: Fleet) -> None:
    fleet.add("z")
    opened = fleet.open("z")
    # A job was sent for, so nobody else would look for a while.
    fleet.client.zadd(DEADLINES, {opened.id: time.time() + QUEUED_AGAIN_S})
    with acting_on("z", fleet.state):
        fleet.service.advance(opened.id)
    at = fleet.client.zscore(DEADLINES, opened.id)
    assert at is not None
    assert at <= time.time() + AGAIN_AFTER_S


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
