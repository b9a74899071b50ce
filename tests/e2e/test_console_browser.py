"""The console in a real browser: a person on duty logs in, looks, decides, and is not fooled by what others wrote."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Literal

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, ConsoleMessage, Page, StorageState, expect
from rq.registry import FailedJobRegistry

from backup_worker import alerts
from backup_worker.approval import changes
from backup_worker.console.roles import APPROVER
from backup_worker.queueing import queues
from backup_worker.recovery.incident import RECOVERED, IncidentStore
from em_bridge import Publisher, streams
from tests.console_fleet import PASSWORD, World, live_through, make_world, served
from tests.e2e.visitor import log_in
from tests.integration.conftest import ValkeyServer

HOSTILE = '<img src=x onerror="document.title = 1337">'
expect.set_options(timeout=8000)
PAGES = ("/", "/backups", "/incidents", "/incidents/rick-20261102T070000-bbbb", "/changes", "/history?verify=1",
         "/alerts", "/messages?from=2020-01-01", "/weights/z", "/weights/rick", "SNAPSHOT", "SNAPSHOT/restore",
         "LETTER", "/rq/", "/rq/0/view/jobs", "/rq/0/view/workers", "/rq/0/view/job/hostile", "/nothing")  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    server = ValkeyServer(tmp_path_factory.mktemp("valkey"))
    made = make_world(tmp_path_factory.mktemp("fleet") / "w", server.url)
    live_through(made, time.time(), days=7)
    made.users.add("kari", PASSWORD, role=APPROVER)
    queues.open_queue("backup", made.runtime.redis).enqueue_call(
        "backup_worker.jobs.backup", args=({"agent": HOSTILE},), job_id="hostile", description=HOSTILE
    )
    yield made
    server.close()


@pytest.fixture(scope="module")
def address(world: World) -> Iterator[str]:
    with served(world) as url:
        yield url


@pytest.fixture(scope="module")
def session(browser: Browser, address: str) -> StorageState:
    """The cookies of a kari who has logged in."""
    context = browser.new_context(base_url=address)
    log_in(context.new_page(), PASSWORD)
    state = context.storage_state()
    context.close()
    return state


@pytest.fixture
def page(browser: Browser, address: str, session: StorageState) -> Iterator[Page]:
    """A page on which kari is logged in; anything that the browser complains about fails the test."""
    context = browser.new_context(base_url=address, storage_state=session)
    context.set_default_timeout(8000)
    opened = context.new_page()
    complaints: list[str] = []

    def complain(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            complaints.append(message.text)

    opened.on("console", complain)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.goto("/")
    yield opened
    context.close()
    assert complaints == []


def real(world: World, path: str) -> str:
    """Return the address that a name in `PAGES` stands for."""
    if path == "LETTER":
        return f"/messages/dead-letters/{streams.last_id(world.runtime.redis, streams.DEAD_LETTER)}"
    return path.replace("SNAPSHOT", f"/snapshots/{world.runtime.repository.snapshots('z', 'daily')[-2].id}")


def test_a_person_goes_through_every_page_by_its_links(page: Page) -> None:
    for name in ("Backups", "Incidents", "Changes", "Alerts", "Messages", "History", "Queues", "Fleet"):
        page.get_by_role("navigation", name="pages").get_by_role("link", name=name).click()
        expect(page.locator("nav [aria-current=page]").first).to_contain_text(name)
    page.get_by_role("navigation", name="pages").get_by_role("link", name="Backups").click()
    page.get_by_role("link", name="daily/").first.click()
    page.get_by_role("button", name="Verify now").click()
    expect(page.get_by_role("status")).to_contain_text("Every byte is as it was written")


def test_a_person_sees_a_death_and_its_recovery_live(world: World, page: Page) -> None:
    runtime, store = world.runtime, IncidentStore(world.runtime.redis)
    card = page.locator("#agent-leroy")
    expect(card).not_to_contain_text("Recovery is in")
    incident, _ = store.open("leroy", token="live", now=time.time(), reason="no heartbeat", beat_mark="0-0")
    expect(card).to_contain_text("Recovery is in “fence”")
    store.save(incident.closed(RECOVERED, time.time(), "0-0"), wake_at=None)
    expect(card).not_to_contain_text("Recovery is in")
    assert runtime.redis.ping()


def test_a_page_does_not_refresh_under_somebodys_hands(world: World, page: Page) -> None:
    page.goto("/changes")
    page.get_by_text("Reject …").click()
    field = page.get_by_label("reason for rejecting z-weights-7")
    field.fill("too st")
    world.runtime.alert("while-typing", "info", "something else happens", "meanwhile")
    page.wait_for_timeout(3500)
    expect(field).to_have_value("too st")
    world.runtime.resolve("while-typing")


def test_what_came_of_an_action_stays_in_sight_while_the_page_goes_on(world: World, page: Page) -> None:
    page.get_by_text("Recover em …").click()
    page.get_by_label("reason for recovering em").fill("stuck")
    page.locator("#agent-em").get_by_role("button", name="Stop, restore, start").click()
    said = page.locator("[data-said]")
    expect(said).to_contain_text("is open")
    store = IncidentStore(world.runtime.redis)
    incident = next(one for one in store.open_incidents() if one.agent == "em")
    store.save(incident.noted("fence", time.time(), True, "pid 1 is gone"), wake_at=time.time() + 60)
    # At once, not when the message has gone.
    expect(page.locator(".timeline")).to_contain_text("pid 1 is gone", timeout=4_000)
    expect(said).to_have_count(1)
    expect(said).to_contain_text("is open")
    store.save(store.get(incident.id).closed(RECOVERED, time.time(), "0-0"), wake_at=None)
    expect(page.locator("main .tag.recovered")).to_be_visible()


def test_a_person_approves_a_change(world: World, page: Page) -> None:
    client = world.runtime.redis
    new = json.dumps({"urgency": 0.6, "impact": 0.3, "novelty": 0.2}).encode()
    Publisher(client).config_proposed("c-browser", "jay", ["priority_weights.json"], "em", reason="more of it",
                                      proposed={"priority_weights.json": new})  # fmt: skip
    page.goto("/changes")
    card = page.locator("section", has=page.get_by_role("heading", name="c-browser"))
    expect(card.get_by_role("row", name="urgency")).to_contain_text("0.6")
    card.get_by_text("Approve …").click()
    card.get_by_label("reason for approving c-browser").fill("tested")
    card.get_by_role("button", name="Approve as kari").click()
    expect(page.get_by_role("status")).to_contain_text("Change c-browser is approved")
    change = changes.get(client, "c-browser")
    assert (change.state, change.decided_by) == (changes.APPROVED, "kari")


def test_a_person_acknowledges_an_alert(world: World, page: Page) -> None:
    world.runtime.alert(
        "escalation/em", "critical", "em could not be recovered", "nothing helped", agent="em"
    )
    page.goto("/alerts")
    page.get_by_role("button", name="acknowledge: em could not be recovered").click()
    expect(page.get_by_text("seen by kari")).to_be_visible()
    found = {one.key: one for one in alerts.open_alerts(world.runtime.redis)}
    assert found["escalation/em"].acknowledged_by == "kari"


def test_what_others_wrote_into_a_job_is_text_on_every_page_of_the_rq_dashboard(page: Page) -> None:
    for path in ("/rq/0/view/jobs/backup/queued/8/asc/1", "/rq/0/view/job/hostile"):
        page.goto(path)
        expect(page.get_by_text(HOSTILE).first).to_be_visible()
        assert page.locator("img[src=x]").count() == 0
        assert page.title() != "1337"


def test_what_others_wrote_into_queues_workers_and_failures_is_text_there_too(
    world: World, page: Page
) -> None:
    client = world.runtime.redis
    client.sadd("rq:queues", f"rq:queue:{HOSTILE}")
    client.sadd("rq:workers", f"rq:worker:{HOSTILE}")
    for field, value in (
        ("queues", HOSTILE),
        ("state", "busy"),
        ("current_job", "hostile"),
        ("version", HOSTILE),
    ):
        client.hset(f"rq:worker:{HOSTILE}", field, value)
    job = queues.open_queue("maintenance", client).enqueue_call(
        "backup_worker.jobs.maintenance", args=({"task": HOSTILE},), job_id="failure", description=HOSTILE
    )
    client.lrem("rq:queue:maintenance", 0, "failure")
    FailedJobRegistry("maintenance", connection=client).add(job, 600, exc_string=HOSTILE)
    client.hset("rq:job:failure", "status", "failed")
    try:
        for path in ("/rq/", "/rq/0/view/workers", "/rq/0/view/jobs/maintenance/failed/8/asc/1",
                     "/rq/0/view/job/failure", "/rq/0/view/jobs"):  # fmt: skip
            page.goto(path)
            expect(page.locator(".rq")).to_contain_text("img src=x" if path != "/rq/0/view/jobs" else "Queue")
            page.wait_for_timeout(200)
            assert page.locator("img[src=x]").count() == 0, path
            assert page.title() != "1337", path
    finally:
        client.srem("rq:queues", f"rq:queue:{HOSTILE}")
        client.srem("rq:workers", f"rq:worker:{HOSTILE}")
        client.delete("rq:failed:maintenance", "rq:job:failure")


def test_a_job_is_deleted_on_the_rq_dashboard_after_a_question(world: World, page: Page) -> None:
    queue = queues.open_queue("maintenance", world.runtime.redis)
    queue.enqueue_call("backup_worker.jobs.maintenance", args=({"task": "watch"},), job_id="doomed")
    page.goto("/rq/")
    page.get_by_role("row", name="maintenance").get_by_role("link", name="1").click()
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("heading", name="Do you really want to delete job?")).to_be_visible()
    page.get_by_role("button", name="Yes").click()
    expect(page.locator("tr[data-job-id=doomed]")).to_have_count(0)
    assert queue.count == 0
    done = [line for line in world.runtime.history.read("action") if line["action"] == "rq-delete-job"]
    assert [(line["by"], line["job_id"]) for line in done] == [("kari", "doomed")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_to_complain_of_on_any_page(
    browser: Browser, address: str, session: StorageState, world: World, scheme: Literal["light", "dark"]
) -> None:
    context = browser.new_context(
        base_url=address, storage_state=session, color_scheme=scheme, reduced_motion="reduce"
    )
    page = context.new_page()
    for path in PAGES:
        page.goto(real(world, path))
        found = Axe().run(page).response["violations"]
        assert [(one["id"], one["impact"], one["nodes"][0]["html"][:200]) for one in found] == [], path
    context.close()
    if scheme == "light":
        context = browser.new_context(base_url=address)
        page = context.new_page()
        page.goto("/login")
        assert Axe().run(page).response["violations"] == []
        context.close()


def test_every_page_fits_a_phone_and_follows_the_scheme(
    browser: Browser, address: str, session: StorageState, world: World
) -> None:
    schemes: tuple[tuple[Literal["light", "dark"], tuple[str, ...]], ...] = (
        ("light", PAGES),
        ("dark", PAGES[:1]),
    )
    for scheme, pages in schemes:
        context = browser.new_context(
            base_url=address,
            storage_state=session,
            color_scheme=scheme,
            viewport={"width": 390, "height": 844},
        )
        page = context.new_page()
        grounds = set()
        for path in pages:
            page.goto(real(world, path))
            wider = page.evaluate(
                "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
            assert wider <= 0, path
            grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert grounds == ({"rgb(244, 246, 248)"} if scheme == "light" else {"rgb(14, 18, 23)"})
        context.close()


READ = {
    "/": "beats in", "/?agent=jay": "jay", "/backups": "All snapshots", "/incidents": "In this order",
    "/incidents/rick-20261102T070000-bbbb": "weekly is damaged", "/changes": "too many urgent tasks were late",
    "/history?verify=1": "The chain holds", "/history?kind=alert": "daily backup of leroy is missing",
    "/alerts": "daily backup of leroy is missing", "/messages?from=2020-01-01": "would be delivered again",
    "/weights/z": "urgency", "SNAPSHOT": "memory/facts.md", "SNAPSHOT/restore": "This is the dry run",
    "LETTER": "unknown type",
}  # fmt: skip
"""Page -> what a person without scripts reads there."""


def test_every_page_can_be_read_without_scripts(browser: Browser, address: str, world: World) -> None:
    context = browser.new_context(base_url=address, java_script_enabled=False)
    page = context.new_page()
    log_in(page, PASSWORD)
    expect(page.locator("#agent-z")).to_contain_text("alive")
    page.goto("/backups")
    page.get_by_label("status").select_option("suspect")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("table.list").last.get_by_role("row")).to_have_count(2)
    for path, word in READ.items():
        answer = page.goto(real(world, path))
        assert answer is not None
        assert answer.status == 200, path
        expect(page.locator("main")).to_contain_text(word)
        expect(page.locator("main")).not_to_contain_text("undefined")
    page.goto("/rq/")
    # A browser whose scripts are switched off by the driver still leaves <noscript> out of what it shows.
    assert "needs JavaScript" in page.content()
    context.close()


def test_while_the_console_cannot_be_reached_the_page_says_that_it_is_old(
    browser: Browser, address: str
) -> None:
    context = browser.new_context(base_url=address)
    page = context.new_page()
    log_in(page, PASSWORD)
    expect(page.locator("#stale")).not_to_be_visible()
    context.set_offline(True)
    expect(page.locator("#stale")).to_be_visible(timeout=15_000)
    context.set_offline(False)
    expect(page.locator("#stale")).not_to_be_visible(timeout=15_000)
    context.close()
