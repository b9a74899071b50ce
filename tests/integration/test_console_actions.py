"""What people do in the console: it happens, once, and stands in the record under their names."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from backup_worker import alerts, backups, changes
from backup_worker.console import create_app
from backup_worker.console.roles import APPROVER
from backup_worker.recovery.incident import IncidentStore
from em_bridge import Publisher, events, streams
from tests.console_fleet import PASSWORD, Visitor, World, make_world
from tests.integration.conftest import ValkeyServer
from tests.tools import needs


@pytest.fixture
def world(valkey: ValkeyServer, tmp_path: Path) -> World:
    made = make_world(tmp_path / "w", valkey.url, ("em", "z"))
    made.users.add("kari", PASSWORD, role=APPROVER)
    return made


@pytest.fixture
def kari(world: World) -> Visitor:
    visitor = Visitor(create_app(world.runtime))
    visitor.log_in("kari")
    return visitor


def actions(world: World) -> list[dict[str, Any]]:
    return [line for line in world.runtime.history.read("action") if line["action"] != "login"]


def snapshot(world: World) -> str:
    return backups.by_hand(world.runtime, "z", "daily", now=time.time()).id


def propose(world: World, change: str = "c1", by: str = "em") -> None:
    new = json.dumps({"urgency": 0.9}).encode()
    Publisher(world.runtime.redis).config_proposed(
        change, "z", ["priority_weights.json"], by, proposed={"priority_weights.json": new}
    )


def decisions(world: World) -> list[events.Event]:
    rows = streams.read_range(world.runtime.redis, streams.CONFIG_CHANGE)
    found = [events.decode(fields) for _, fields in rows]
    return [event for event in found if not isinstance(event, events.ConfigProposed)]


def test_a_snapshot_is_pinned_and_unpinned(world: World, kari: Visitor) -> None:
    identifier = snapshot(world)
    for action, held in (("pin", True), ("unpin", False)):
        answer = kari.post(f"/snapshots/{identifier}/{action}")
        assert answer.location == f"/snapshots/{identifier}"
        assert world.runtime.repository.get_head(identifier).pinned is held
    assert [(line["action"], line["by"], line["id"]) for line in actions(world)] == [
        ("pin", "kari", identifier),
        ("unpin", "kari", identifier),
    ]
    assert kari.post("/snapshots/daily/1999-01-01/z/pin").status_code == 404


def test_verifying_now_proves_a_whole_snapshot_and_finds_a_changed_byte(world: World, kari: Visitor) -> None:
    identifier = snapshot(world)
    kari.post(f"/snapshots/{identifier}/verify")
    assert "Every byte is as it was written" in kari.get(f"/snapshots/{identifier}").text
    file = world.runtime.repository.path(identifier) / "files" / "priority_weights.json"
    file.chmod(0o600)
    file.write_bytes(file.read_bytes().replace(b"0.5", b"9.5"))
    kari.post(f"/snapshots/{identifier}/verify")
    page = kari.get(f"/snapshots/{identifier}").text
    assert "Damaged" in page
    assert "the last verification found it damaged" in page.lower()
    lines = list(world.runtime.history.read("verify"))
    assert [(line["ok"], line["by"]) for line in lines] == [(True, "kari"), (False, "kari")]
    assert f"rot/{identifier}" in [one.key for one in alerts.open_alerts(world.runtime.redis)]


def test_an_approval_is_published_once_under_the_users_name(world: World, kari: Visitor) -> None:
    propose(world)
    assert kari.post("/changes/c1/approve", reason="tested").status_code == 302
    again = kari.post("/changes/c1/approve")
    assert again.status_code == 400
    assert "already approved by kari" in again.text
    found = decisions(world)
    assert len(found) == 1
    assert isinstance(found[0], events.ConfigApproved)
    assert (found[0].by, found[0].reason) == ("kari", "tested")
    assert changes.get(world.runtime.redis, "c1").state == changes.APPROVED
    assert [(line["action"], line["by"], line["change"], line["agent"]) for line in actions(world)] == [
        ("approve", "kari", "c1", "z")
    ]


def test_a_rejection_needs_a_reason(world: World, kari: Visitor) -> None:
    propose(world)
    refused = kari.post("/changes/c1/reject", reason="  ")
    assert refused.status_code == 400
    assert decisions(world) == []
    kari.post("/changes/c1/reject", reason="too steep")
    found = decisions(world)
    assert isinstance(found[0], events.ConfigRejected)
    assert found[0].reason == "too steep"


def test_nobody_decides_what_they_proposed(world: World, kari: Visitor) -> None:
    propose(world, by="kari")
    assert kari.post("/changes/c1/approve").status_code == 400
    assert decisions(world) == []
    assert "somebody else has to decide it" in kari.get("/changes").text


def test_where_signatures_are_asked_for_a_click_is_no_approval_and_a_signature_is(
    world: World, kari: Visitor, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    keygen = [needs("ssh-keygen", why="approvals are signed with it")]
    subprocess.run([*keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    public = key.with_suffix(".pub").read_text().strip()
    (world.config_dir / "allowed_signers").write_text(f'kari namespaces="agent-backup" {public}\n')
    propose(world)
    assert kari.post("/changes/c1/approve").status_code == 400
    assert kari.post("/changes/c1/approve", signature="-----BEGIN SSH SIGNATURE-----").status_code == 400
    assert decisions(world) == []
    assert "Approvals count by signature here" in kari.get("/changes").text
    statement = tmp_path / "statement"
    statement.write_bytes(kari.get("/changes/c1/statement").data)
    subprocess.run(
        [*keygen, "-q", "-Y", "sign", "-f", str(key), "-n", "agent-backup", str(statement)], check=True
    )
    signature = Path(f"{statement}.sig").read_text()
    # A browser sends a text area's lines with both ends.
    answer = kari.post("/changes/c1/approve", signature=signature.replace("\n", "\r\n"))
    assert answer.status_code == 302, answer.text
    assert len(decisions(world)) == 1
    assert "by kari" in kari.get("/changes").text or "signed" in kari.get("/changes").text


def test_a_change_that_is_not_there_is_404(world: World, kari: Visitor) -> None:
    assert kari.post("/changes/nothing/approve").status_code == 404


def test_an_acknowledged_alert_stays_open_and_is_not_repeated(world: World, kari: Visitor) -> None:
    runtime = world.runtime
    runtime.alert("missing/daily/z", "critical", "daily backup of z is missing", "it is not there", agent="z")
    assert 'badge "' not in kari.get("/").text or "Alerts" in kari.get("/").text
    kari.post("/alerts/acknowledge", key="missing/daily/z")
    found = alerts.open_alerts(runtime.redis)
    assert [(one.key, one.acknowledged_by) for one in found] == [("missing/daily/z", "kari")]
    assert "seen by kari" in kari.get("/alerts").text
    assert actions(world)[-1]["action"] == "acknowledge"
    assert kari.post("/alerts/acknowledge", key="nothing").status_code == 404


def test_a_recovery_by_hand_opens_one_incident(world: World, kari: Visitor) -> None:
    assert kari.post("/agents/z/recover", reason="").status_code == 400
    assert kari.post("/agents/nobody/recover", reason="x").status_code == 404
    first = kari.post("/agents/z/recover", reason="stuck since noon")
    second = kari.post("/agents/z/recover", reason="again")
    assert first.location == second.location
    found = list(IncidentStore(world.runtime.redis).all())
    assert [(one.agent, one.reason) for one in found] == [("z", "stuck since noon")]
    assert "stuck since noon" in kari.get(first.location).text
    assert actions(world)[0]["reason"] == "stuck since noon"


def test_an_action_whose_record_cannot_be_written_is_done_and_says_so(world: World, kari: Visitor) -> None:
    identifier = snapshot(world)
    history = world.runtime.config.schedule.history
    history.unlink()
    history.mkdir()
    kari.post(f"/snapshots/{identifier}/pin")
    assert world.runtime.repository.get_head(identifier).pinned
    # With Redis there, the line is kept and written later.
    assert world.runtime.redis.llen("backup:history:unwritten") == 1
