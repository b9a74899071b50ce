"""An agent's own commands around its backup: the second one always runs, and what they say is not lost."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backup_worker.config import load
from backup_worker.snapshots import Hook, Manifest, NoSpace, SnapshotError, take_snapshot
from backup_worker.snapshots.sanity import Limits
from em_bridge import clock
from em_bridge.errors import ConfigError
from tests.agent_on_disk import NOON, Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path).fill()


def python(code: str, timeout_s: float = 10) -> Hook:
    return Hook((sys.executable, "-c", code), timeout_s)


def take(place: Place, *, before: Hook | None = None, after: Hook | None = None, **options: Any) -> Manifest:
    agent = replace(place.agent, before_backup=before, after_backup=after)
    return take_snapshot(
        place.repo,
        agent,
        tier="daily",
        slot="s",
        include=["*"],
        unchanged="copy",
        now=NOON,
        reason="test",
        **options,
    )


FLUSH = "import os; open('memory/flushed.md', 'w').write(os.environ['AGENT_ID'])"
RESUME = "open('venv', 'a').write('resumed ')"


def resumed(place: Place) -> int:
    file = place.root / "venv"
    return file.read_text().count("resumed") if file.exists() else 0


def test_what_the_first_hook_writes_is_in_the_backup_and_the_second_runs_afterwards(place: Place) -> None:
    made = take(place, before=python(FLUSH), after=python("import os; os.remove('memory/flushed.md')"))
    assert place.stored(made.id, "memory/flushed.md").read_text() == "z"
    assert not (place.root / "memory/flushed.md").exists()
    assert (made.status, made.warnings) == ("good", ())


def test_what_the_first_hook_refuses_is_not_backed_up_and_its_output_is_in_the_error(place: Place) -> None:
    refuse = python("print('the queue is not empty'); raise SystemExit(3)")
    with pytest.raises(SnapshotError, match=r"before_backup .* ended with 3: the queue is not empty"):
        take(place, before=refuse, after=python(RESUME))
    assert place.repo.snapshots() == []
    assert place.repo.failing() == {("z", "daily")}
    assert resumed(place) == 1


def test_the_second_hook_runs_after_a_backup_that_fails(place: Place) -> None:
    with pytest.raises(NoSpace):
        take(place, after=python(RESUME), limits=Limits(reserve_bytes=1 << 60))
    assert resumed(place) == 1


def test_both_failures_are_told(place: Place) -> None:
    with pytest.raises(SnapshotError, match=r"before_backup .*: one.* after_backup .*: two"):
        take(place, before=python("raise SystemExit('one')"), after=python("raise SystemExit('two')"))


def test_a_second_hook_that_fails_is_a_warning_of_a_sound_snapshot(place: Place) -> None:
    made = take(place, after=python("raise SystemExit('cannot resume')"))
    assert made.status == "good"
    assert "cannot resume" in place.repo.get(made.id).warnings[0]


def test_a_hook_that_hangs_is_killed_with_its_children(place: Place) -> None:
    hang = (
        "import subprocess as s, time; s.Popen(['sleep', '60']); print('hanging', flush=True); time.sleep(60)"
    )
    begun = clock.monotonic()
    with pytest.raises(SnapshotError, match=r"took longer than 0.4 s: hanging"):
        take(place, before=python(hang, 0.4))
    assert clock.monotonic() - begun < 10


def test_a_hook_that_is_no_program_is_said(place: Place) -> None:
    with pytest.raises(SnapshotError, match="cannot be run: no such file"):
        take(place, before=Hook(("/no/such/program",)))


def test_the_configuration_names_hooks_and_refuses_what_is_none(tmp_path: Path) -> None:
    daily = {"cron": "0 7 * * *", "include": ["*"], "slot": "%Y-%m-%d", "keep": 2}
    schedule = {"timezone": "UTC", "repository": "r", "history": "h", "tiers": {"daily": daily}}
    (tmp_path / "backup_schedule.json").write_text(json.dumps(schedule))

    def configured(hook: Any) -> Hook | None:
        agents = {"agents": {"z": {"root": "z", "before_backup": hook}}}
        (tmp_path / "agents.json").write_text(json.dumps(agents))
        return load(tmp_path).files_of("z").before_backup

    assert configured({"command": ["true"]}) == Hook(("true",), 60)
    assert configured({"command": ["sleep", "1"], "timeout": 5}) == Hook(("sleep", "1"), 5)
    for bad in ({"command": []}, {"command": "true"}, {"timeout": 5}, {"command": ["true"], "timeout": 0}):
        with pytest.raises(ConfigError, match="before_backup"):
            configured(bad)
