"""Whatever others wrote is text: every address of the console, on a fleet in which everything that can be is markup."""

from __future__ import annotations

import html
import json
import re
import shlex
import time
from collections.abc import Iterator
from urllib.parse import quote

import msgpack
import pytest
from flask import Flask
from redis import Redis
from rq.registry import FailedJobRegistry
from werkzeug.test import TestResponse

from backup_worker import backups
from backup_worker.console import create_app
from backup_worker.console.rq import CHANGING
from backup_worker.queueing import queues
from backup_worker.recovery import breakers
from backup_worker.recovery.incident import ESCALATED, IncidentStore
from em_bridge import Publisher, events, streams
from tests.console_fleet import Visitor, World, make_world
from tests.integration.conftest import ValkeyServer

MARKUP = "<img src=x onerror=alert(1)>"
HOSTILE = f"\"'>{MARKUP}\r\nX-Injected: yes \x1b[31m"
WORD = f"\"'>{MARKUP}"
"""The same without control characters, which the bus lets in nowhere."""
CHANGE = f"c1; $(touch x) {MARKUP}"
FILE = "\"'><img src=x onerror=alert(1)>\r\nX-Injected: yes"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    server = ValkeyServer(tmp_path_factory.mktemp("valkey"))
    made = make_world(tmp_path_factory.mktemp("fleet") / "w", server.url, ("em", "z"))
    poison(made)
    yield made
    server.close()


def poison(world: World) -> None:
    """Write markup wherever somebody else than this project's people writes."""
    runtime, now = world.runtime, time.time()
    client = runtime.redis
    root = world.root("z")
    for day in (1, 2):
        (root / FILE).write_text(f"{day} {HOSTILE}")
        (root / "link").unlink(missing_ok=True)
        (root / "link").symlink_to(f"{HOSTILE}{day}")
        world.weights("z").write_text(json.dumps({HOSTILE: day, "text": HOSTILE * day}))
        backups.by_hand(runtime, "z", "weekly", now=now - 3600 / day)
    (root / FILE).write_text("drifted")
    state = {"state": "DEAD", "since": now, "reason": HOSTILE, "incarnation": HOSTILE, "last_beat": now}
    client.hset(streams.STATES, "z", msgpack.packb(state))
    store = IncidentStore(client)
    incident, _ = store.open("z", token="t", now=now, reason=HOSTILE, beat_mark="0-0")
    incident = incident.noted(HOSTILE, now, False, HOSTILE)
    store.save(incident.closed(ESCALATED, now, "0-0"), wake_at=None)
    store.open("em", token="u", now=now, reason=HOSTILE, beat_mark="0-0")
    evidence = runtime.config.schedule.state / "evidence" / incident.id
    evidence.mkdir(parents=True)
    (evidence / FILE).write_text(HOSTILE)
    log = runtime.config.schedule.state / "logs" / "z.log"
    log.parent.mkdir(parents=True)
    log.write_text(HOSTILE)
    proposed = {"SOUL.md": HOSTILE.encode(), "priority_weights.json": json.dumps({HOSTILE: 9}).encode()}
    em = Publisher(client)
    em.config_proposed(CHANGE, "z", [WORD, *proposed], WORD, reason=WORD, proposed=proposed)
    em.config_proposed("c2", "z", [WORD], WORD, reason=WORD)
    em.config_rejected("c2", f"not {WORD}", reason=WORD)
    runtime.alert(f"hostile/{HOSTILE}", "warning", HOSTILE, HOSTILE, agent="z")
    runtime.silence(["em"], for_s=600, by=HOSTILE, why=HOSTILE)
    streams.append(
        client, streams.dead_letter(HOSTILE, "1-1", HOSTILE, {HOSTILE.encode(): HOSTILE.encode()}, now)
    )
    streams.append(client, events.Message("z", "em", 1, HOSTILE.encode(), now))
    client.xadd(streams.MESSAGES, {"type": HOSTILE, "body": HOSTILE})
    client.xgroup_create(streams.MESSAGES, HOSTILE, "0", mkstream=True)
    client.xadd(f"em:inbox:{HOSTILE}", {"type": "message", "body": HOSTILE})
    runtime.record("action", action=HOSTILE, agent=HOSTILE, detail={HOSTILE: [HOSTILE]})
    runtime.record("backup", agent="z", title=HOSTILE)
    poison_jobs(client)


def poison_jobs(client: Redis) -> None:
    for job_id in ("waiting", "failed"):
        job = queues.open_queue("backup", client).enqueue_call(
            "backup_worker.jobs.backup", args=({HOSTILE: HOSTILE},), job_id=job_id, description=HOSTILE
        )
        client.hset(f"rq:job:{job_id}", "meta", msgpack.packb({HOSTILE: HOSTILE}))
    client.lrem("rq:queue:backup", 0, "failed")
    FailedJobRegistry("backup", connection=client).add(job, 600, exc_string=HOSTILE)
    client.hset("rq:job:failed", mapping={"status": "failed", "exc_info": HOSTILE})
    client.sadd("rq:queues", f"rq:queue:{HOSTILE}")
    client.sadd("rq:workers", f"rq:worker:{HOSTILE}")
    client.hset(
        f"rq:worker:{HOSTILE}", mapping={"queues": HOSTILE, "state": "busy", "current_job": "waiting"}
    )


@pytest.fixture
def app(world: World) -> Flask:
    return create_app(world.runtime)


SKIPPED = {"live.events", "static", "rq_dashboard.static", *CHANGING}


def addresses(app: Flask, world: World) -> Iterator[str]:
    """Yield every address that answers to GET, filled in with what is there."""
    client = world.runtime.redis
    tier, slot, agent = world.runtime.repository.snapshots("z")[-1].id.split("/")
    ids = [one.id for one in IncidentStore(client).all()]
    known = {
        "tier": [tier], "slot": [slot], "agent": [agent], "identifier": ids, "change": [CHANGE],
        "entry": [streams.last_id(client, streams.DEAD_LETTER)], "number": ["0", "1", "2", "3", "4"],
        "job_id": ["waiting", "failed"], "queue_name": ["backup"], "per_page": ["8"], "order": ["asc"], "page": ["1"],
        "registry_name": ["queued", "failed"], "instance_number": ["0"],
    }  # fmt: skip
    for rule in app.url_map.iter_rules():
        if "GET" not in (rule.methods or ()) or rule.endpoint in SKIPPED:
            continue
        for number in range(max((len(known[name]) for name in rule.arguments), default=1)):
            path = rule.rule
            for name in rule.arguments:
                value = known[name][number % len(known[name])]
                path = re.sub(rf"<(?:\w+(?:\([^)]*\))?:)?{name}>", quote(value, safe=""), path)
            yield path


QUERIES = (
    "agent",
    "tier",
    "status",
    "kind",
    "q",
    "sender",
    "to",
    "key",
    "path",
    "against",
    "before",
    "asked",
    "next",
)


def check_commands(path: str, page: str) -> None:
    """A command that is there to be copied runs nothing but itself."""
    for command in re.findall(r'data-copy="([^"]*)"', page):
        words = list(shlex.shlex(html.unescape(command), posix=True, punctuation_chars=True))
        assert not any(word and set(word) <= set("();<>|&\r\n`") for word in words), (path, command)
        assert "$(" not in re.sub(r"'[^']*'", "", html.unescape(command)), (path, command)


def check(path: str, answer: TestResponse) -> None:
    assert answer.status_code < 500, (path, answer.text)
    headers = answer.headers
    assert "X-Injected" not in headers, path
    assert headers["X-Content-Type-Options"] == "nosniff", path
    policy = headers["Content-Security-Policy"]
    assert "unsafe" not in policy, path
    assert policy.startswith("default-src 'none'"), path
    if answer.mimetype == "text/html":
        assert MARKUP not in answer.text, (path, answer.text[max(0, answer.text.find(MARKUP) - 300) :][:600])
        markup = re.sub(r"<script nonce=.*?</script>", "", answer.text, flags=re.S).replace(" onerror=", "")
        assert not re.search(r"\son\w+\s*=|\sstyle\s*=|javascript:", markup), path
        check_commands(path, answer.text)
    elif answer.mimetype == "application/octet-stream":
        assert headers["Content-Disposition"].startswith("attachment;"), path
        assert "sandbox" in policy or path.endswith("statement"), path


def test_on_every_address_what_others_wrote_is_text(app: Flask, world: World) -> None:
    visitor = Visitor(app)
    seen = set()
    visitor.get("/")
    time.sleep(0.3)  # the drift is looked for behind the page
    for path in addresses(app, world):
        answer = visitor.get(path)
        check(path, answer)
        seen.add((path, answer.status_code))
    assert len(seen) >= 40
    refused = {path for path, status in seen if status >= 400}
    assert refused <= {path for path in refused if "/files/" in path or "/evidence" in path}, refused
    shown = visitor.get("/").text + visitor.get("/alerts").text + visitor.get("/changes").text
    assert shown.count("&lt;img src=x") > 10, "this fleet is not hostile"


@pytest.mark.parametrize("name", QUERIES)
def test_no_question_in_an_address_becomes_markup(app: Flask, world: World, name: str) -> None:
    visitor = Visitor(app)
    identifier = world.runtime.repository.snapshots("z")[-1].id
    paths = ("/", "/backups", "/changes", "/alerts", "/history", "/messages", "/incidents", "/weights/z", "/login",
             f"/snapshots/{identifier}", f"/snapshots/{identifier}/restore", f"/{MARKUP}")  # fmt: skip
    for path in paths:
        answer = visitor.client.get(path, query_string={name: HOSTILE}, headers=visitor.headers)
        check(f"{path}?{name}=", answer)


def test_a_file_with_a_hostile_name_comes_down_under_that_name_and_adds_no_header(
    app: Flask, world: World
) -> None:
    visitor = Visitor(app)
    snapshot = world.runtime.repository.snapshots("z")[-1]
    entries = world.runtime.repository.get(snapshot.id).entries
    number = next(index for index, entry in enumerate(entries) if entry.path == FILE)
    answer = visitor.get(f"/snapshots/{snapshot.id}/files/{number}")
    assert answer.status_code == 200
    disposition = answer.headers["Content-Disposition"]
    assert not set(disposition) & set("\r\n<>")
    assert "%0D%0A" in disposition
    assert answer.headers["Content-Security-Policy"] == "default-src 'none'; sandbox"


def test_an_incident_that_calls_itself_a_path_gives_nobody_a_folder(app: Flask, world: World) -> None:
    client = world.runtime.redis
    incident = next(one for one in IncidentStore(client).all() if one.agent == "z")
    key = next(key for key in client.scan_iter("*") if key.endswith(incident.id.encode()))
    stored = msgpack.unpackb(client.hget(key, "data"))
    secret = world.runtime.config.schedule.state / "evidence" / "../secret"
    secret.resolve().mkdir()
    (secret / "key").write_text("private")
    client.hset(
        key.replace(incident.id.encode(), b"evil"), "data", msgpack.packb({**stored, "id": "../secret"})
    )
    for identifier in ("evil", "..", "%2e%2e", "..%2fsecret", "%2e%2e%2fsecret"):
        answer = Visitor(app).get(f"/incidents/{identifier}/evidence")
        assert (answer.status_code, b"private" in answer.data) == (404, False), identifier


def test_a_pause_and_its_reason_are_text(app: Flask, world: World) -> None:
    visitor = Visitor(app)
    visitor.post("/recovery/pause", reason=HOSTILE)
    assert breakers.paused(world.runtime.redis, time.time())
    for path in ("/", "/rq/", "/login"):
        check(path, visitor.get(path))
    visitor.post("/recovery/resume")
