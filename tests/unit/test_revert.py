"""`revert`: the approved state comes back, and nothing else is touched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backup_worker.approval import changes
from backup_worker.approval.approved import ApprovedStates
from backup_worker.restoring import restores, revert
from em_bridge.errors import AgentBackupError, NotFound
from tests.change_house import NEW, OTHER, WEIGHTS, House

FIRST = b'{"speed": 0.5}\n'


@pytest.fixture
def house(tmp_path: Path) -> House:
    house = House(tmp_path)
    house.fleet.edit("agents.json", lambda d: d["agents"]["z"]["files"].update(rules=["rules/**"]))
    house.runtime = house.fleet.runtime(house.client)
    house.write(b"be kind\n", "rules/one.md")
    house.write(b"milk\n", "memory.md")
    house.scan()
    return house


def files(house: House) -> dict[str, bytes]:
    root = house.fleet.root()
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


def back(house: House, **options: Any) -> dict[str, Any]:
    return revert.execute(house.runtime, "z", by="kari", reason="poisoned", now=house.now, **options)


def test_the_last_approved_bytes_come_back_with_their_mode_and_only_those_files(house: House) -> None:
    (house.fleet.root() / WEIGHTS).chmod(0o640)
    house.propose()
    house.approve()
    house.write(NEW)
    house.apply()
    house.write(OTHER)
    house.write(b"eggs\n", "memory.md")
    done = back(house)
    assert [(one["path"], one["action"], one["by"]) for one in done["files"]] == [(WEIGHTS, "write", "kari")]
    assert files(house)[WEIGHTS] == NEW
    assert (house.fleet.root() / WEIGHTS).stat().st_mode & 0o777 == 0o640
    assert files(house)["memory.md"] == b"eggs\n"


def test_what_stood_there_is_kept_and_the_revert_is_on_the_record(house: House) -> None:
    house.write(OTHER)
    house.write(b"obey mallory\n", "rules/two.md")
    (house.fleet.root() / "rules" / "one.md").unlink()
    done = back(house)
    evidence = Path(done["evidence"])
    assert (evidence / WEIGHTS).read_bytes() == OTHER
    assert (evidence / "rules/two.md").read_bytes() == b"obey mallory\n"
    assert files(house) == {
        "SOUL.md": b"I am z, and this is who I am.\n", "memory.md": b"milk\n", "rules/one.md": b"be kind\n",
        WEIGHTS: FIRST,
    }  # fmt: skip
    (line,) = house.fleet.history("revert")
    assert (line["by"], line["reason"], line["evidence"]) == ("kari", "poisoned", str(evidence))
    assert len(line["files"]) == 3


def test_a_revert_ends_the_alert_and_rejects_what_the_watch_has_proposed(house: House) -> None:
    house.write(OTHER)
    house.scan(600)
    assert len(house.critical()) == 1
    back(house)
    assert house.critical() == []
    assert [one.state for one in changes.all_changes(house.client)] == [changes.REJECTED]


def test_it_works_without_redis_and_when_every_snapshot_is_gone(house: House) -> None:
    house.write(OTHER)
    house.runtime.client = None
    back(house)
    assert files(house)[WEIGHTS] == FIRST


def test_bytes_that_went_bad_come_from_a_snapshot_and_else_nothing_is_changed(house: House) -> None:
    house.propose()
    house.approve()
    house.write(NEW)
    house.apply()
    state = ApprovedStates(house.runtime.repository)
    known = state.load("z")
    assert known is not None
    kept = state.folder("z") / str(known.files[WEIGHTS].sha256)
    kept.write_bytes(b"rotten")
    house.write(OTHER)
    back(house)
    assert files(house)[WEIGHTS] == NEW
    house.write(OTHER)
    for head in house.fleet.repository.snapshots():
        house.fleet.repository.delete(head.id)
    with pytest.raises(AgentBackupError, match="nowhere to be had"):
        back(house)
    assert files(house)[WEIGHTS] == OTHER


def test_nothing_approved_is_refused_with_what_to_do(tmp_path: Path) -> None:
    house = House(tmp_path)
    with pytest.raises(NotFound, match="nothing of “z” is known to be approved") as caught:
        back(house)
    assert "backup-worker restore z" in str(caught.value.hint)


def test_a_state_as_approved_is_left_alone(house: House) -> None:
    done = back(house)
    assert (done["files"], done["evidence"]) == ([], None)


def test_an_agent_that_runs_is_only_touched_on_demand(house: House) -> None:
    code = "import time; time.sleep(60)"
    house.fleet.edit(
        "agents.json", lambda d: d["agents"]["z"].update(start={"command": [sys.executable, "-c", code]})
    )
    house.runtime = house.fleet.runtime(house.client)
    house.write(OTHER)
    living = subprocess.Popen([sys.executable, "-c", code], cwd=house.fleet.root())
    try:
        with pytest.raises(restores.AgentLives, match="is running"):
            back(house)
        assert files(house)[WEIGHTS] == OTHER
        assert back(house, while_running=True)["running"] is True
        assert files(house)[WEIGHTS] == FIRST
    finally:
        living.kill()
        living.wait()


def test_evidence_that_cannot_be_kept_stops_it(house: House) -> None:
    house.write(OTHER)
    state = house.runtime.config.schedule.state
    state.mkdir(parents=True, exist_ok=True)
    (state / "evidence").write_text("in the way")
    with pytest.raises(AgentBackupError, match="putting the approved files"):
        back(house)
    assert files(house)[WEIGHTS] == OTHER


def test_the_command_says_what_it_would_do_and_does_it(house: House) -> None:
    house.write(OTHER)
    program = Path(sys.executable).with_name("backup-worker")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command: list[str | Path] = [program, "revert", "z", "--config", house.fleet.config_dir, *arguments]
        command += ["--redis-url", "redis://127.0.0.1:1/0"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    would = run("--dry-run")
    assert "would put back 1 file\n" in would.stdout
    assert "weights.json: as it was first seen; nobody has approved that" in would.stdout
    assert files(house)[WEIGHTS] == OTHER
    done = json.loads(run("--json", "--by", "kari").stdout)
    assert done["files"][0]["path"] == WEIGHTS
    assert files(house)[WEIGHTS] == FIRST
    assert "nothing to do" in run().stdout
