"""init and doctor, run as a person runs them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backup_worker import config
from backup_worker.discovery import starter
from backup_worker.discovery.fleet import discover
from backup_worker.doctor import Check, examine
from backup_worker.history import History

PROGRAM = Path(sys.executable).with_name("backup-worker")
NOW = 1795441803.0
UNREACHABLE = "redis://:hunter2@127.0.0.1:1/0"


def run(*arguments: str | Path, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {
        key: value for key, value in os.environ.items() if key not in ("REDIS_URL", "BACKUP_CONFIG")
    } | more
    return subprocess.run(
        [PROGRAM, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    for agent in ("em", "z"):
        folder = tmp_path / "fleet" / agent
        folder.mkdir(parents=True)
        (folder / "SOUL.md").write_text(f"I am {agent}\n")
    return tmp_path / "fleet"


def checks(directory: Path, redis_url: str | None = None, *, test_alert: bool = False) -> dict[str, Check]:
    found = examine(directory / "config", redis_url, now=NOW, test_alert=test_alert)
    return {one.check: one for one in found}


def propose(fleet: Path) -> None:
    directory = fleet.parent / "config"
    starter.write(directory, starter.contents(directory, discover(fleet).agents, "UTC"))


def edit(directory: Path, file: str, change: Any) -> None:
    path = directory / "config" / file
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.fixture
def started(fleet: Path) -> Path:
    """A folder with what `init` writes for the fleet, to which a start command was added."""
    directory = fleet.parent
    propose(fleet)
    start = {"command": ["python3", "agent.py"]}
    edit(directory, config.AGENTS_FILE, lambda d: [one.update(start=start) for one in d["agents"].values()])
    return directory


def test_init_brings_a_fleet_under_protection_and_says_what_is_next(fleet: Path) -> None:
    done = run("init", "--from", "fleet", cwd=fleet.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert "em " in done.stdout
    assert "backup-worker backup --tier weekly" in done.stdout
    assert '"start"' in done.stdout
    assert set(config.load(fleet.parent / "config").agents) == {"em", "z"}
    again = run("init", "--from", "fleet", cwd=fleet.parent)
    assert again.returncode == 0


def test_init_prints_its_decisions_as_json(fleet: Path) -> None:
    done = run("init", "elsewhere", "--from", "fleet", "--json", cwd=fleet.parent)
    result = json.loads(done.stdout)
    assert [one["agent"] for one in result["agents"]] == ["em", "z"]
    assert result["agents"][0]["required"] == ["SOUL.md"]
    assert sorted(result["written"]) == sorted(
        f"elsewhere/{name}" for name in (config.SCHEDULE_FILE, config.AGENTS_FILE, *config.schemas())
    )


def test_init_finds_no_agents_among_its_own_backups_and_evidence(fleet: Path) -> None:
    home = fleet.parent
    assert run("init", "--from", ".", cwd=home).returncode == 0
    assert run("backup", "--tier", "weekly", cwd=home).returncode == 0
    (fleet / "z" / "SOUL.md").write_text("I am somebody else\n")
    assert run("restore", "z", cwd=home).returncode == 0
    assert list((home / "var" / "evidence").rglob("SOUL.md"))
    again = run("init", "--from", ".", "--force", "--json", cwd=home)
    assert [one["agent"] for one in json.loads(again.stdout)["agents"]] == ["em", "z"]


def test_init_names_what_it_does_not_take_and_what_is_in_it(fleet: Path) -> None:
    for path in ("rick/AGENTS.md", "rick/MEMORY.md", "z/.env", "z/agent.py"):
        (fleet / path).parent.mkdir(exist_ok=True)
        (fleet / path).write_text("x\n")
    said = run("init", "--from", "fleet", cwd=fleet.parent).stdout
    assert f"not taken: {fleet / 'rick'}: looks like an agent (AGENTS.md, MEMORY.md)" in said
    assert "z: secrets by their names" in said
    assert '{"command": ["em-bridge", "run", "z", "--", "python3", "agent.py"]}' in said


def test_init_leaves_an_edited_configuration_alone(started: Path) -> None:
    before = (started / "config" / config.AGENTS_FILE).read_text()
    refused = run("init", "--from", "fleet", cwd=started)
    assert refused.returncode == 2
    assert "agents.json" in refused.stderr
    assert "--force" in refused.stderr
    assert (started / "config" / config.AGENTS_FILE).read_text() == before
    assert run("init", "--from", "fleet", "--force", cwd=started).returncode == 0


def test_init_adds_the_agents_that_are_new_and_changes_nothing_else(started: Path) -> None:
    edit(started, config.AGENTS_FILE, lambda d: d["agents"]["z"].update(root="${HERE}/z", critical=True))
    before = json.loads((started / "config" / config.AGENTS_FILE).read_text())
    schedule = (started / "config" / config.SCHEDULE_FILE).read_bytes()
    for newer in ("fleet/jay", "fleet/other/z"):
        (started / newer).mkdir(parents=True)
        (started / newer / "SOUL.md").write_text("I am new\n")
    done = run("init", "--from", "fleet", "--add", cwd=started, HERE=str(started / "fleet"))
    assert (done.returncode, done.stderr) == (0, "")
    after = json.loads((started / "config" / config.AGENTS_FILE).read_text())
    assert {name: after["agents"].pop(name)["root"] for name in ("jay", "other-z")} == {
        "jay": str(started / "fleet/jay"), "other-z": str(started / "fleet/other/z"),
    }  # fmt: skip
    assert after == before
    assert (started / "config" / config.SCHEDULE_FILE).read_bytes() == schedule


def test_init_says_that_there_is_nothing_to_add_and_writes_nothing(started: Path) -> None:
    before = (started / "config" / config.AGENTS_FILE).read_bytes()
    done = run("init", "--from", "fleet", "--add", cwd=started)
    assert (done.returncode, "nothing to add" in done.stdout) == (0, True)
    assert (started / "config" / config.AGENTS_FILE).read_bytes() == before


@pytest.mark.parametrize(
    "options", [["--add"], ["--add", "--from", "fleet"], ["--add", "--from", "fleet", "--force"]]
)
def test_init_adds_only_to_a_configuration_that_stands(fleet: Path, options: list[str]) -> None:
    done = run("init", *options, cwd=fleet.parent)
    assert done.returncode == 2
    assert not (fleet.parent / "config").exists()


@pytest.mark.parametrize(("fleet_name", "code"), [("nowhere", 2), ("empty", 4)])
def test_init_without_agents_writes_nothing(tmp_path: Path, fleet_name: str, code: int) -> None:
    (tmp_path / "empty").mkdir()
    done = run("init", "--from", fleet_name, cwd=tmp_path)
    assert done.returncode == code
    assert done.stderr.startswith("error: there is no folder")
    assert not (tmp_path / "config").exists()


def test_doctor_exits_1_if_anything_fails_and_0_if_nothing_does(started: Path) -> None:
    well = run("doctor", cwd=started)
    assert well.returncode == 0, well.stdout
    (started / "fleet" / "z" / "SOUL.md").unlink()
    ill = run("doctor", "--json", cwd=started)
    assert ill.returncode == 1
    (failed,) = [row for row in json.loads(ill.stdout) if row["status"] == "fail"]
    assert failed["check"] == "agent z"
    assert failed["detail"] == "“SOUL.md” is missing"
    assert failed["mend"]


def test_doctor_reports_every_fault_of_a_broken_configuration(started: Path) -> None:
    edit(
        started,
        config.SCHEDULE_FILE,
        lambda d: (d.update(timezone="Mars"), d["tiers"]["daily"].update(slot="x")),
    )
    found = examine(started / "config", None, now=NOW)
    assert [one.status for one in found] == ["fail", "fail"]
    assert run("doctor", cwd=started).returncode == 1


def test_doctor_tells_an_unreachable_redis_from_none(started: Path) -> None:
    assert checks(started)["redis"].status == "warn"
    refused = checks(started, UNREACHABLE)["redis"]
    assert refused.status == "fail"
    assert "hunter2" not in f"{refused.detail} {refused.mend}"


def test_doctor_sees_a_program_that_is_not_there(started: Path) -> None:
    edit(started, config.AGENTS_FILE, lambda d: d["agents"]["z"]["start"].update(command=["no-such-program"]))
    edit(started, config.AGENTS_FILE, lambda d: d["agents"]["em"].update(health=["./health.sh"]))
    found = checks(started)
    assert found["start of z"].status == "fail"
    assert "“no-such-program”" in found["start of z"].detail
    assert "“./health.sh”" in found["start of em"].detail
    script = started / "fleet" / "em" / "health.sh"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    assert checks(started)["start of em"].status == "ok"


def test_doctor_says_what_a_missing_start_means(fleet: Path) -> None:
    propose(fleet)
    found = checks(fleet.parent)
    assert found["start of z"].status == "warn"
    assert '["em-bridge", "run", "z", ' in str(found["start of z"].mend)
    assert '["em-bridge", "em"]' in str(found["start of em"].mend)


def test_a_fleet_without_an_execution_manager_is_told_that_nobody_notices_deaths(started: Path) -> None:
    assert "manager" not in checks(started)
    edit(started, config.AGENTS_FILE, lambda d: d["agents"].pop("em"))
    assert checks(started)["manager"].status == "warn"
    said = run("init", "elsewhere", "--from", "fleet/z", cwd=started).stdout
    assert "no execution manager was found" in said


def test_doctor_sees_a_root_that_is_gone(started: Path) -> None:
    shutil.rmtree(started / "fleet" / "z")
    assert checks(started)["agent z"].status == "fail"


def test_doctor_sees_a_repository_that_others_can_read_or_that_is_no_folder(started: Path) -> None:
    (started / "backups").mkdir(mode=0o755)
    assert checks(started)["repository mode"].status == "warn"
    (started / "backups").rmdir()
    (started / "backups").write_text("")
    assert checks(started)["repository"].status == "fail"


def test_doctor_leaves_nothing_behind(started: Path) -> None:
    (started / "backups").mkdir(mode=0o700)
    before = sorted(started.rglob("*"))
    checks(started)
    assert sorted(started.rglob("*")) == before


def test_doctor_sees_too_little_space_and_a_wrong_clock(started: Path) -> None:
    edit(started, config.SCHEDULE_FILE, lambda d: d.update(limits={"reserve_bytes": 10**18}))
    assert checks(started)["space"].status == "fail"
    assert {one.check: one for one in examine(started / "config", None, now=0)}["clock"].status == "fail"


def test_doctor_sees_a_broken_record(started: Path) -> None:
    history = History(started / "backups" / "system-history.jsonl")
    history.append("backup", now=NOW)
    assert checks(started)["history"].status == "ok"
    history.path.write_bytes(history.path.read_bytes().replace(b"backup", b"backuq"))
    assert checks(started)["history"].status == "fail"


def test_doctor_says_whether_alerts_reach_anybody(started: Path) -> None:
    assert checks(started)["alerts"].status == "warn"
    edit(started, config.SCHEDULE_FILE, lambda d: d.update(alerts=["json://me:hunter2@127.0.0.1:1/x"]))
    assert checks(started)["alerts"].status == "ok"
    tried = checks(started, test_alert=True)["alerts"]
    assert tried.status == "fail"
    assert "hunter2" not in tried.detail


def test_doctor_says_which_severities_reach_nobody(started: Path) -> None:
    pager = {"url": "json://me:hunter2@127.0.0.1:1/x", "min_severity": "critical"}
    edit(started, config.SCHEDULE_FILE, lambda d: d.update(alerts=[pager]))
    assert "no receiver takes what is warning:" in checks(started)["alert routes"].detail
    edit(started, config.SCHEDULE_FILE, lambda d: d.update(alerts=[pager, "json://127.0.0.1:1/x"]))
    assert "alert routes" not in checks(started)


def test_doctor_says_whether_anybody_outside_would_miss_us_and_keeps_the_secret(started: Path) -> None:
    assert checks(started)["dead man's switch"].status == "warn"
    url = "https://hc-ping.com/s3cret"
    edit(started, config.SCHEDULE_FILE, lambda d: d["tiers"]["daily"].update(ping=url))
    found = checks(started)["dead man's switch"]
    assert (found.status, found.detail) == ("ok", "told of each round: daily to hc-ping.com")


def test_doctor_says_what_approvals_are_worth(started: Path) -> None:
    assert "anybody's name" in checks(started)["approvals"].detail
    signers = started / "config" / "allowed_signers"
    signers.write_text("")
    signers.chmod(0o644)
    assert checks(started)["approvals"].status == "ok"
    signers.chmod(0o666)
    assert checks(started)["approvals"].status == "fail"


def test_one_part_that_cannot_be_examined_hides_no_other(started: Path) -> None:
    edit(started, config.AGENTS_FILE, lambda d: d["agents"]["em"].update(root="/" + "x" * 300))
    found = checks(started)
    assert (found["agent em"].status, found["agent z"].status) == ("fail", "ok")
    assert "file name too long" in found["agent em"].detail
