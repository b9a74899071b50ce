"""The commands about snapshots, as a person or a script uses them: output, exit codes, and the record."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from backup_worker.approval.approved import ApprovedStates, Held
from backup_worker.cli import main
from backup_worker.forgetting import APPROVED, PROOF
from backup_worker.restoring.proofs import Note, note_of, write_note
from backup_worker.snapshots import Repository
from tests.agent_on_disk import CLASSES, EXCLUDE, NOON, Place, content_of


class Shell:
    """`backup-worker` with a configuration of two agents."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.z, self.jay = Place(base).fill(), Place(base, "jay").fill()
        self.config = base / "config"
        self.config.mkdir()
        tiers = {
            "daily": {"cron": "0 7 * * *", "include": ["weights", "memory"], "slot": "%Y-%m-%d", "keep": 2},
            "weekly": {
                "cron": "0 23 * * 0",
                "include": ["*"],
                "slot": "%G-W%V",
                "keep": 2,
                "unchanged": "copy",
            },
        }
        schedule = {
            "timezone": "Europe/Oslo",
            "repository": "../repo",
            "history": "../history.jsonl",
            "tiers": tiers,
        }
        (self.config / "backup_schedule.json").write_text(
            json.dumps(schedule | {"limits": {"reserve_bytes": 0}})
        )
        agent = {"files": CLASSES, "required": ["SOUL.md"], "exclude": list(EXCLUDE)}
        agents = {name: agent | {"root": f"../agents/{name}"} for name in ("z", "jay")}
        (self.config / "agents.json").write_text(json.dumps({"agents": agents}))

    def run(self, *words: str) -> tuple[int, str, str]:
        """Run one command in this process: exit code, stdout and stderr are those of the program."""
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", ["backup-worker", *words, "--config", str(self.config)])
            with pytest.raises(SystemExit) as ended:
                main()
        code = ended.value.code
        return code if isinstance(code, int) else 0, out.getvalue(), err.getvalue()

    def json(self, *words: str, code: int = 0) -> Any:
        got, out, err = self.run(*words, "--json")
        assert got == code, err
        return json.loads(out)

    def recorded(self) -> list[str]:
        return [json.loads(line)["kind"] for line in (self.base / "history.jsonl").read_text().splitlines()]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_a_day_with_the_commands(shell: Shell) -> None:
    made = shell.json("backup", "--tier", "weekly")
    assert [row["agent"] for row in made["snapshots"]] == ["z", "jay"]
    assert made["failed"] == []
    daily = shell.json("backup", "z", "--tier", "daily")["snapshots"][0]["id"]
    shell.z.write("weights.json", '{"speed": 0.75, "care": {"depth": 3}}')
    second = shell.json("backup", "z", "--tier", "daily")["snapshots"][0]["id"]
    assert second == f"{daily}-2".replace("/z-2", "-2/z")

    rows = shell.json("list", "--agent", "z", "--tier", "daily")
    assert [row["id"] for row in rows] == [daily, second]
    assert set(rows[0]) == {
        "id", "agent", "tier", "slot", "created_at", "status", "approved", "files", "bytes", "verified_at", "pinned",
    }  # fmt: skip
    (change,) = shell.json("diff", daily, second)["changed"]
    assert change["keys"] == [{"key": "speed", "kind": "changed", "old": 0.5, "new": 0.75, "delta": 0.25}]
    assert shell.json("show", second)["entries"]
    assert len(shell.json("verify")["ok"]) == 4

    good = content_of(shell.z.root)
    shell.z.write("SOUL.md", "poisoned")
    (dry,) = shell.json("restore", "z", "--dry-run")
    assert (dry["changed"], dry["lost"]) == (["SOUL.md"], ["SOUL.md"])
    (done,) = shell.json("restore", "z")
    assert set(done) == {"agent", "from", "to", "files", "bytes", "evidence", "ok"}
    assert content_of(shell.z.root) == good
    assert (Path(done["evidence"]) / "SOUL.md").read_text() == "poisoned"
    assert len(shell.json("restore", "z", "jay", "--to", str(shell.base / "out"))) == 2
    assert content_of(shell.base / "out" / "z") == good

    assert shell.json("pin", daily) == {"id": daily, "pinned": True}
    shell.json("backup", "z", "--tier", "daily")
    shell.json("backup", "z", "--tier", "daily")
    plan = shell.json("prune", "--dry-run")
    assert [decision["id"] for decision in plan["delete"]] == [second]
    assert shell.json("prune") == plan
    assert second not in [row["id"] for row in shell.json("list")]
    assert shell.json("unpin", daily) == {"id": daily, "pinned": False}
    kinds = ["backup"] * 4 + ["verify"] * 4 + ["restore"] * 3 + ["pin"] + ["backup"] * 2 + ["prune", "unpin"]
    assert shell.recorded() == kinds


def test_a_fault_is_exit_code_1_and_said_on_stderr(shell: Shell) -> None:
    shell.json("backup", "--tier", "weekly")
    shell.z.write("SOUL.md", "")
    assert shell.json("backup", "z", "--tier", "weekly", code=1)["snapshots"][0]["status"] == "suspect"
    shell.jay.root.rename(shell.base / "away")
    code, out, err = shell.run("backup", "--tier", "weekly", "--json")
    assert code == 1
    assert json.loads(out)["failed"][0]["agent"] == "jay"
    assert err.startswith("error: the root")
    identifier = shell.json("list", "--agent", "jay")[0]["id"]
    shell.jay.stored(identifier, "SOUL.md").write_text("rotten")
    bad = shell.json("verify", identifier, code=1)["bad"]
    assert [(row["id"], row["path"]) for row in bad] == [(identifier, "SOUL.md")]
    assert shell.run("restore", "jay")[0] == 4, "its only snapshot is damaged"


def test_a_living_agent_is_never_overwritten(shell: Shell) -> None:
    shell.json("backup", "--tier", "weekly")
    shell.z.write("SOUL.md", "living")
    environment = {"AGENT_ID": "z", "AGENT_ROOT": str(shell.z.root)}
    alive = subprocess.Popen(["/bin/sleep", "60"], env=environment, cwd=shell.z.root)
    try:
        code, _, err = shell.run("restore", "z")
        assert code == 1
        assert f"pid {alive.pid}" in err
        assert (shell.z.root / "SOUL.md").read_text() == "living"
        assert shell.run("restore", "z", "--to", str(shell.base / "out"))[0] == 0
    finally:
        alive.kill()
        alive.wait()
    assert shell.run("restore", "z")[0] == 0


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("backup nobody --tier daily", 4),
        ("backup --tier nothing", 4),
        ("backup", 2),
        ("list --agent nobody", 4),
        ("list --tier nothing", 4),
        ("show daily/../z", 4),
        ("diff a/b/c a/b/d", 4),
        ("verify daily/x/z", 4),
        ("restore nobody", 4),
        ("restore z", 4),
        ("restore z --as-of yesterday-ish", 2),
        ("restore z jay --from weekly/w/z", 2),
        ("restore z --from weekly/w/z --as-of 2026-01-01", 2),
        ("pin ../../etc", 4),
        ("unpin weekly/w/z", 4),
    ],
)
def test_bad_input_is_one_clear_line_and_the_right_exit_code(shell: Shell, words: str, code: int) -> None:
    got, out, err = shell.run(*words.split())
    assert got == code, err
    assert out == ""
    assert err


def test_names_that_are_not_utf8_can_be_printed(shell: Shell) -> None:
    (Path(str(shell.z.root)) / "memory" / "\udcff\n.md").write_text("odd")
    made = shell.json("backup", "z", "--tier", "weekly")["snapshots"][0]["id"]
    assert "memory/\\xff\\n.md" in [entry["path"] for entry in shell.json("show", made)["entries"]]
    assert shell.run("show", made)[0] == 0
    (shell.z.root / "memory" / "\udcff\n.md").unlink()
    assert shell.json("restore", "z", "--dry-run")[0]["added"] == ["memory/\\xff\\n.md"]


def test_a_forgotten_agent_loses_its_snapshots_and_nobody_else_does(shell: Shell) -> None:
    shell.json("backup", "--tier", "weekly")
    pinned = shell.json("backup", "jay", "--tier", "daily")["snapshots"][0]["id"]
    code, _, err = shell.run("forget", "jay")
    assert code == 2
    assert "--yes" in err
    agents = json.loads((shell.config / "agents.json").read_text())
    del agents["agents"]["jay"]
    (shell.config / "agents.json").write_text(json.dumps(agents))
    assert len(shell.json("list", "--agent", "jay")) == 2, "kept until it is forgotten"
    shell.run("pin", pinned)
    planned = shell.json("forget", "jay", "--dry-run", code=1)
    assert [one["id"] for one in planned["keep"]] == [pinned]
    assert len(shell.json("list", "--agent", "jay")) == 2
    assert shell.json("forget", "jay", code=1) == planned
    shell.run("unpin", pinned)
    assert [one["id"] for one in shell.json("forget", "jay")["delete"]] == [pinned]
    assert shell.run("forget", "jay")[0] == 4
    assert [head["agent"] for head in shell.json("list")] == ["z"]
    assert shell.recorded().count("forget") == 2


def test_with_the_last_snapshot_goes_what_else_is_kept_of_an_agent(shell: Shell) -> None:
    shell.json("backup", "--tier", "weekly")
    repo, jay = Repository(shell.base / "repo"), shell.jay.agent
    for name in ("z", "jay"):
        write_note(repo, name, Note(tried_at=NOON, ok=True, proven_at=NOON))
    held = {"SOUL.md": Held(None, "first-seen", NOON)}
    ApprovedStates(repo).accept("jay", jay.scope(["charter"]), held, lambda _: None)
    repo.record_failure("weekly", "jay", now=NOON)
    pinned = shell.json("list", "--agent", "jay")[0]["id"]
    shell.run("pin", pinned)
    assert shell.json("forget", "jay", "--yes", code=1)["also"] == []
    assert note_of(repo, "jay") is not None, "something is left, so it is not forgotten"
    shell.run("unpin", pinned)
    assert shell.json("forget", "jay", "--yes")["also"] == [PROOF]
    assert ApprovedStates(repo).load("jay") is not None, "it is configured: what was approved still holds"
    agents = json.loads((shell.config / "agents.json").read_text())
    del agents["agents"]["jay"]
    (shell.config / "agents.json").write_text(json.dumps(agents))
    assert shell.json("forget", "jay", "--dry-run")["also"] == [APPROVED]
    assert shell.json("forget", "jay")["also"] == [APPROVED]
    assert shell.run("forget", "jay")[0] == 4
    assert note_of(repo, "z") is not None
    left = [path.name for path in repo.hidden.rglob("*") if path.is_file() and "jay" in path.name]
    assert all(path.startswith(("tree.", "take.", "approved.")) for path in left), "only empty lock files"


@pytest.mark.parametrize("name", ["../pins/x", "..", "", "a/b", ".hidden"])
def test_forget_takes_no_path_for_an_agent(shell: Shell, name: str) -> None:
    shell.json("backup", "--tier", "weekly")
    bait = shell.base / "repo" / ".agent-backup" / "pins"
    bait.mkdir()
    (bait / "x.json").write_text("{}")
    assert shell.run("forget", name, "--yes")[0] == 4
    assert (bait / "x.json").exists()


def test_verify_heals_what_has_a_sound_copy(shell: Shell) -> None:
    first = shell.json("backup", "z", "--tier", "weekly")["snapshots"][0]["id"]
    second = shell.json("backup", "z", "--tier", "weekly")["snapshots"][0]["id"]
    shell.z.stored(second, "SOUL.md").write_text("rotten")
    assert shell.json("verify", second, code=1)["bad"][0]["path"] == "SOUL.md"
    found = shell.json("verify", second, "--heal")
    assert found == {"ok": [second], "bad": [], "healed": [{"id": second, "path": "SOUL.md", "from": first}]}
    assert "heal" in shell.recorded()


def test_a_long_list_says_the_same_as_a_short_one_in_plain_columns(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backup_worker.cli import _list

    shell.run("backup", "--tier", "weekly")
    made = [row["id"] for row in shell.json("list")]
    shell.run("pin", made[1])
    monkeypatch.setattr(_list, "LONG", 1)
    _, out, _ = shell.run("list")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["snapshot", *made]
    assert [line.endswith("pinned") for line in lines[1:3]] == [False, True]
    assert all(line[lines[0].index("status") :].startswith("good  ") for line in lines[1:3])
    assert lines[3].startswith("restore proven: jay never")


def test_what_cannot_be_read_is_named_below_a_list(shell: Shell) -> None:
    first = shell.json("backup", "--tier", "weekly")["snapshots"][0]["id"]
    (shell.base / "repo" / first / "manifest.json").write_text("{}")
    code, _, err = shell.run("list")
    assert code == 0
    assert f"snapshot “{first}” cannot be read" in err


def test_a_state_of_another_time_and_single_paths_come_from_the_tiers_that_hold_them(shell: Shell) -> None:
    weekly = shell.json("backup", "z", "--tier", "weekly")["snapshots"][0]
    shell.z.write("memory/notes.md", "newer than the weekly one\n")
    daily = shell.json("backup", "z", "--tier", "daily")["snapshots"][0]
    shell.z.write("SOUL.md", "poisoned\n")
    shell.z.write("memory/since.md", "in no backup\n")
    (dry,) = shell.json("restore", "z", "--dry-run")
    assert dry["from"] == [daily["id"], weekly["id"]]
    assert (dry["added"], dry["changed"], dry["removed"]) == ([], ["SOUL.md"], ["memory/since.md"])
    assert dry["lost"] == ["SOUL.md", "memory/since.md"]
    (dry,) = shell.json("restore", "z", "--dry-run", "--as-of", repr(weekly["created_at"]))
    assert (dry["from"], dry["changed"]) == ([weekly["id"]], ["SOUL.md", "memory/notes.md"])
    assert dry["lost"] == ["SOUL.md", "memory/since.md"], "the newer notes are in the daily backup"
    assert shell.run("restore", "z", "--dry-run", "--as-of", repr(weekly["created_at"] - 1))[0] == 4
    (done,) = shell.json(
        "restore", "z", "--path", "SOUL.md", "--path", "skills/*", "--to", str(shell.base / "out")
    )
    assert (done["from"], done["files"]) == ([weekly["id"]], 2)
    assert sorted(content_of(shell.base / "out")) == ["SOUL.md", "skills", "skills/greet.py"]
    (done,) = shell.json("restore", "z", "--path", "memory")
    assert (done["from"], done["files"]) == ([daily["id"]], 2)
    assert (shell.z.root / "SOUL.md").read_text() == "poisoned\n", "nothing but that path is touched"
    assert not (shell.z.root / "memory" / "since.md").exists()
    assert (Path(done["evidence"]) / "memory" / "since.md").read_text() == "in no backup\n"


def test_what_needs_no_redis_does_not_load_it(shell: Shell) -> None:
    # redis-py is a third of the start of a command, and `backup` loaded it for lines that may have to wait in Redis.
    code = "import sys; from backup_worker.cli import main\ntry: main()\nfinally: sys.exit('redis' in sys.modules)"
    to = str(shell.base / "to")
    for words in (["backup", "--tier", "weekly"], ["list"], ["verify"], ["restore", "z", "--to", to]):
        argv = [sys.executable, "-c", code, *words, "--config", str(shell.config)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (words, done.stderr)
