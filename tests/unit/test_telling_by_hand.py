"""Without Redis nothing remembers an alert, so a command that finds something wrong tells people itself."""

from __future__ import annotations

import io
import json
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from backup_worker.cli import _list, main
from backup_worker.demo.pager import Pager
from backup_worker.runtime import Runtime
from tests.small_fleet import SmallFleet
from tests.unit.test_scrub import flip

NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture
def fleet(tmp_path: Path) -> SmallFleet:
    return SmallFleet(tmp_path, ("z", "jay"), limits={"reserve_bytes": 0})


def command(fleet: SmallFleet, *words: str) -> tuple[int, str]:
    """Run one command; return its exit code and stdout."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(io.StringIO()):
        patch.setattr(sys, "argv", ["backup-worker", *words, "--config", str(fleet.config_dir)])
        with pytest.raises(SystemExit) as ended:
            main()
    return ended.value.code if isinstance(ended.value.code, int) else 0, out.getvalue()


def page_to(fleet: SmallFleet, pager: Pager) -> None:
    fleet.edit("backup_schedule.json", lambda document: document.update(alerts=[pager.url]))


def test_a_good_backup_pages_nobody(fleet: SmallFleet) -> None:
    with Pager() as pager:
        page_to(fleet, pager)
        assert command(fleet, "backup", "--tier", "daily")[0] == 0
        assert pager.pages == []


def test_suspect_and_failed_backups_reach_a_human_in_one_message(fleet: SmallFleet) -> None:
    (fleet.root("z") / "SOUL.md").write_text("")
    fleet.root("jay").rename(fleet.root("jay").with_name("away"))
    with Pager() as pager:
        page_to(fleet, pager)
        assert command(fleet, "backup", "--tier", "daily")[0] == 1
        ((title, body),) = pager.pages
    assert title == "[critical] 2 alerts: 1 failed, 1 suspect"
    assert "- [critical] daily backup of jay failed: the root" in body
    assert "- [critical] daily backup of z is suspect: daily/" in body
    assert "SOUL.md: required, and empty" in body
    assert "docs/runbook.md#suspect" in body
    assert [line["key"] for line in fleet.history("alert")] == ["failed/daily/jay", "suspect/daily/z"]
    assert len(fleet.history("alert-delivery")) == 1


def test_a_timer_that_fails_every_minute_does_not_page_every_minute_and_its_end_is_told(
    fleet: SmallFleet,
) -> None:
    away = fleet.root("jay").with_name("away")
    fleet.root("jay").rename(away)
    with Pager() as pager:
        page_to(fleet, pager)
        for _ in range(3):
            assert command(fleet, "backup", "--tier", "daily")[0] == 1
        assert [title for title, _ in pager.pages] == ["[critical] daily backup of jay failed"]
        (fleet.root("z") / "SOUL.md").write_text("")
        command(fleet, "backup", "--tier", "daily")
        assert pager.pages[1:][0][0] == "[critical] daily backup of z is suspect"
        away.rename(fleet.root("jay"))
        command(fleet, "backup", "z", "--tier", "daily")
        assert len(pager.pages) == 2, "a backup of z says nothing about jay"
        command(fleet, "backup", "--tier", "daily")
        assert [title for title, _ in pager.pages[2:]] == ["[resolved] daily backup of jay failed"]
        command(fleet, "backup", "jay", "--tier", "daily")
        assert len(pager.pages) == 3
    assert [line["key"] for line in fleet.history("alert-resolved")] == ["failed/daily/jay"]


def test_what_nobody_was_told_is_told_with_the_next_run(fleet: SmallFleet) -> None:
    fleet.root("jay").rename(fleet.root("jay").with_name("away"))
    fleet.edit("backup_schedule.json", lambda document: document.update(alerts=["json://127.0.0.1:1/x"]))
    assert command(fleet, "backup", "jay", "--tier", "daily")[0] == 1
    with Pager() as pager:
        page_to(fleet, pager)
        assert command(fleet, "backup", "jay", "--tier", "daily")[0] == 1
        assert len(pager.pages) == 1


@pytest.mark.parametrize(
    "damage", [b"", b"[]", b'{"a": 1}', b'{"failed/daily/jay": {"key": 3}}', b"\x00\xff{"]
)
def test_a_spoilt_memory_of_what_was_told_makes_for_a_page_too_many_and_no_error(
    fleet: SmallFleet, damage: bytes
) -> None:
    fleet.root("jay").rename(fleet.root("jay").with_name("away"))
    with Pager() as pager:
        page_to(fleet, pager)
        command(fleet, "backup", "jay", "--tier", "daily")
        (fleet.folder / "state" / "alerts-told.json").write_bytes(damage)
        assert command(fleet, "backup", "jay", "--tier", "daily")[0] == 1
        command(fleet, "backup", "jay", "--tier", "daily")
        assert len(pager.pages) == 2


def test_without_a_place_to_remember_people_are_told_each_time(fleet: SmallFleet) -> None:
    (fleet.folder / "state").write_text("not a folder")
    fleet.root("jay").rename(fleet.root("jay").with_name("away"))
    with Pager() as pager:
        page_to(fleet, pager)
        for _ in range(2):
            assert command(fleet, "backup", "jay", "--tier", "daily")[0] == 1
        assert len(pager.pages) == 2


def test_damage_found_while_backing_up_reaches_a_human(fleet: SmallFleet) -> None:
    command(fleet, "backup", "z", "--tier", "daily")
    (damaged,) = fleet.snapshots
    flip(fleet.folder / "backups" / damaged / "files" / "SOUL.md")
    with Pager() as pager:
        page_to(fleet, pager)
        assert command(fleet, "backup", "z", "--tier", "daily")[0] == 0
        ((title, body),) = pager.pages
    assert title == "[warning] daily backup of z came upon damage"
    assert damaged in body


def test_a_record_that_cannot_be_written_keeps_nobody_from_being_told(fleet: SmallFleet) -> None:
    (fleet.folder / "history.jsonl").mkdir()
    with Pager() as pager:
        page_to(fleet, pager)
        assert command(fleet, "backup", "z", "--tier", "daily")[0] == 1
        assert len(pager.pages) == 1


def test_a_failed_drill_without_redis_pages_a_human(
    fleet: SmallFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", NOWHERE)
    command(fleet, "backup", "z", "--tier", "daily")
    with Pager() as pager:
        page_to(fleet, pager)
        code, out = command(fleet, "drill", "--json")
        assert [title for title, _ in pager.pages] == ["[critical] restoring jay does not work"]
    rows = json.loads(out)
    assert (code, [(row["agent"], row["ok"]) for row in rows]) == (1, [("z", True), ("jay", False)])
    assert rows[0].keys() == {
        "agent", "ok", "from", "files", "bytes", "took_s", "problems", "health", "owners",
    }  # fmt: skip
    assert rows[1]["problems"][0]["problem"] == "there is no good snapshot of “jay”"


def test_drills_of_agents_that_are_not_there_are_exit_code_4_and_nothing_is_drilled(
    fleet: SmallFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", NOWHERE)
    assert command(fleet, "drill", "z", "ghost")[0] == 4
    assert fleet.history("drill") == []


def status(fleet: SmallFleet, now: float) -> Any:
    from backup_worker.status import overview

    return overview(Runtime(fleet.config), now)


def test_status_shows_the_ages_of_proofs_and_what_is_damaged_without_redis(
    fleet: SmallFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", NOWHERE)
    assert command(fleet, "backup", "--tier", "daily")[0] == 0
    assert command(fleet, "drill", "z")[0] == 0
    made = fleet.repository.snapshots("z")
    now = made[0].created_at + 100
    facts = status(fleet, now)
    z, jay = (row["drill"] for row in facts["agents"])
    assert (z["from"], z["last_ok"], z["overdue"], jay["proven_at"]) == (made[0].id, True, False, None)
    assert 0 < z["age_s"] <= 100
    assert 99 <= facts["scrub"]["oldest_age_s"] <= 101
    assert (facts["drills_overdue"], facts["scrub"]["overdue"], facts["scrub"]["damaged"]) == ([], 0, [])

    late = status(fleet, now + 31 * 86400)
    assert (late["drills_overdue"], late["scrub"]["overdue"]) == (["jay", "z"], 2)

    flip(fleet.folder / "backups" / made[0].id / "files" / "SOUL.md")
    command(fleet, "verify")
    assert status(fleet, now)["scrub"]["damaged"] == [made[0].id]
    code, out = command(fleet, "status")
    assert code == 1
    assert f"damaged {made[0].id}" in out


def test_a_list_says_when_a_restore_of_each_agent_was_proven(
    fleet: SmallFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", NOWHERE)
    command(fleet, "backup", "--tier", "daily")
    command(fleet, "drill", "z")
    out = command(fleet, "list")[1]
    assert re.search(r"^restore proven: jay never, z \d+ s ago$", out, re.MULTILINE)
    monkeypatch.setattr(_list, "PROOFS_NAMED", 1)
    assert re.search(
        r"^restore proven: 1 of 2 agents, the oldest \d+ s ago$", command(fleet, "list")[1], re.M
    )
