"""The lock on the console: who gets in, from where, and what a browser is told to refuse."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flask import Flask

from backup_worker.console import create_app, roles
from backup_worker.console.roles import APPROVER, OPERATOR, ROLES, VIEWER
from backup_worker.console.security import TRIES
from backup_worker.console.users import Users, UsersError
from em_bridge.errors import AgentBackupError, NotFound, UsageError
from tests.console_fleet import PASSWORD, Visitor, World, basic, make_world, until
from tests.integration.conftest import ValkeyServer, free_port


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    server = ValkeyServer(tmp_path_factory.mktemp("valkey"))
    yield server
    server.close()


@pytest.fixture
def world(server: ValkeyServer, tmp_path: Path) -> World:
    server.client().flushall()
    return make_world(tmp_path / "w", server.url, ("z",))


@pytest.fixture
def app(world: World) -> Flask:
    return create_app(world.runtime)


def command(world: World, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "backup_worker", *words, "--config", str(world.config_dir)]
    env = {**os.environ, "REDIS_URL": world.url}
    return subprocess.run(
        program, input=stdin, env=env, capture_output=True, text=True, check=False, timeout=30
    )


def test_without_users_this_machine_may_look_and_act_under_its_own_name(app: Flask) -> None:
    visitor = Visitor(app)
    assert visitor.get("/").status_code == 200
    assert "no users" in visitor.get("/").text


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[", "10.0.0.1"]
)
def test_on_loopback_a_foreign_name_is_refused_so_that_no_page_gets_in_by_rebinding_it(
    app: Flask, host: str
) -> None:
    assert Visitor(app, host=host).get("/").status_code in (400, 421)


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1:1", "[::1]:8080"])
def test_on_loopback_its_own_names_are_served(app: Flask, host: str) -> None:
    assert Visitor(app, host=host).get("/").status_code == 200


def test_with_users_every_page_asks_for_a_login_first(world: World, app: Flask) -> None:
    world.users.add("kari", PASSWORD, role=APPROVER)
    visitor = Visitor(app)
    for path in ("/", "/backups", "/history", "/rq/", "/rq/0/data/queues.json", "/rq/0/view/jobs"):
        answer = visitor.get(path)
        assert answer.status_code == 302, path
        assert answer.location.startswith("/login"), path
        assert b"agents" not in answer.data
    assert visitor.get("/metrics").status_code == 401
    assert visitor.get("/healthz").status_code == 200
    assert visitor.post("/agents/z/recover", page="/login", reason="x").status_code == 401


def test_the_right_password_opens_and_logging_out_closes(world: World, app: Flask) -> None:
    world.users.add("kari", PASSWORD, role=APPROVER)
    visitor = Visitor(app)
    answer = visitor.log_in("kari", next="/backups")
    assert (answer.status_code, answer.location) == (302, "/backups")
    assert "kari" in visitor.get("/").text
    assert [line["by"] for line in world.runtime.history.read("action")] == ["kari"]
    visitor.post("/logout")
    assert visitor.get("/").status_code == 302


def test_a_wrong_name_and_a_wrong_password_are_answered_alike(world: World, app: Flask) -> None:
    world.users.add("kari", PASSWORD, role=APPROVER)
    answers = [Visitor(app).log_in("kari", "not this one"), Visitor(app).log_in("olav", PASSWORD)]
    assert [answer.status_code for answer in answers] == [401, 401]
    assert all("do not belong together" in answer.text for answer in answers)


def test_who_guesses_has_to_wait_even_with_the_right_password(world: World, app: Flask) -> None:
    world.users.add("kari", PASSWORD, role=APPROVER)
    visitor = Visitor(app)
    for _ in range(TRIES):
        assert visitor.log_in("kari", "wrong wrong").status_code == 401
    answer = visitor.log_in("kari")
    assert answer.status_code == 429
    assert 0 < int(answer.headers["Retry-After"]) <= 301
    assert (
        visitor.client.get("/metrics", headers={"Host": "localhost", **basic("kari", PASSWORD)}).status_code
        == 429
    )


def test_who_guesses_has_to_wait_whatever_address_is_given(world: World, app: Flask) -> None:
    # A proxy on this machine says where a request came from, and so can every other program on it.
    world.users.add("kari", PASSWORD, role=APPROVER)
    answers = []
    for number in range(TRIES + 1):
        visitor = Visitor(app)
        visitor.client.environ_base["REMOTE_ADDR"] = f"192.0.2.{number}"
        answers.append(visitor.log_in("kari", "wrong wrong").status_code)
    assert answers == [401] * TRIES + [429]
    world.users.add("olav", PASSWORD, role=APPROVER)
    assert Visitor(app).log_in("olav").status_code == 302, "nobody else has to wait"


def test_guesses_at_the_same_time_are_counted_before_any_is_answered(world: World, app: Flask) -> None:
    world.users.add("kari", PASSWORD, role=APPROVER)
    visitors = [Visitor(app) for _ in range(3 * TRIES)]
    for visitor in visitors:
        visitor.get("/login")
    with ThreadPoolExecutor(len(visitors)) as pool:
        answers = list(pool.map(lambda one: one.log_in("kari", "wrong wrong").status_code, visitors))
    assert sorted(answers) == [401] * TRIES + [429] * 2 * TRIES


def test_who_knows_the_password_never_has_to_wait(world: World, app: Flask) -> None:
    world.users.add("kari", PASSWORD, role=APPROVER)
    answers = [Visitor(app).log_in("kari").status_code for _ in range(TRIES + 2)]
    assert set(answers) == {302}


@pytest.mark.parametrize(
    "target", ["//evil.example/", "https://evil.example/", "/\\evil.example", "javascript:alert(1)", "/\n/x"]
)
def test_a_login_never_leads_to_another_site(world: World, app: Flask, target: str) -> None:
    world.users.add("kari", PASSWORD, role=APPROVER)
    assert Visitor(app).log_in("kari", next=target).location == "/"


def test_a_session_ends_with_its_user_and_with_its_password(world: World, app: Flask) -> None:
    world.users.add("kari", PASSWORD, role=APPROVER)
    world.users.add("olav", PASSWORD, role=APPROVER)
    kari, olav = Visitor(app), Visitor(app)
    kari.log_in("kari")
    olav.log_in("olav")
    assert kari.get("/").status_code == olav.get("/").status_code == 200
    world.users.remove("kari")
    world.users.add("olav", "another long password", replace=True)
    assert kari.get("/").status_code == olav.get("/").status_code == 302


def test_a_cookie_that_somebody_made_up_opens_nothing(world: World, app: Flask) -> None:
    world.users.add("kari", PASSWORD, role=APPROVER)
    forger = Flask("forger")
    forger.secret_key = b"x" * 32
    signer = forger.session_interface.get_signing_serializer(forger)  # type: ignore[attr-defined]
    visitor = Visitor(app)
    visitor.client.set_cookie(
        "agent_backup_session",
        signer.dumps({"user": "kari", "mark": world.users.all()["kari"].mark, "since": time.time()}),
    )
    assert visitor.get("/").status_code == 302


def test_metrics_may_be_read_with_a_name_and_password(world: World, app: Flask) -> None:
    world.users.add("prometheus", PASSWORD)
    client = app.test_client()
    for path, status in (("/metrics", 200), ("/", 302)):
        assert (
            client.get(path, headers={"Host": "localhost", **basic("prometheus", PASSWORD)}).status_code
            == status
        )
    assert (
        client.get("/metrics", headers={"Host": "localhost", **basic("prometheus", "wrong")}).status_code
        == 401
    )


# The whole of what each role may do beyond looking, written down a second time: a change of the table must be meant.
ACTS = frozenset({
    "actions.acknowledge", "actions.pause", "actions.pin", "actions.recover", "actions.resume", "actions.silence",
    "actions.unpin", "actions.unsilence", "actions.verify", "files.archive", "files.file", "incidents.acknowledge",
    "incidents.evidence", "restores.look", "restores.start", "restores.wizard", "rq_dashboard.compact_queue",
    "rq_dashboard.delete_job_view", "rq_dashboard.empty_queue", "rq_dashboard.requeue_all",
    "rq_dashboard.requeue_job_view", "messages.drop", "messages.replay", "messages.retry",
})  # fmt: skip
DECIDES = frozenset({"actions.approve", "actions.reject", "actions.statement"})


@pytest.mark.parametrize("role", ROLES)
def test_every_address_is_open_to_the_roles_of_the_table_and_to_no_other(
    world: World, app: Flask, role: str
) -> None:
    world.users.add("kari", PASSWORD, role=role)
    visitor = Visitor(app)
    visitor.log_in("kari")
    token = visitor.token()
    closed = {VIEWER: ACTS | DECIDES, OPERATOR: DECIDES, APPROVER: frozenset()}[role]
    refused = set()
    for rule in app.url_map.iter_rules():
        if rule.endpoint in ("logout", "live.events"):
            continue
        path = filled(rule.rule)
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
            answer = visitor.client.open(
                path, method=method, data={"csrf_token": token} if method == "POST" else None,
                headers=visitor.headers,
            )  # fmt: skip
            assert answer.status_code != 500, (method, path, answer.text)
            if answer.status_code == 403:
                refused.add(rule.endpoint)
                assert "This needs the role" in answer.text, path
    assert refused == closed


def test_a_role_that_is_taken_away_counts_from_the_next_click_on(world: World, app: Flask) -> None:
    world.users.add("kari", PASSWORD, role=OPERATOR)
    visitor = Visitor(app)
    visitor.log_in("kari")
    assert "Recover z" in visitor.get("/").text
    world.users.give_role("kari", VIEWER)
    page = visitor.get("/").text
    assert "Recover z" not in page
    assert "Pause recovery" not in page
    assert visitor.post("/agents/z/recover", reason="x").status_code == 403
    assert visitor.get("/").status_code == 200


def test_an_address_without_a_role_keeps_the_console_from_starting(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roles, "ACCESS", {**roles.ACCESS, "pages.forgotten": VIEWER})
    monkeypatch.setattr("backup_worker.console.app.ACCESS", roles.ACCESS)
    with pytest.raises(AgentBackupError, match=r"pages\.forgotten"):
        create_app(world.runtime)


def test_nothing_is_changed_without_the_sessions_token(app: Flask) -> None:
    visitor = Visitor(app)
    visitor.get("/")
    for token in ("", "wrong", Visitor(app).token()):
        answer = visitor.post("/agents/z/recover", token=token, reason="x")
        assert answer.status_code == 403, token
    answer = visitor.client.post(
        "/agents/z/recover", data={"csrf_token": visitor.token(), "reason": "x"},
        headers={"Host": "localhost", "Origin": "https://evil.example"},
    )  # fmt: skip
    assert answer.status_code == 403
    assert "Traceback" not in answer.text


def filled(rule: str) -> str:
    return re.sub(r"<[^>]+>", "x", re.sub(r"<int:[^>]+>", "1", rule))


def test_no_address_takes_a_post_without_the_sessions_token_or_from_another_site(
    world: World, app: Flask
) -> None:
    world.users.add("kari", PASSWORD, role=APPROVER)
    visitor = Visitor(app)
    visitor.log_in("kari")
    token = visitor.token()
    posts = [rule for rule in app.url_map.iter_rules() if "POST" in (rule.methods or ())]
    assert len(posts) >= 24
    for rule in posts:
        path = filled(rule.rule)
        for headers, form in (
            ({}, {}), ({}, {"csrf_token": "wrong"}), ({"X-CSRFToken": Visitor(app).token("/login")}, {}),
            ({"Origin": "https://evil.example"}, {"csrf_token": token}),
        ):  # fmt: skip
            answer = visitor.client.post(path, data=form, headers={**visitor.headers, **headers})
            assert answer.status_code == 403, (path, headers, form)
            assert "This needs the role" not in answer.text, path
    assert visitor.get("/").status_code == 200, "not even logged out"


def test_no_address_that_changes_something_answers_to_get(app: Flask) -> None:
    visitor = Visitor(app)
    changing = [
        rule
        for rule in app.url_map.iter_rules()
        if "POST" in (rule.methods or ()) and rule.endpoint != "login"
    ]
    assert len(changing) >= 20
    readable = {"/snapshots/x/x/x/restore"}
    for rule in changing:
        path = filled(rule.rule)
        assert visitor.get(path).status_code == (404 if path in readable else 405), path


def test_browsers_are_told_to_run_nothing_of_others_and_to_keep_nothing(world: World, app: Flask) -> None:
    world.users.add("kari", PASSWORD, role=APPROVER)
    visitor = Visitor(app)
    answer = visitor.log_in("kari")
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    over_tls = app.test_client().get("/login", headers={"Host": "localhost"}, base_url="https://localhost")
    assert "Secure" in over_tls.headers["Set-Cookie"]
    headers = visitor.get("/").headers
    policy = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"


def test_passwords_are_kept_as_scrypt_hashes_that_only_their_owner_reads(world: World, app: Flask) -> None:
    users = world.users
    users.add("kari", PASSWORD, role=APPROVER)
    users.session_secret()
    assert PASSWORD not in users.path.read_text()
    for path in (users.path, users.folder / "session.key"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert users.folder.stat().st_mode & 0o077 == 0
    assert users.check("kari", PASSWORD)
    assert not users.check("kari", PASSWORD + " ")
    assert not users.check("olav", PASSWORD)


def test_a_broken_file_of_users_opens_the_console_to_nobody(world: World, app: Flask) -> None:
    world.users.add("kari", PASSWORD, role=APPROVER)
    for content in ("", "{}", "[]", '{"users": []}', '{"users": {"kari": {}}}'):
        world.users.path.write_text(content)
        with pytest.raises(UsersError):
            world.users.names()
        answer = Visitor(app).get("/")
        assert answer.status_code == 500, content
        assert (
            "z" not in answer.text.replace("authorize", "").split("<main", 1)[-1]
            or "agent-z" not in answer.text
        )
        assert "Traceback" not in answer.text


def test_users_are_added_listed_and_removed_by_command(world: World) -> None:
    assert "open to everybody on this machine" in command(world, "user", "list").stdout
    added = command(world, "user", "add", "kari", "--password-stdin", stdin=PASSWORD + "\n")
    assert added.returncode == 0
    assert "a viewer only looks" in added.stderr
    words = ("user", "add", "olav", "--role", "operator", "--password-stdin")
    assert command(world, *words, stdin=PASSWORD + "\n").returncode == 0
    given = command(world, "user", "role", "kari", "approver", "--json")
    assert json.loads(given.stdout) == {"name": "kari", "role": "approver"}
    assert json.loads(command(world, "user", "list", "--json").stdout) == [
        {"name": "kari", "role": "approver"}, {"name": "olav", "role": "operator"},
    ]  # fmt: skip
    again = command(world, "user", "add", "kari", "--password-stdin", stdin=PASSWORD + "\n")
    assert again.returncode == 2
    assert "--replace" in again.stderr
    short = command(world, "user", "add", "siri", "--password-stdin", stdin="short\n")
    assert short.returncode == 2
    assert "fewer than" in short.stderr
    wrong = command(world, "user", "role", "kari", "king")
    assert wrong.returncode == 2
    assert "viewer, operator, approver" in wrong.stderr
    assert command(world, "user", "role", "nobody", "viewer").returncode == 4
    assert command(world, "user", "remove", "kari").returncode == 0
    assert command(world, "user", "remove", "kari").returncode == 4


@pytest.mark.parametrize("name", ["", "a b", "../x", "<b>", "é", "x" * 64])
def test_names_that_are_not_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        Users(tmp_path).add(name, PASSWORD)
    with pytest.raises(NotFound):
        Users(tmp_path).remove(name)


def test_it_refuses_to_listen_for_others_while_there_are_no_users(world: World) -> None:
    for listen in (f"0.0.0.0:{free_port()}", f"[::]:{free_port()}"):
        refused = command(world, "console", "--listen", listen)
        assert refused.returncode == 2
        assert "no users" in refused.stderr
        assert "backup-worker user add" in refused.stderr
        assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    "listen", ["8080", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:0", ":80", "127.0.0.1:99999"]
)
def test_an_address_that_is_none_is_a_usage_error(world: World, listen: str) -> None:
    from backup_worker.console.address import parse_listen

    with pytest.raises(UsageError):
        parse_listen(listen)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_and_ends_cleanly_when_told_to(world: World, number: signal.Signals) -> None:
    world.users.add("kari", PASSWORD, role=APPROVER)
    port = free_port()
    words = ("console", "--config", str(world.config_dir), "--redis-url", world.url)
    program = [sys.executable, "-m", "backup_worker", *words, "--listen", f"0.0.0.0:{port}"]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: answers(port))
        process.send_signal(number)
        out, err = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert out == ""


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
