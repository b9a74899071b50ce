"""What people do in the console: it happens, once, and stands in the record under their names."""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from backup_worker import alerts, backups
from backup_worker.approval import changes
from backup_worker.console import create_app
from backup_worker.console.roles import APPROVER
from backup_worker.recovery import breakers
from backup_worker.recovery.incident import ESCALATED, IncidentStore
from em_bridge import Publisher, events, streams
from em_bridge.lease import Lease
from em_bridge.router import Router
from tests.console_fleet import PASSWORD, Visitor, World, make_world, until
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


def test_what_was_proposed_anew_since_the_page_was_shown_is_not_decided(world: World, kari: Visitor) -> None:
    propose(world)
    seen = re.findall(r'name="proposal" value="([^"]+)"', kari.get("/changes").text)
    assert len(seen) == 2, "to approve, and to reject"
    propose(world)
    refused = kari.post("/changes/c1/approve", proposal=seen[0])
    assert refused.status_code == 400
    assert "is not the one you have seen" in refused.text
    assert decisions(world) == []
    (shown, _) = re.findall(r'name="proposal" value="([^"]+)"', kari.get("/changes").text)
    assert kari.post("/changes/c1/approve", proposal=shown).status_code == 302
    assert len(decisions(world)) == 1


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


def test_a_silence_begins_with_a_reason_and_an_end_and_is_ended_early(world: World, kari: Visitor) -> None:
    runtime = world.runtime
    runtime.alert("missing/daily/z", "critical", "daily backup of z is missing", "it is not there", agent="z")
    for given in ({"names": "z", "hours": "4", "reason": ""}, {"names": "z", "hours": "9999", "reason": "x"},
                  {"names": "", "hours": "4", "reason": "x"}):  # fmt: skip
        assert kari.post("/silences", **given).status_code == 400
    assert kari.post("/silences", names="nothing", hours="4", reason="x").status_code == 404
    kari.post("/silences", names="missing z", hours="4", reason="moving the disks")
    begun = alerts.silences.active(runtime.redis, time.time())
    assert [(one.kinds, one.agents, one.by, one.why) for one in begun] == [
        (("missing",), ("z",), "kari", "moving the disks")
    ]
    assert "silent until" in kari.get("/alerts").text
    assert kari.post(f"/silences/{begun[0].id}/end").status_code == 302
    assert alerts.silences.active(runtime.redis, time.time()) == []
    assert kari.post(f"/silences/{begun[0].id}/end").status_code == 404
    assert [line["action"] for line in actions(world)] == ["silence", "unsilence"]


def test_all_recoveries_are_paused_loudly_and_resumed(world: World, kari: Visitor) -> None:
    assert "Recovery is paused" not in kari.get("/").text
    assert kari.post("/recovery/pause", reason=" ").status_code == 400
    answer = kari.post("/recovery/pause", reason="moving the disks", hours="4", back="/backups?agent=z")
    assert answer.location == "/backups?agent=z"
    pause = breakers.paused(world.runtime.redis, time.time())
    assert pause is not None
    assert (pause.by, pause.reason) == ("kari", "moving the disks")
    assert pause.until == pytest.approx(time.time() + 4 * 3600, abs=60)
    for path in ("/", "/history", "/rq/"):
        page = kari.get(path).text
        assert "Recovery is paused" in page, path
        assert "moving the disks" in page, path
    assert kari.post("/recovery/resume", back="https://evil.example/").location == "/"
    assert breakers.paused(world.runtime.redis, time.time()) is None
    assert "Recovery is paused" not in kari.get("/").text
    assert [line["action"] for line in actions(world)] == ["pause-recovery", "resume-recovery"]


def test_who_acknowledges_an_incident_stops_all_its_pages(world: World, kari: Visitor) -> None:
    runtime, store = world.runtime, IncidentStore(world.runtime.redis)
    incident, _ = store.open("z", token="t", now=time.time(), reason="dead", beat_mark="0-0")
    store.save(incident.closed(ESCALATED, time.time(), "0-0"), wake_at=None)
    for kind in ("escalation", "attempt"):
        runtime.alert(f"{kind}/z", "critical", f"{kind} of z", "nothing helped", agent="z")
    runtime.alert("escalation/em", "critical", "another one", "", agent="em")
    page = f"/incidents/{incident.id}"
    assert "Acknowledge" in kari.get(page).text
    kari.post(f"{page}/acknowledge")
    seen = {one.key: one.acknowledged_by for one in alerts.open_alerts(runtime.redis)}
    assert seen == {"escalation/z": "kari", "attempt/z": "kari", "escalation/em": None}
    assert ">Acknowledge<" not in kari.get(page).text


def test_the_evidence_of_an_incident_comes_down_as_a_tar(world: World, kari: Visitor) -> None:
    store = IncidentStore(world.runtime.redis)
    incident, _ = store.open("z", token="t", now=time.time(), reason="dead", beat_mark="0-0")
    assert kari.get(f"/incidents/{incident.id}/evidence").status_code == 404
    folder = world.runtime.config.schedule.state / "evidence" / incident.id
    (folder / "tree-1").mkdir(parents=True)
    (folder / "REPORT.md").write_text("what happened")
    (folder / "tree-1" / "SOUL.md").write_text("poisoned")
    (folder / "tree-1" / "link").symlink_to("/etc/passwd")
    data = kari.get(f"/incidents/{incident.id}/evidence").data
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert sorted(tar.getnames()) == [
            f"{incident.id}/REPORT.md", f"{incident.id}/tree-1", f"{incident.id}/tree-1/SOUL.md",
        ]  # fmt: skip


def test_waves_attempts_and_the_last_words_stand_on_the_page_of_an_incident(
    world: World, kari: Visitor
) -> None:
    store = IncidentStore(world.runtime.redis)
    incident, _ = store.open("z", token="t", now=time.time(), reason="dead", beat_mark="0-0")
    store.open("em", token="u", now=time.time(), reason="dead", beat_mark="0-0")
    for step, ok in (("fence", True), ("select", True), ("start", False), ("fence", True), ("select", True)):
        incident = incident.noted(step, time.time(), ok, "detail")
    store.save(incident, wake_at=time.time() + 60)
    page = kari.get(f"/incidents/{incident.id}").text
    assert page.index("wave 1") < page.index(">em</b>") < page.index("wave 2") < page.index(">z</b>")
    assert page.index("Attempt 1") < page.index("failed") < page.index("Attempt 2")
    assert "wave 2" in kari.get("/incidents").text


def test_dead_letters_are_looked_at_retried_and_dropped(world: World, kari: Visitor) -> None:
    client = world.runtime.redis
    event = events.AgentState("z", "ALIVE")
    for _ in range(2):
        streams.append(
            client, streams.dead_letter(event.stream, "1-1", "nobody", events.encode(event), time.time())
        )
    page = kari.get("/messages").text
    first, second = re.findall(r'href="/messages/dead-letters/([\d-]+)"', page)
    assert "agent.state" in kari.get(f"/messages/dead-letters/{first}").text
    assert kari.post(f"/messages/dead-letters/{first}/retry").status_code == 302
    assert client.xlen(streams.AGENT_STATE) == 1
    assert kari.post(f"/messages/dead-letters/{second}/drop").status_code == 400, "a reason is needed"
    assert kari.post(f"/messages/dead-letters/{second}/drop", reason="old").status_code == 302
    assert client.xlen(streams.DEAD_LETTER) == 0
    assert kari.get(f"/messages/dead-letters/{second}").status_code == 404
    assert [line["action"] for line in actions(world)] == ["dead-letter-retry", "dead-letter-drop"]


def test_a_replay_is_shown_first_and_delivers_what_is_missing_once(world: World, kari: Visitor) -> None:
    client = world.runtime.redis
    client.sadd(streams.SEEN, "z", "em")
    epoch = Lease(client, "em", holder="test", ttl_s=60.0).acquire()
    assert epoch is not None
    router = Router(client, consumer="test", epoch=epoch)
    for seq in (1, 2, 3):
        streams.append(client, events.Message("em", "z", seq, b"x", time.time()))
    until(lambda: router.step(0.05) and router.routed == 3)
    client.xtrim(streams.inbox("z"), maxlen=0)
    client.delete("em:delivered:z")
    assert kari.get("/messages?from=yesterday-ish").status_code == 400
    page = kari.get("/messages?from=2020-01-01&recipient=z").text
    assert re.search(r"would be delivered again</dt><dd><b>3</b>", page)
    assert client.xlen(streams.inbox("z")) == 0, "looking delivers nothing"
    for _ in range(2):
        assert kari.client.post(
            "/messages/replay", data={"csrf_token": kari.token(), "from": "2020-01-01", "recipient": "z"},
            headers=kari.headers,
        ).status_code == 302  # fmt: skip
    assert client.xlen(streams.inbox("z")) == 3


def test_messages_are_found_by_who_wrote_to_whom_part_by_part(world: World, kari: Visitor) -> None:
    client = world.runtime.redis
    for seq in range(1, 61):
        streams.append(client, events.Message("z", "em", seq, b"secret words", time.time()))
    streams.append(client, events.Message("em", "z", 1, b"x", time.time()))
    assert kari.get("/messages?sender=em").text.count("<td>em</td><td>z</td>") == 1
    first = kari.get("/messages?sender=z").text
    assert first.count("<td>z</td><td>em</td>") == 50
    assert "secret words" not in first
    older = re.search(r'rel="next" href="([^"#]+)', first)
    assert older is not None
    assert kari.get(older[1].replace("&amp;", "&")).text.count("<td>z</td><td>em</td>") == 10
