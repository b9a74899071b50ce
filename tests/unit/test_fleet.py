"""Finding the agents of a fleet, and the configuration that is proposed for them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from backup_worker import config
from backup_worker.discovery import starter
from backup_worker.discovery.fleet import discover
from backup_worker.discovery.fleet_files import Found
from backup_worker.snapshots import Repository, take_snapshot
from backup_worker.snapshots.scope import Scope
from em_bridge.errors import UsageError

NOW = 1795441803.0


def make(fleet: Path, *files: str) -> None:
    for name in files:
        path = fleet / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n")


def found(fleet: Path) -> dict[str, Found]:
    return {one.agent: one for one in discover(fleet).agents}


def load(directory: Path, agents: list[Found]) -> config.Config:
    directory.mkdir(exist_ok=True)
    starter.write(directory, starter.contents(directory, agents, "UTC"))
    return config.load(directory)


def test_every_folder_with_a_soul_is_an_agent_and_no_other(tmp_path: Path) -> None:
    make(
        tmp_path,
        "z/SOUL.md",
        "deep/er/jay/SOUL.md",
        "tools/README.md",
        ".venv/lib/SOUL.md",
        "node_modules/x/SOUL.md",
    )
    assert sorted(found(tmp_path)) == ["jay", "z"]


def test_the_fleet_s_own_folder_may_be_an_agent(tmp_path: Path) -> None:
    make(tmp_path / "rick", "SOUL.md")
    assert list(found(tmp_path / "rick")) == ["rick"]


def test_a_soul_among_an_agent_s_memories_is_no_agent(tmp_path: Path) -> None:
    make(tmp_path, "z/SOUL.md", "z/memory/old/SOUL.md", "z/skills/clone/SOUL.md")
    assert list(found(tmp_path)) == ["z"]


def test_files_are_sorted_by_their_usual_names(tmp_path: Path) -> None:
    make(
        tmp_path / "z",
        "SOUL.md", "IDENTITY.md", "MEMORY.md", "priority_weights.json", "config/ScoringWeights.json",
        "rules/a.md", "memory/2026/b.md", "skills/c.py", "notes.txt", "skills/__pycache__/c.pyc", "x.lock",
    )  # fmt: skip
    z = found(tmp_path)["z"]
    assert z.counts == {"charter": 2, "weights": 2, "rules": 1, "memory": 2, "skills": 1, "other": 1}
    assert z.required == ["SOUL.md", "priority_weights.json", "config/ScoringWeights.json"]
    assert "config/ScoringWeights.json" in z.files["weights"]


def test_virtual_environments_are_left_out_whatever_their_name(tmp_path: Path) -> None:
    make(tmp_path / "z", "SOUL.md", "env[3]/pyvenv.cfg", "env[3]/lib/site.py", "src/a.py")
    z = found(tmp_path)["z"]
    scope = Scope(("**",), tuple(z.exclude))
    assert not scope.covers("env[3]/lib/site.py")
    assert scope.covers("src/a.py")
    assert z.counts["other"] == 1


def test_caches_sockets_and_outboxes_are_left_out(tmp_path: Path) -> None:
    make(tmp_path / "z", "SOUL.md")
    scope = Scope(("**",), tuple(found(tmp_path)["z"].exclude))
    for path in (
        "a/__pycache__/b.pyc",
        "z.outbox",
        "run/z.outbox-wal",
        "a.sock",
        "x/agent.pid",
        ".cache/x",
        "a/.venv/b",
    ):
        assert not scope.covers(path), path
    assert scope.covers("memory/a.md")


@pytest.mark.parametrize(
    ("folder", "agent"),
    [
        ("jay", "jay"),
        ("Jay Two!", "Jay-Two"),
        ("_x", "x"),
        ("Execution-Manager", "em"),
        ("EM", "em"),
        ("é", "e"),
        ("日本", None),
    ],
)
def test_an_id_is_made_from_the_folder_s_name(tmp_path: Path, folder: str, agent: str | None) -> None:
    make(tmp_path / "fleet" / folder, "SOUL.md")
    (one,) = discover(tmp_path / "fleet").agents
    assert one.agent == (agent or "fleet")


def test_ids_that_differ_by_case_only_are_told_apart(tmp_path: Path) -> None:
    make(tmp_path, "a/z/SOUL.md", "b/Z/SOUL.md", "b/z!/SOUL.md")
    assert len({name.lower() for name in found(tmp_path)}) == 3
    assert "b-Z" in found(tmp_path)


def test_an_empty_soul_is_remarked_on(tmp_path: Path) -> None:
    make(tmp_path, "z/SOUL.md")
    (tmp_path / "z" / "SOUL.md").write_text("")
    assert "SOUL.md is empty" in found(tmp_path)["z"].remarks[0]


def test_nothing_in_the_fleet_is_changed(tmp_path: Path) -> None:
    make(tmp_path / "fleet", "z/SOUL.md", "z/memory/a.md")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "fleet").rglob("*")}
    load(tmp_path / "config", discover(tmp_path / "fleet").agents)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "fleet").rglob("*")} == before


def test_what_is_proposed_loads_and_says_what_was_found(tmp_path: Path) -> None:
    make(tmp_path / "fleet", "em/SOUL.md", "z/SOUL.md", "z/priority_weights.json", "odd ${HOME} [x]/SOUL.md")
    loaded = load(tmp_path / "config", discover(tmp_path / "fleet").agents)
    assert set(loaded.agents) == {"em", "z", "odd-HOME-x"}
    assert loaded.agent("odd-HOME-x").root == tmp_path / "fleet" / "odd ${HOME} [x]"
    assert loaded.agent("em").critical
    assert loaded.agent("z").start is None
    assert loaded.schedule.repository == tmp_path / "backups"
    assert loaded.schedule.state == tmp_path / "var"


def test_an_agent_that_holds_another_leaves_it_out(tmp_path: Path) -> None:
    make(tmp_path / "em", "SOUL.md", "agents/z/SOUL.md", "agents/z/memory/a.md", "own.md")
    loaded = load(tmp_path / "config", discover(tmp_path / "em").agents)
    scope = Scope(("**",), tuple(loaded.agent("em").exclude))
    assert not scope.covers("agents/z/memory/a.md")
    assert scope.covers("own.md")


def test_a_configuration_inside_an_agent_keeps_the_repository_outside(tmp_path: Path) -> None:
    make(tmp_path / "em", "SOUL.md")
    loaded = load(tmp_path / "em" / "config", discover(tmp_path / "em").agents)
    assert loaded.schedule.repository == tmp_path / "agent-backup" / "backups"
    assert loaded.schedule.state == tmp_path / "agent-backup" / "var"


def test_without_a_fleet_there_is_an_example_that_loads(tmp_path: Path) -> None:
    loaded = load(tmp_path / "config", [])
    assert loaded.agent("z").root == tmp_path / "agents" / "z"
    assert loaded.agent("z").start is not None


def test_files_that_were_edited_are_not_replaced_unless_asked(tmp_path: Path) -> None:
    load(tmp_path, [])
    schedule = tmp_path / config.SCHEDULE_FILE
    edited = schedule.read_text().replace('"keep": 30', '"keep": 40')
    schedule.write_text(edited)
    (tmp_path / config.AGENTS_FILE).unlink()
    files = starter.contents(tmp_path, [], "UTC")
    with pytest.raises(UsageError, match=r"has a configuration already: backup_schedule\.json") as caught:
        starter.write(tmp_path, files)
    assert caught.value.exit_code == 2
    assert not (tmp_path / config.AGENTS_FILE).exists()
    assert schedule.read_text() == edited
    starter.write(tmp_path, files, force=True)
    assert json.loads(schedule.read_text())["tiers"]["daily"]["keep"] == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


def test_the_machine_s_time_zone_is_taken_over(tmp_path: Path) -> None:
    zone = tmp_path / "zoneinfo" / "Europe" / "Oslo"
    make(tmp_path, "zoneinfo/Europe/Oslo")
    (tmp_path / "localtime").symlink_to(zone)
    assert starter.machine_zone({}, tmp_path / "localtime") == "Europe/Oslo"
    assert starter.machine_zone({"TZ": ":Asia/Tokyo"}, tmp_path / "localtime") == "Asia/Tokyo"
    assert starter.machine_zone({"TZ": "CET-1CEST"}, tmp_path / "none") == "UTC"


def write(path: Path, text: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def remarks(fleet: Path, agent: str) -> str:
    return "\n".join(found(fleet)[agent].remarks)


def test_a_soul_in_small_letters_and_folders_by_other_names_are_known(tmp_path: Path) -> None:
    make(tmp_path / "leroy", "soul.md", "memories/a.md", "Skills/x.md", "agents.md", "policies/p.md")
    leroy = found(tmp_path)["leroy"]
    assert leroy.counts == {"charter": 2, "weights": 0, "rules": 1, "memory": 1, "skills": 1, "other": 0}
    assert leroy.required == ["soul.md"]
    loaded = load(tmp_path / "config", [leroy])
    files = loaded.files_of("leroy")
    for kind, path in (("charter", "soul.md"), ("memory", "memories/b/c.md"), ("skills", "Skills/new.md")):
        assert files.scope([kind]).covers(path), path


def test_databases_are_memory_wherever_they_lie(tmp_path: Path) -> None:
    make(tmp_path / "z", "SOUL.md", "data/facts.sqlite3", "brain.db", "node_modules/x/y.db")
    z = found(tmp_path)["z"]
    assert z.counts["memory"] == 2
    assert {"data/facts.sqlite3", "brain.db"} < set(z.files["memory"])


def test_the_log_of_messages_is_the_memory_of_the_em(tmp_path: Path) -> None:
    make(tmp_path, "em/SOUL.md", "z/SOUL.md")
    memory = {name: one.files["memory"] for name, one in found(tmp_path).items()}
    assert "message-log/**" in memory["em"] and "message-log/**" not in memory["z"]


def test_weights_in_a_folder_of_their_own_are_weights(tmp_path: Path) -> None:
    make(tmp_path / "z", "SOUL.md", "weights/deep/model.json", "weights/model.safetensors")
    z = found(tmp_path)["z"]
    assert z.required == ["SOUL.md", "weights/deep/model.json"]
    assert z.counts["other"] == 1


@pytest.mark.parametrize(
    ("path", "is_secret"),
    [
        (".env", True), ("skills/mail/.env.local", True), ("config/mail.pem", True), ("id_ed25519", True),
        (".aws/credentials", True), ("agent/auth-profiles.json", True), ("credentials/x/creds.json", True),
        ("secrets.yaml", True), (".env.example", False), ("id_ed25519.pub", False), ("monkey.md", False),
        ("skills/secretary.md", False), ("memory/token-costs.md", False),
    ],
)  # fmt: skip
def test_secrets_are_pointed_at_by_their_names(tmp_path: Path, path: str, is_secret: bool) -> None:
    make(tmp_path / "z", "SOUL.md", path)
    assert (f": {path}" in remarks(tmp_path, "z")) is is_secret


def test_what_would_make_the_first_snapshot_suspect_is_said_before(tmp_path: Path) -> None:
    make(tmp_path / "z", "SOUL.md")
    write(tmp_path / "z" / "weights.json", '{"a": 1,}')
    assert "not valid JSON, so its first snapshot will be suspect: weights.json" in remarks(tmp_path, "z")


def test_big_files_and_links_that_lead_out_are_pointed_at(tmp_path: Path) -> None:
    make(tmp_path / "z", "SOUL.md", "memory/a.md")
    with (tmp_path / "z" / "model.gguf").open("wb") as file:
        file.truncate(200 * 1024**2)
    (tmp_path / "z" / "shared").symlink_to(tmp_path)
    (tmp_path / "z" / "latest.md").symlink_to("memory/a.md")
    said = remarks(tmp_path, "z")
    assert "model.gguf (200 MiB)" in said
    assert said.endswith("not backed up: shared")
    assert found(tmp_path)["z"].bytes > 200 * 1024**2


def test_a_copy_or_template_is_taken_but_remarked_on(tmp_path: Path) -> None:
    make(tmp_path, "archive/z/SOUL.md", "z.bak/SOUL.md", "templates/SOUL.md", "golden/SOUL.md")
    assert [name for name, one in found(tmp_path).items() if one.remarks] == ["z", "templates", "z-bak"]


def test_what_looks_like_an_agent_without_a_soul_is_named_not_forgotten(tmp_path: Path) -> None:
    make(tmp_path, "rick/AGENTS.md", "rick/memory/a.md", "code/AGENTS.md", "z/SOUL.md", "z/sub/AGENTS.md")
    make(tmp_path, "z/sub/MEMORY.md")
    (passed,) = discover(tmp_path).passed_over
    assert passed.path == tmp_path / "rick"
    assert passed.why == "looks like an agent (AGENTS.md, memory/), but has no SOUL.md"


def test_workspaces_are_named_after_their_agents(tmp_path: Path) -> None:
    home = tmp_path / ".openclaw"
    make(home, "openclaw.json", "workspace/SOUL.md", "workspace-jay/SOUL.md", "agents/main/sessions/a.jsonl")
    make(home, "fleet/rick/workspace/SOUL.md")
    survey = discover(home)
    assert sorted(one.agent for one in survey.agents) == ["jay", "main", "rick"]
    (passed,) = survey.passed_over
    assert "openclaw.json and agents are beside the workspaces" in passed.why


def test_the_likely_program_is_named_and_nothing_is_started_or_ordered_by_guess(tmp_path: Path) -> None:
    make(tmp_path / "z", "SOUL.md", "z.py")
    z = found(tmp_path)["z"]
    assert z.program == "z.py"
    agent = load(tmp_path / "config", [z]).agent("z")
    assert agent.start is None and agent.depends_on == []


def test_the_repository_and_evidence_below_the_fleet_are_no_agents(tmp_path: Path) -> None:
    make(tmp_path, "z/SOUL.md", "backups/weekly/2026-W48/z/files/SOUL.md", "backups/.agent-backup/marks/x")
    make(tmp_path, "var/evidence/z-1/files/SOUL.md")
    survey = discover(tmp_path, [tmp_path / "var"])
    assert [one.agent for one in survey.agents] == ["z"]


def test_what_is_counted_is_what_the_engine_copies(tmp_path: Path) -> None:
    make(
        tmp_path / "z",
        "SOUL.md",
        ".git/HEAD",
        ".git/index.lock",
        "a/__pycache__/b.pyc",
        "x/.venv/c",
        "run.pid",
    )
    z = found(tmp_path)["z"]
    files = load(tmp_path / "config", [z]).files_of("z")
    made = take_snapshot(
        Repository(tmp_path / "backups"), files, tier="weekly", slot="1", include=["*"], unchanged="copy", now=NOW,
        reason="test",
    )  # fmt: skip
    assert made.files == sum(z.counts.values()) == 2


def test_a_folder_whose_name_is_none_for_an_agent_is_taken_and_remarked_on(tmp_path: Path) -> None:
    make(tmp_path, "zoë/SOUL.md", "日本/SOUL.md", "jay/SOUL.md")
    assert found(tmp_path).keys() >= {"zoe", "jay"}
    assert "“zoë” is not a name for an agent" in remarks(tmp_path, "zoe")
    assert len(found(tmp_path)) == 3
    assert remarks(tmp_path, "jay") == ""


def test_a_link_to_an_agent_elsewhere_is_named_and_one_within_the_fleet_is_not(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet"
    make(tmp_path, "elsewhere/SOUL.md", "notes/a.md", "fleet/z/SOUL.md")
    for name, target in (("out", "elsewhere"), ("in", "fleet/z"), ("notes", "notes")):
        (fleet / name).symlink_to(tmp_path / target)
    survey = discover(fleet)
    assert [one.agent for one in survey.agents] == ["z"]
    assert [(one.path, one.why.split(":")[0]) for one in survey.passed_over] == [
        (fleet / "out", f"is a link to {tmp_path / 'elsewhere'}, an agent")
    ]


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may read everything")
def test_what_cannot_be_read_is_named_before_the_first_backup_says_it(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet"
    make(fleet, "z/SOUL.md", "z/memory/a.md", "z/key.json", "closed/SOUL.md")
    closed = [fleet / "z/memory", fleet / "z/key.json", fleet / "closed"]
    for path in closed:
        path.chmod(0)
    dropped = ["setpriv", "--inh-caps=-all", "--bounding-set=-dac_override,-dac_read_search"]
    program = [
        sys.executable,
        "-m",
        "backup_worker",
        "init",
        str(tmp_path / "config"),
        "--from",
        str(fleet),
        "--json",
    ]
    try:
        done = subprocess.run([*dropped * (os.geteuid() == 0), *program], capture_output=True, check=True)
    finally:
        for path in closed:
            path.chmod(0o700)
    result = json.loads(done.stdout)
    (agent,) = result["agents"]
    assert agent["remarks"] == ["cannot be read by you, so snapshots will be partial: key.json, memory"]
    assert result["passed_over"] == [{"path": str(fleet / "closed"), "why": "cannot be read"}]
