"""The report that a human reads at three in the morning."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from backup_worker.recovery import evidence
from backup_worker.recovery.evidence import Facts, why_not_used
from backup_worker.recovery.incident import Incident
from backup_worker.snapshots import Head, Problem, Scope

AT = 1_795_442_400.0
"""2026-11-23 14:00 in UTC, 15:00 in Oslo."""


def head(slot: str, **options: object) -> Head:
    facts = {
        "id": f"daily/{slot}/z", "agent": "z", "tier": "daily", "slot": slot, "created_at": AT - 3600,
        "reason": "", "status": "good", "files": 3, "bytes": 4, "scope": Scope(("**",)),
    }  # fmt: skip
    return Head(**(facts | options))


def facts(**options: object) -> Facts:
    incident = Incident("z-1", "z", AT - 60, reason="no heartbeat for 60 s", attempts=1, tried=("daily/a/z",))
    incident = incident.noted("fence", AT - 59, True, "pid 7").noted("prove", AT, False, "0 of 3 beats")
    known = Facts(incident, "1 attempts failed", AT, "Europe/Oslo")
    return replace(known, **options)


def written(folder: Path, known: Facts) -> str:
    assert str(folder / "z-1" / "REPORT.md") in evidence.write(folder / "z-1", known)
    return (folder / "z-1" / "REPORT.md").read_text()


def test_times_are_those_of_the_schedules_zone(tmp_path: Path) -> None:
    report = written(tmp_path, facts(beats=[(f"{int(AT - 30 - n)}000-0", "abc") for n in (2, 1, 0)]))
    assert "given up 2026-11-23 15:00:00 CET" in report
    assert (
        "3 of incarnation `abc` from 2026-11-23 14:59:28 CET to 2026-11-23 14:59:30 CET, 30 s before"
        in report
    )


@pytest.mark.parametrize(
    ("snapshot", "why"),
    [
        (head("b", damaged=True), "does not prove"),
        (head("b", status="suspect", problems=(Problem("SOUL.md", "is empty"),)), "SOUL.md is empty"),
        (head("b", status="partial", problems=tuple(Problem(str(n), "?") for n in range(9))), "and 6 more"),
        (head("a"), "did not live on it"),
        (head("b", created_at=AT), "after the incident was opened"),
        (head("b"), "same files as one that was, or the attempts were used up"),
    ],
)
def test_every_snapshot_stands_there_with_the_reason_why_it_was_not_used(
    tmp_path: Path, snapshot: Head, why: str
) -> None:
    assert why in why_not_used(snapshot, facts().incident)
    report = written(tmp_path, facts(snapshots=[snapshot]))
    assert f"`{snapshot.id}`" in report
    assert why in report


def test_it_says_whether_the_agent_runs_and_what_its_files_are(tmp_path: Path) -> None:
    assert "**not running**" in written(tmp_path, facts())
    assert "nothing was restored" in written(tmp_path, facts())
    known = facts(running=["pid 7 (python3 agent.py)"])
    restored = known.incident.noted("select", AT, True, "state of daily/a/z").noted("restore", AT, True)
    report = written(tmp_path, replace(known, incident=restored))
    assert "**running: pid 7 (python3 agent.py)**" in report
    assert "the last restore (state of daily/a/z)" in report


def test_what_the_agent_wrote_cannot_break_the_page(tmp_path: Path) -> None:
    report = written(tmp_path, facts(log_lines=["```", "# not a heading"]))
    assert not [line for line in report.splitlines() if line.startswith(("```", "# not"))]


def test_nothing_known_is_said_as_such(tmp_path: Path) -> None:
    report = written(tmp_path, facts(snapshots=None))
    for text in (
        "repository could not be read",
        "None in the last hour",
        "wrote nothing",
        "Nothing was changed",
    ):
        assert text in report


def test_a_machine_gets_the_same_facts_and_only_the_owner_reads_them(tmp_path: Path) -> None:
    evidence.write(tmp_path / "z-1", facts(snapshots=[head("a")], beats=[("1000-0", "abc")]))
    path = tmp_path / "z-1" / "REPORT.md"
    known = json.loads((path.parent / "incident.json").read_text())
    assert known["incident"]["state"] == "escalated"
    assert known["snapshots"][0]["why_not"] == "it was restored, and the agent did not live on it"
    assert known["last_heartbeats"] == [{"entry": "1000-0", "at": 1.0, "incarnation": "abc"}]
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in path.parent.iterdir())


def test_evidence_that_cannot_be_written_does_not_stop_the_page(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "z-1").write_text("in the way")
    evidence.write(tmp_path / "z-1", facts())
    assert "cannot be written" in caplog.text


def test_approved_changes_that_the_restored_state_does_not_hold_are_in_the_report(tmp_path: Path) -> None:
    known = facts()
    missed = replace(known, incident=replace(known.incident, missed=("c1 (mode), approved by kari",)))
    assert "- c1 (mode), approved by kari" in written(tmp_path, missed)
    assert json.loads((tmp_path / "z-1" / "incident.json").read_text())["incident"]["missed_changes"]
