"""What the console shows, on a fleet with a past that the real engine made, and what it shows while Redis is away."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from backup_worker import backups
from backup_worker.console import create_app
from backup_worker.console.words import MINUS
from em_bridge import Publisher
from tests.console_fleet import Visitor, World, live_through, make_world
from tests.integration.conftest import ValkeyServer

PAGES = (
    "/",
    "/backups",
    "/incidents",
    "/changes",
    "/history",
    "/history?verify=1",
    "/alerts",
    "/messages",
    "/metrics",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    server = ValkeyServer(tmp_path_factory.mktemp("valkey"), password="hunter2-of-redis")
    made = make_world(tmp_path_factory.mktemp("fleet") / "w", server.url)
    live_through(made, time.time())
    yield made
    server.close()


@pytest.fixture
def visitor(world: World) -> Visitor:
    return Visitor(create_app(world.runtime))


def card(page: str, agent: str) -> str:
    found = re.search(rf'<article [^>]*id="agent-{agent}".*?</article>', page, re.S)
    assert found is not None
    return found[0]


def test_every_page_of_a_fleet_with_a_past_is_shown(world: World, visitor: Visitor) -> None:
    heads = world.runtime.repository.snapshots()
    for path in (*PAGES, *(f"/snapshots/{head.id}" for head in heads[::7])):
        answer = visitor.get(path)
        assert answer.status_code == 200, (path, answer.text)


def test_every_page_of_a_fleet_without_a_past_is_shown(valkey: ValkeyServer, tmp_path: Path) -> None:
    visitor = Visitor(create_app(make_world(tmp_path / "w", valkey.url).runtime))
    for path in (*PAGES, "/rq/", "/rq/0/view/jobs", "/rq/0/view/workers"):
        assert visitor.get(path).status_code == 200, path
    assert "There is no snapshot yet" in visitor.get("/backups").text


def test_a_card_says_how_an_agent_is_and_how_old_its_backups_are(visitor: Visitor) -> None:
    page = visitor.get("/").text
    rick, leroy, z = card(page, "rick"), card(page, "leroy"), card(page, "z")
    assert "dead" in rick
    assert "no heartbeat for 60 s" in rick
    assert "Recovery is in “select”" in rick
    assert "is overdue" in leroy
    assert 'href="#agent-em"' in z
    assert "needed by jay, rick, leroy" in z
    assert "is overdue" not in z


def test_the_calendar_tells_good_suspect_damaged_pinned_and_missed_apart(
    world: World, visitor: Visitor
) -> None:
    page = visitor.get("/backups").text
    runtime = world.runtime
    pinned = next(head for head in runtime.repository.snapshots() if head.pinned)
    damaged = next(head for head in runtime.repository.snapshots() if head.damaged)
    suspect = next(head for head in runtime.repository.snapshots() if head.status == "suspect")
    for head, mark in ((pinned, "good pinned"), (damaged, "damaged"), (suspect, "suspect")):
        assert re.search(rf'class="mark {mark}" href="/snapshots/{head.id}"', page), head.id
    daily = page[page.index("daily calendar") : page.index("weekly calendar")]
    leroy = re.search(r'<th scope="row">leroy</th>.*?</tr>', daily, re.S)
    assert leroy is not None
    # Four days ago, and the newest one: an agent without any snapshot before has missed nothing.
    assert leroy[0].count("mark missed") == 2
    assert "Europe/Oslo" in page


def test_snapshots_are_found_by_agent_tier_and_status(visitor: Visitor) -> None:
    page = visitor.get("/backups?agent=rick&status=suspect").text
    listed = page[page.index("All snapshots") :]
    assert len(re.findall(r'href="/snapshots/', listed)) == 1
    assert "No snapshot is like that" in visitor.get("/backups?agent=em&status=partial").text


def test_a_snapshot_shows_what_is_in_it_and_how_its_weights_changed(world: World, visitor: Visitor) -> None:
    newest = world.runtime.repository.snapshots("z", "daily")[-2]
    page = visitor.get(f"/snapshots/{newest.id}").text
    assert "memory/facts.md" in page
    assert "urgency" in page
    assert f"{MINUS}0.01" in page
    assert f"backup-worker verify {newest.id}" in page
    suspect = next(head for head in world.runtime.repository.snapshots() if head.status == "suspect")
    assert "required, and empty" in visitor.get(f"/snapshots/{suspect.id}").text


def test_what_is_not_there_is_404_and_not_a_way_out_of_the_repository(visitor: Visitor) -> None:
    gone = ("/nothing", "/snapshots/daily/1999-01-01/z", "/incidents/nobody")
    for path in (*gone, "/snapshots/..%2f..%2fetc/x/z", "/snapshots/daily/%2e%2e/z"):
        answer = visitor.get(path)
        assert answer.status_code == 404, path
        assert "Traceback" not in answer.text


def test_an_incident_is_told_step_by_step(visitor: Visitor) -> None:
    page = visitor.get("/incidents/rick-20261102T070000-bbbb").text
    assert "weekly is damaged" in page
    assert "failed" in page
    assert page.index("pid 99 is gone") < page.index("weekly is damaged")
    assert "recovered" in visitor.get("/incidents").text


def test_a_proposed_change_stands_beside_what_is_backed_up(visitor: Visitor) -> None:
    page = visitor.get("/changes").text
    row = re.search(r"urgency</th>.*?</tr>", page, re.S)
    assert row is not None
    assert "0.72" in row[0]
    assert "+0.2" in row[0]
    assert '<div class="add">+ Be brief.</div>' in page
    assert "removed" in page
    assert "backup-worker approve z-weights-7" in page


def test_many_proposals_are_compared_and_shown_a_page_at_a_time(valkey: ValkeyServer, tmp_path: Path) -> None:
    world = make_world(tmp_path / "w", valkey.url, ("z",))
    for number in range(13):
        Publisher(world.runtime.redis).config_proposed(f"c{number}", "z", ["SOUL.md"], "em")
    visitor = Visitor(create_app(world.runtime))
    first, second = visitor.get("/changes").text, visitor.get("/changes?waiting=2").text
    shown = [re.findall(r'id="change-\d+">(c\d+)</h2>', page) for page in (first, second)]
    assert [len(names) for names in shown] == [10, 3]
    assert sorted(shown[0] + shown[1]) == sorted(f"c{number}" for number in range(13))
    assert "13 wait for a human" in first


def test_the_record_is_shown_filtered_and_verified(visitor: Visitor) -> None:
    page = visitor.get("/history?kind=alert&agent=leroy").text
    assert "daily backup of leroy is missing" in page
    assert page.count("<td>leroy</td>") == 1
    assert "The chain holds" in visitor.get("/history?verify=1").text


def test_streams_lag_jobs_and_dead_letters_are_shown(world: World, visitor: Visitor) -> None:
    world.runtime.redis.rpush("rq:queue:backup", "one")
    world.runtime.redis.zadd("rq:failed:maintenance", {"two": 9e9})
    page = visitor.get("/messages").text
    assert "unknown type “config.guessed”" in page
    assert "em-router" in page
    for queue, waiting, failed in (("backup", 1, 0), ("maintenance", 0, 1)):
        row = re.search(rf'<th scope="row" class="path">{queue}</th>(.*?)</tr>', page, re.S)
        assert row is not None
        assert re.findall(r">(\d+)</td>", row[1]) == [str(waiting), "0", str(failed)], queue
    assert "hello" not in page, "what agents say to each other is not the console's business"


def test_what_only_another_host_knows_is_said_and_not_guessed(valkey: ValkeyServer, tmp_path: Path) -> None:
    world = make_world(tmp_path / "w", valkey.url, ("z",))
    backups.by_hand(world.runtime, "z", "daily", now=time.time())
    (world.root("z") / "SOUL.md").write_text("not the z of elsewhere")
    file = world.config_dir / "agents.json"
    document = json.loads(file.read_text())
    document["agents"]["z"]["host"] = "elsewhere"
    file.write_text(json.dumps(document))
    visitor = Visitor(create_app(world.runtime))
    incident = visitor.post("/agents/z/recover", reason="stuck").location
    for _ in range(3):
        shown = card(visitor.get("/").text, "z")
        assert "its files are on “elsewhere”" in shown
        time.sleep(0.1)
    assert "Its log is on “elsewhere”" in visitor.get(incident).text


def test_nothing_that_others_wrote_becomes_markup(world: World) -> None:
    hostile = '"><script>alert(1)</script>'
    Publisher(world.runtime.redis).config_proposed(
        "hostile", "jay", ["SOUL.md"], hostile, reason=hostile, proposed={"SOUL.md": hostile.encode()}
    )
    world.runtime.alert("hostile", "info", hostile, hostile, agent="jay")
    world.runtime.record("action", action="test", detail=hostile)
    visitor = Visitor(create_app(world.runtime))
    for path in ("/", "/changes", "/alerts", "/history", "/messages"):
        page = visitor.get(path).text
        assert "<script>alert" not in page, path
    assert "&lt;script&gt;alert(1)" in visitor.get("/changes").text


def test_no_page_shows_a_secret(world: World, visitor: Visitor) -> None:
    session_key = world.users.session_secret()
    for path in (*PAGES, "/rq/", "/rq/0/view/jobs", "/nothing", "/login"):
        page = visitor.get(path).data
        assert b"s3cret-word" not in page, path
        assert b"hunter2-of-redis" not in page, path
        assert session_key not in page, path


def test_metrics_are_what_prometheus_reads(world: World, visitor: Visitor) -> None:
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(visitor.get("/metrics").text)
        for sample in family.samples
    }
    runtime, now = world.runtime, time.time()
    newest = runtime.repository.snapshots("z", "daily")[-1]
    assert found["agent_backup_age_seconds", "daily", "z"] == pytest.approx(now - newest.created_at, abs=30)
    assert found["agent_backup_overdue", "daily", "leroy"] == 1
    assert found["agent_backup_overdue", "daily", "z"] == 0
    assert found["agent_backup_snapshots", "daily", "suspect"] == 1
    assert found["agent_backup_open_incidents", "rick"] == 1
    assert found["agent_backup_open_alerts", "critical"] >= 1
    assert found["agent_backup_stream_lag_entries", "em-router", "em:messages"] == 5
    assert found["agent_backup_redis_up",] == 1
    assert found["agent_backup_bytes", "daily", "z"] == newest.bytes
    assert 0 < found["agent_backup_duration_seconds", "daily", "z"] < 60
    assert found["agent_backup_recoveries_total", "recovered"] == 1
    assert found["agent_backup_recovery_seconds", "leroy"] == 10
    assert found["agent_backup_recovery_paused",] == 0
    assert found["agent_backup_dead_letters",] == 1
    assert ("agent_backup_queue_jobs", "backup") in found


def test_the_grafana_dashboard_asks_only_for_numbers_and_labels_that_are_there(visitor: Visitor) -> None:
    there: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(visitor.get("/metrics").text):
        for sample in family.samples:
            there.setdefault(sample.name, set()).update(sample.labels)
    # It has samples as soon as there was a drill.
    there.setdefault("agent_backup_restore_proven_age_seconds", {"agent"})
    document = json.loads((Path(__file__).parents[2] / "config" / "grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in document["panels"] for target in panel["targets"]]
    queries.append(document["templating"]["list"][1]["query"]["query"])
    assert len(queries) >= 20
    for query in queries:
        names = re.findall(r"agent_backup_\w+", query)
        assert names, query
        for name in names:
            assert name in there, query
        for label in re.findall(r"[{,]\s*(\w+)\s*=", query) + re.findall(r"by \(([^)]*)\)", query):
            for one in label.split(","):
                assert any(one.strip() in there[name] for name in names), query
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in document["panels"]]
    assert len(set(places)) == len(places)


def test_while_redis_is_away_the_disk_is_shown_under_a_banner(valkey: ValkeyServer, tmp_path: Path) -> None:
    world = make_world(tmp_path / "w", valkey.url, ("z",))
    made = backups.by_hand(world.runtime, "z", "daily", now=time.time())
    visitor = Visitor(create_app(world.runtime))
    incident = visitor.post("/agents/z/recover", reason="stuck").location
    assert visitor.get(incident).status_code == 200
    valkey.kill()
    for path in PAGES[:-1]:
        answer = visitor.get(path)
        assert answer.status_code == 200, path
        assert "Redis is away" in answer.text, path
        assert "Traceback" not in answer.text
    assert made.id in visitor.get("/backups").text
    assert "agent_backup_redis_up 0.0" in visitor.get("/metrics").text
    assert "agent_backup_open_alerts" not in visitor.get("/metrics").text
    assert visitor.get("/healthz").status_code == 503
    for path in (incident, "/rq/", "/rq/0/data/workers.json"):
        answer = visitor.get(path)
        assert answer.status_code == 503, path
        assert "Traceback" not in answer.text
    assert visitor.post("/agents/z/recover", reason="try").status_code == 503
    valkey.start()
    assert visitor.get("/healthz").status_code == 200
    assert "Redis is away" not in visitor.get("/").text


def test_a_redis_that_hangs_does_not_hang_the_console(valkey: ValkeyServer, tmp_path: Path) -> None:
    visitor = Visitor(create_app(make_world(tmp_path / "w", valkey.url, ("z",)).runtime))
    valkey.freeze()
    begun = time.monotonic()
    try:
        answer = visitor.get("/")
    finally:
        valkey.thaw()
    assert "Redis is away" in answer.text
    assert time.monotonic() - begun < 6


def test_a_broken_edit_of_the_configuration_is_said_and_the_last_good_one_stays(
    valkey: ValkeyServer, tmp_path: Path
) -> None:
    world = make_world(tmp_path / "w", valkey.url, ("z", "em"))
    visitor = Visitor(create_app(world.runtime))
    file = world.config_dir / "agents.json"
    before = file.read_text()
    file.write_text("{")
    page = visitor.get("/").text
    assert "The newest edit of the configuration is refused" in page
    assert card(page, "z")
    agents = json.loads(before)
    del agents["agents"]["z"]
    file.write_text(json.dumps(agents))
    page = visitor.get("/").text
    assert "is refused" not in page
    assert 'id="agent-z"' not in page
