"""Taking files out of snapshots, and putting them back: proven on the way, never over a living agent."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backup_worker import alerts, backups
from backup_worker.console import create_app
from backup_worker.console.roles import OPERATOR
from backup_worker.queueing import queues
from tests.console_fleet import PASSWORD, Visitor, World, make_world, served, until, worker
from tests.integration.conftest import ValkeyServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    server = ValkeyServer(tmp_path_factory.mktemp("valkey"))
    yield server
    server.close()


@pytest.fixture
def world(server: ValkeyServer, tmp_path: Path) -> World:
    server.client().flushall()
    made = make_world(tmp_path / "w", server.url, ("em", "z"))
    made.users.add("kari", PASSWORD, role=OPERATOR)
    return made


@pytest.fixture
def kari(world: World) -> Visitor:
    visitor = Visitor(create_app(world.runtime))
    visitor.log_in("kari")
    return visitor


def snapshot(world: World) -> str:
    return backups.by_hand(world.runtime, "z", "weekly", now=time.time()).id


def numbers(page: str) -> dict[str, str]:
    """Return path -> address of its download, as the page says."""
    found = re.findall(r'href="(/snapshots/[^"]+/files/\d+)" aria-label="download ([^"]+)"', page)
    return {path: href for href, path in found}


def spoil(world: World, identifier: str, path: str) -> None:
    file = world.runtime.repository.path(identifier) / "files" / path
    file.chmod(0o600)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_every_file_of_a_snapshot_comes_down_as_it_was(world: World, kari: Visitor) -> None:
    (world.root("z") / "memory" / "ein ø & <b>.md").write_text("name with everything")
    (world.root("z") / "memory" / "empty.md").write_bytes(b"")
    (world.root("z") / "memory" / "large.bin").write_bytes(os.urandom(900_001))
    identifier = snapshot(world)
    hrefs = numbers(kari.get(f"/snapshots/{identifier}").text)
    assert len(hrefs) == 6
    for entry in world.runtime.repository.get(identifier).entries:
        if entry.kind == "file":
            escaped = entry.path.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            answer = kari.get(hrefs[escaped])
            assert answer.status_code == 200
            assert answer.data == (world.root("z") / entry.path).read_bytes(), entry.path
            assert answer.headers["Content-Disposition"].startswith("attachment")
            assert answer.headers["Content-Type"] == "application/octet-stream"
            assert "sandbox" in answer.headers["Content-Security-Policy"]
    done = [line for line in world.runtime.history.read("action") if line["action"] == "download"]
    assert {line["by"] for line in done} == {"kari"}
    assert len(done) == 6


def test_a_tar_holds_all_of_a_snapshot_below_one_folder(world: World, kari: Visitor) -> None:
    root = world.root("z")
    (root / "memory" / ("deep" * 30) / ("er" * 60)).mkdir(parents=True)
    (root / "memory" / ("deep" * 30) / ("er" * 60) / "note.md").write_text("far down")
    (root / "memory" / os.fsdecode(b"latin\xf8.md")).write_text("not UTF-8")
    (root / "memory" / "near").symlink_to("facts.md")
    (root / "memory" / "far").symlink_to("/etc/passwd")
    (root / "memory" / "up").symlink_to("../../../x")
    identifier = snapshot(world)
    data = kari.get(f"/snapshots/{identifier}/tar").data
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape") as tar:
        members = tar.getmembers()
        top = identifier.replace("/", "-")
        assert all(one.name == top or one.name.startswith(f"{top}/") for one in members)
        assert all(".." not in one.name.split("/") for one in members)
        assert [one.linkname for one in members if one.issym()] == ["facts.md"]
        left_out = tar.extractfile(f"{top}/LEFT-OUT.txt")
        assert left_out is not None
        assert b"/etc/passwd" in left_out.read()
        for entry in world.runtime.repository.get(identifier).entries:
            if entry.kind == "file":
                found = tar.extractfile(f"{top}/{entry.path}")
                assert found is not None
                assert hashlib.sha256(found.read()).hexdigest() == entry.sha256, entry.path


def test_coreutils_unpack_the_tar_and_the_snapshots_own_checksums_prove_it(
    world: World, kari: Visitor, tmp_path: Path
) -> None:
    identifier = snapshot(world)
    (tmp_path / "z.tar").write_bytes(kari.get(f"/snapshots/{identifier}/tar").data)
    subprocess.run(["tar", "-xf", "z.tar"], cwd=tmp_path, check=True)
    sums = (world.runtime.repository.path(identifier) / "SHA256SUMS").read_text()
    wanted = [line for line in sums.splitlines() if "  files/" in line]
    unpacked = tmp_path / identifier.replace("/", "-")
    (tmp_path / "files").symlink_to(unpacked)
    checked = subprocess.run(
        ["sha256sum", "-c"], input="\n".join(wanted) + "\n", cwd=tmp_path, text=True, check=False
    )
    assert checked.returncode == 0


@pytest.mark.parametrize("what", ["file", "tar"])
def test_a_damaged_file_never_comes_down_whole(world: World, kari: Visitor, what: str) -> None:
    (world.root("z") / "memory" / "large.bin").write_bytes(os.urandom(700_001))
    identifier = snapshot(world)
    href = numbers(kari.get(f"/snapshots/{identifier}").text)["memory/large.bin"]
    spoil(world, identifier, "memory/large.bin")
    with served(world) as url:
        browser = Visitor(create_app(world.runtime))
        browser.log_in("kari")
        cookie = browser.client.get_cookie("agent_backup_session")
        assert cookie is not None
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        path = href if what == "file" else f"/snapshots/{identifier}/tar"
        connection.request("GET", path, headers={"Cookie": f"agent_backup_session={cookie.value}"})
        answer = connection.getresponse()
        assert answer.status == 200
        # A browser, too, calls a download failed whose end never comes.
        with pytest.raises(http.client.HTTPException):
            answer.read()
    assert world.runtime.repository.get_head(identifier).damaged
    assert f"rot/{identifier}" in [one.key for one in alerts.open_alerts(world.runtime.redis)]


def test_a_file_that_is_not_there_is_404(world: World, kari: Visitor) -> None:
    identifier = snapshot(world)
    for number in ("0", "99999", "-1", "x", "%2e%2e"):
        assert kari.get(f"/snapshots/{identifier}/files/{number}").status_code == 404, number
    assert kari.get("/snapshots/weekly/1999-W01/z/tar").status_code == 404


def form(page: str) -> str:
    found = re.search(r'name="mark" value="([0-9a-f]+)"', page)
    assert found is not None, page
    return found[1]


def test_the_wizard_shows_what_would_change_and_changes_nothing(world: World, kari: Visitor) -> None:
    identifier = snapshot(world)
    root = world.root("z")
    (root / "SOUL.md").unlink()
    world.weights("z").write_text('{"urgency": 9}')
    (root / "memory" / "new.md").write_text("since then")
    page = kari.get(f"/snapshots/{identifier}/restore").text
    assert "1 would come back" in page
    assert "1 would be as in the snapshot again" in page
    assert "1 would go" in page
    assert "2 would be lost but for the evidence" in page
    assert "memory/new.md" in page
    assert not (root / "SOUL.md").exists()
    assert json.loads(world.weights("z").read_text()) == {"urgency": 9}


def test_a_restore_brings_the_files_back_keeps_evidence_and_is_on_the_record(
    world: World, kari: Visitor
) -> None:
    identifier = snapshot(world)
    before = world.weights("z").read_bytes()
    world.weights("z").write_text("wiped")
    at = f"/snapshots/{identifier}/restore"
    answer = kari.post(at, mark=form(kari.get(at).text), reason="wiped by hand", name="z")
    assert answer.status_code == 302, answer.text
    assert "z is restored" in kari.get(answer.location).text
    assert world.weights("z").read_bytes() == before
    line = list(world.runtime.history.read("restore"))[-1]
    assert (line["by"], line["reason"], line["ok"], line["from"]) == (
        "kari",
        "wiped by hand",
        True,
        [identifier],
    )
    assert "wiped" in (Path(line["evidence"]) / "priority_weights.json").read_text()


def test_one_file_is_restored_and_no_other(world: World, kari: Visitor) -> None:
    identifier = snapshot(world)
    soul = (world.root("z") / "SOUL.md").read_bytes()
    (world.root("z") / "SOUL.md").write_text("poisoned")
    world.weights("z").write_text("kept as it is")
    at = f"/snapshots/{identifier}/restore"
    page = kari.get(f"{at}?path=SOUL.md").text
    assert "priority_weights.json" not in page
    fields = {
        "mark": form(page),
        "reason": "poisoned",
        "name": "z",
        "path": "SOUL.md",
        "csrf_token": kari.token(),
    }
    assert kari.client.post(at, data=fields, headers=kari.headers).status_code == 302
    assert (world.root("z") / "SOUL.md").read_bytes() == soul
    assert world.weights("z").read_text() == "kept as it is"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"reason": ""}, "needs a reason"),
        ({"name": "em"}, "is not “z”"),
        ({"mark": "0" * 32}, "Nothing was done"),
    ],
)
def test_without_reason_name_or_an_up_to_date_picture_nothing_is_restored(
    world: World, kari: Visitor, given: dict[str, str], said: str
) -> None:
    identifier = snapshot(world)
    world.weights("z").write_text("as it is")
    at = f"/snapshots/{identifier}/restore"
    answer = kari.post(at, **{"mark": form(kari.get(at).text), "reason": "x", "name": "z", **given})
    assert answer.status_code in (400, 409)
    assert said in answer.text
    assert world.weights("z").read_text() == "as it is"
    assert list(world.runtime.history.read("restore")) == []


def test_what_changed_since_it_was_shown_is_shown_again_instead_of_overwritten(
    world: World, kari: Visitor
) -> None:
    identifier = snapshot(world)
    world.weights("z").write_text("one")
    at = f"/snapshots/{identifier}/restore"
    mark = form(kari.get(at).text)
    (world.root("z") / "memory" / "just-now.md").write_text("precious")
    answer = kari.post(at, mark=mark, reason="x", name="z")
    assert answer.status_code == 409
    assert "just-now.md" in answer.text
    assert (world.root("z") / "memory" / "just-now.md").exists()


def test_a_living_agent_is_not_overwritten_and_an_incident_is_offered(world: World, kari: Visitor) -> None:
    identifier = snapshot(world)
    world.weights("z").write_text("of the living")
    at = f"/snapshots/{identifier}/restore"
    mark = form(kari.get(at).text)
    with living(world):
        page = kari.get(at).text
        assert "z is running" in page
        assert "Open an incident" in page
        assert 'name="mark"' not in page
        assert kari.post(at, mark=mark, reason="x", name="z").status_code == 409
        assert world.weights("z").read_text() == "of the living"


@contextlib.contextmanager
def living(world: World) -> Iterator[None]:
    """Let a process of z live."""
    alive = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], cwd=world.root("z"),
        env={**os.environ, "AGENT_ID": "z", "AGENT_ROOT": str(world.root("z"))},
    )  # fmt: skip
    try:
        yield
    finally:
        alive.kill()
        alive.wait()


def move(world: World, host: str) -> None:
    file = world.config_dir / "agents.json"
    document = json.loads(file.read_text())
    document["agents"]["z"]["host"] = host
    file.write_text(json.dumps(document))


def test_an_agent_of_another_host_is_seen_and_restored_there_by_a_worker_of_its_host(
    world: World, kari: Visitor
) -> None:
    identifier = snapshot(world)
    move(world, "elsewhere")
    before = world.weights("z").read_bytes()
    world.weights("z").write_text("wiped")
    at = f"/snapshots/{identifier}/restore"
    page = kari.get(at).text
    assert "z lives on “elsewhere”" in page
    assert 'name="mark"' not in page
    with worker(world, "backup.elsewhere"):
        seen = kari.get(kari.post(f"{at}/look").location).text
        assert "1 would be as in the snapshot again" in seen
        assert "seen on “elsewhere”" in seen
        assert world.weights("z").read_text() == "wiped", "to look changes nothing"
        world.weights("z").write_text("wiped again, behind the picture")
        (world.root("z") / "memory" / "new.md").write_text("precious")
        late = kari.get(kari.post(at, mark=form(seen), reason="wiped", name="z").location).text
        assert "its files have changed since this was shown" in late
        assert (world.root("z") / "memory" / "new.md").exists()
        mark = form(kari.get(kari.post(f"{at}/look").location).text)
        done = kari.post(at, mark=mark, reason="wiped", name="z").location
        assert "z is restored" in kari.get(done).text
        again = kari.get(kari.post(at, mark=mark, reason="once more", name="z").location).text
        assert "there was nothing to do" in again
    assert world.weights("z").read_bytes() == before
    lines = [(line["by"], line["reason"], line["ok"]) for line in world.runtime.history.read("restore")]
    assert lines == [("kari", "wiped", True), ("kari", "once more", True)]


def test_while_no_worker_of_the_other_host_is_at_work_the_page_says_so_and_what_to_do(
    world: World, kari: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backup_worker.console.restores.WAIT_S", 0.1)
    identifier = snapshot(world)
    move(world, "elsewhere")
    asked = kari.post(f"/snapshots/{identifier}/restore/look").location
    page = kari.get(asked).text
    assert "No worker of that host is at work" in page
    assert f"backup-worker restore z --from {identifier}" in page
    with worker(world, "backup.elsewhere"):
        until(lambda: "Nothing to do" in kari.get(asked).text)


def test_an_order_that_is_taken_up_too_late_restores_nothing(
    world: World, kari: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backup_worker.console.restores.WAIT_S", 0.1)
    monkeypatch.setattr("backup_worker.console.restores.ORDER_S", 0.0)
    identifier = snapshot(world)
    move(world, "elsewhere")
    world.weights("z").write_text("as it is")
    at = f"/snapshots/{identifier}/restore"
    looked = kari.post(f"{at}/look").location
    with worker(world, "backup.elsewhere"):
        until(lambda: 'name="mark"' in kari.get(looked).text)
    ordered = kari.post(at, mark=form(kari.get(looked).text), reason="x", name="z").location
    with worker(world, "backup.elsewhere"):
        until(lambda: "took this up in time" in kari.get(ordered).text)
    assert world.weights("z").read_text() == "as it is"


def test_an_agent_whose_folder_is_gone_is_restored(world: World, kari: Visitor) -> None:
    identifier = snapshot(world)
    before = world.weights("z").read_bytes()
    shutil.rmtree(world.root("z"))
    at = f"/snapshots/{identifier}/restore"
    page = kari.get(at).text
    assert "4 would come back" in page, "three files and a folder"
    done = kari.post(at, mark=form(page), reason="gone", name="z")
    assert "z is restored: 3 files" in kari.get(done.location).text
    assert world.weights("z").read_bytes() == before


def test_a_living_agent_of_another_host_is_not_overwritten_either(world: World, kari: Visitor) -> None:
    identifier = snapshot(world)
    move(world, "elsewhere")
    world.weights("z").write_text("of the living")
    at = f"/snapshots/{identifier}/restore"
    with worker(world, "backup.elsewhere"):
        mark = form(kari.get(kari.post(f"{at}/look").location).text)
        with living(world):
            page = kari.get(kari.post(f"{at}/look").location).text
            assert "z is running" in page
            assert 'name="mark"' not in page
            refused = kari.get(kari.post(at, mark=mark, reason="x", name="z").location).text
            assert "was not restored" in refused
            assert "is running" in refused
    assert world.weights("z").read_text() == "of the living"


def test_the_answer_to_one_order_is_not_shown_for_another(
    world: World, kari: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backup_worker.console.restores.WAIT_S", 0.0)
    identifier = snapshot(world)
    move(world, "elsewhere")
    at = f"/snapshots/{identifier}/restore"
    asked = kari.post(f"{at}/look").location
    assert kari.get(asked).status_code == 200
    assert kari.get(f"{asked}&path=SOUL.md").status_code == 404
    assert kari.get(f"{at}?asked=nothing").status_code == 404
    queues.open_queue("backup", world.runtime.redis).enqueue_call(
        "os.system", args=("true",), job_id="foreign"
    )
    assert kari.get(f"{at}?asked=foreign").status_code == 404


def test_a_damaged_snapshot_is_not_restored(world: World, kari: Visitor) -> None:
    identifier = snapshot(world)
    spoil(world, identifier, "SOUL.md")
    world.weights("z").write_text("x")
    page = kari.get(f"/snapshots/{identifier}/restore").text
    assert "damaged" in page
    assert 'name="mark"' not in page
