"""A person's shift at the console, on a fleet of real processes: a death, a change, a lost file, an escalation."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from backup_worker import alerts
from backup_worker.approval import changes
from backup_worker.console.roles import APPROVER
from backup_worker.console.users import Users
from backup_worker.recovery.incident import ESCALATED, RECOVERED
from em_bridge import Publisher
from tests.console_fleet import PASSWORD, World, served
from tests.e2e.visitor import logged_in
from tests.integration.conftest import ValkeyServer
from tests.living_fleet import Fleet, wait_for

expect.set_options(timeout=10_000)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    server = ValkeyServer(tmp_path_factory.mktemp("valkey"))
    made = Fleet(tmp_path_factory.mktemp("fleet") / "f", server.url)
    weights = {"weights": ["priority_weights.json"]}
    for name in ("z", "rick", "leroy"):
        made.add(name, files=weights)
        (made.root(name) / "priority_weights.json").write_text(json.dumps({"urgency": 0.5, "impact": 0.5}))
        made.backup(name)
    yield made
    made.close()
    server.close()


@pytest.fixture(scope="module")
def address(fleet: Fleet) -> Iterator[str]:
    Users(fleet.state / "console").add("kari", PASSWORD, role=APPROVER)
    with served(World(fleet.folder, fleet.url)) as url:
        yield url


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with logged_in(browser, address, PASSWORD) as opened:
        yield opened


def test_a_death_and_its_recovery_are_seen_live(fleet: Fleet, page: Page) -> None:
    fleet.start("z")
    card = page.locator("#agent-z")
    fleet.kill("z")
    fleet.wipe("z")
    opened = fleet.service.on_state("z", "DEAD", "no heartbeat for 1 s", time.time())
    assert opened is not None
    expect(card.get_by_role("link", name="Recovery is in")).to_be_visible()
    card.get_by_role("link", name="Recovery is in").click()
    expect(page.get_by_role("heading", name="Recovery of z")).to_be_visible()
    worker = threading.Thread(target=fleet.drive, args=(opened,))
    worker.start()
    # Nobody touches the page: it follows by itself.
    expect(page.locator("main .tag.recovered")).to_be_visible(timeout=30_000)
    for step in ("fence", "select", "restore", "start", "prove"):
        expect(page.locator(".timeline")).to_contain_text(step)
    expect(page.locator("pre.log")).to_contain_text("mode beat")
    worker.join(30)
    assert fleet.service.store.get(opened).state == RECOVERED
    assert (fleet.root("z") / "SOUL.md").read_text() == "I am z.\n"
    page.get_by_role("link", name="Fleet", exact=True).click()
    expect(card.get_by_role("link", name="Recovery is in")).not_to_be_visible()
    expect(card.locator("svg.bars title")).to_contain_text("new incarnation")


def test_a_change_arrives_while_the_inbox_is_open_and_is_approved(fleet: Fleet, page: Page) -> None:
    page.goto("/changes")
    expect(page.get_by_text("Nothing waits for a decision")).to_be_visible()
    new = json.dumps({"urgency": 0.7, "impact": 0.3}).encode()
    proposed = {"priority_weights.json": new}
    Publisher(fleet.client).config_proposed(
        "c-live", "leroy", list(proposed), "em", reason="late too often", proposed=proposed
    )
    card = page.locator("section", has=page.get_by_role("heading", name="c-live"))
    expect(card.get_by_role("row", name="urgency")).to_contain_text("+0.2")
    expect(card).to_contain_text("bound to these bytes")
    card.get_by_text("Approve …").click()
    card.get_by_role("button", name="Approve as kari").click()
    expect(page.get_by_role("status")).to_contain_text("Change c-live is approved")
    assert changes.get(fleet.client, "c-live").decided_by == "kari"


def test_one_lost_file_comes_back_and_another_is_downloaded(fleet: Fleet, page: Page, tmp_path: Path) -> None:
    (fleet.root("leroy") / "SOUL.md").write_text("poisoned")
    (fleet.root("leroy") / "memory" / "notes.md").write_text("newer, and kept")
    newest = fleet.runtime.repository.snapshots("leroy")[-1].id
    page.goto(f"/snapshots/{newest}")
    page.get_by_role("link", name="restore SOUL.md").click()
    expect(page.get_by_role("heading", name="1 would be as in the snapshot again")).to_be_visible()
    expect(page.get_by_text("would be lost but for the evidence")).to_be_visible()
    button = page.get_by_role("button", name="Restore leroy")
    page.get_by_label("Why", exact=True).fill("poisoned")
    page.get_by_label("Type the agent's name").fill("z")
    button.click()
    assert (fleet.root("leroy") / "SOUL.md").read_text() == "poisoned", "the name was wrong"
    page.get_by_label("Type the agent's name").fill("leroy")
    button.click()
    expect(page.get_by_role("status")).to_contain_text("leroy is restored")
    assert (fleet.root("leroy") / "SOUL.md").read_text() == "I am leroy.\n"
    assert (fleet.root("leroy") / "memory" / "notes.md").read_text() == "newer, and kept"
    with page.expect_download() as started:
        page.get_by_role("link", name="download memory/notes.md").click()
    started.value.save_as(tmp_path / "notes.md")
    assert "remember the milk" in (tmp_path / "notes.md").read_text()
    with page.expect_download() as started:
        page.get_by_role("link", name="Download as tar").click()
    assert started.value.suggested_filename == newest.replace("/", "-") + ".tar"
    assert started.value.failure() is None


def test_an_escalation_reaches_the_person_who_takes_it(fleet: Fleet, page: Page) -> None:
    fleet.set_mode("rick", "die")
    fleet.backup("rick")
    for snapshot in fleet.runtime.repository.snapshots("rick")[:-1]:
        fleet.runtime.repository.delete(snapshot.id)
    incident = fleet.recover("rick")
    assert incident.state == ESCALATED
    wait_for(lambda: "escalation/rick" in fleet.alerts(), "the page")
    page.get_by_role("navigation", name="pages").get_by_role("link", name="Incidents").click()
    page.get_by_role("link", name=incident.id).click()
    log = page.locator("pre.log")
    expect(log).to_contain_text("this state kills me")
    with (fleet.state / "logs" / "rick.log").open("a") as file:
        file.write("".join(f"line {number}\n" for number in range(1, 50)) + "and this just now\n")
    # The log is live, and its newest line is in sight.
    expect(log).to_contain_text("and this just now")
    in_sight = log.evaluate(
        """found => { const end = document.createRange();
                      const text = found.firstChild.firstChild; end.setStart(text, text.length - 1);
                      end.setEnd(text, text.length);
                      return [found.scrollHeight > found.clientHeight,
                              end.getBoundingClientRect().bottom <= found.getBoundingClientRect().bottom]; }"""
    )
    assert in_sight == [True, True]
    with page.expect_download() as started:
        page.get_by_role("link", name="Download the evidence").click()
    assert started.value.failure() is None
    page.get_by_role("button", name="Acknowledge").click()
    expect(page.get_by_role("status")).to_contain_text("rick is yours now")
    page.get_by_role("navigation", name="pages").get_by_role("link", name="Alerts").click()
    expect(page.get_by_text("seen by kari").first).to_be_visible()
    found = {one.key: one.acknowledged_by for one in alerts.open_alerts(fleet.client)}
    assert found["escalation/rick"] == "kari"
    done = [line["action"] for line in fleet.runtime.history.read("action")]
    assert {"download", "acknowledge"} <= set(done)


class Keyboard:
    """A person without a mouse: gets to things by Tab alone, and reads which one has the focus."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def to(self, target: Locator) -> None:
        """Press Tab until `target` has the focus, which has to be seen."""
        for _ in range(150):
            self.page.keyboard.press("Tab")
            if target.count() == 1 and target.evaluate("found => found === document.activeElement"):
                outline = target.evaluate("found => getComputedStyle(found).outlineStyle")
                assert outline != "none", "the focus is not to be seen"
                return
        raise AssertionError(f"no Tab leads to {target}")

    def press(self, target: Locator) -> None:
        """Get to `target`, and press Enter."""
        self.to(target)
        self.page.keyboard.press("Enter")

    def write(self, target: Locator, text: str) -> None:
        """Get to `target`, and write into it."""
        self.to(target)
        self.page.keyboard.type(text)


def test_a_shift_is_done_with_the_keyboard_alone(fleet: Fleet, browser: Browser, address: str) -> None:
    context = browser.new_context(base_url=address)
    context.set_default_timeout(10_000)
    page = context.new_page()
    keys = Keyboard(page)
    page.goto("/")
    expect(page.get_by_label("Name")).to_be_focused()
    page.keyboard.type("kari")
    keys.write(page.get_by_label("Password"), PASSWORD)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Fleet")).to_be_visible()
    pages = page.get_by_role("navigation", name="pages")

    # Approve a change.
    proposed = {"priority_weights.json": json.dumps({"urgency": 0.9, "impact": 0.1}).encode()}
    Publisher(fleet.client).config_proposed("c-keys", "leroy", list(proposed), "em", proposed=proposed)
    keys.press(pages.get_by_role("link", name="Changes"))
    card = page.locator("section", has=page.get_by_role("heading", name="c-keys"))
    keys.press(card.locator("summary", has_text="Approve"))
    keys.write(card.get_by_label("reason for approving c-keys"), "without a mouse")
    keys.press(card.get_by_role("button", name="Approve as kari"))
    expect(page.get_by_role("status")).to_contain_text("Change c-keys is approved")
    assert changes.get(fleet.client, "c-keys").decided_by == "kari"

    # Restore one file.
    (fleet.root("leroy") / "SOUL.md").write_text("poisoned again")
    page.goto(f"/snapshots/{fleet.runtime.repository.snapshots('leroy')[-1].id}")
    keys.press(page.get_by_role("link", name="restore SOUL.md"))
    keys.write(page.get_by_label("Why", exact=True), "poisoned")
    keys.write(page.get_by_label("Type the agent's name"), "leroy")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("leroy is restored")
    assert (fleet.root("leroy") / "SOUL.md").read_text() == "I am leroy.\n"

    # Take an escalation.
    fleet.runtime.alert("escalation/leroy", "critical", "leroy could not be recovered", "x", agent="leroy")
    keys.press(pages.get_by_role("link", name="Alerts"))
    keys.press(page.get_by_role("button", name="acknowledge: leroy could not be recovered"))
    expect(page.get_by_role("status")).to_contain_text("Acknowledged")
    seen = {one.key: one.acknowledged_by for one in alerts.open_alerts(fleet.client)}
    assert seen["escalation/leroy"] == "kari"
    context.close()


def test_recovery_is_paused_and_resumed_with_the_keyboard_alone(fleet: Fleet, page: Page) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.get_by_text("Pause recovery").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.type("moving the disks")
    page.keyboard.press("Enter")
    halt = page.get_by_role("region", name="recovery is paused")
    expect(halt).to_contain_text("by kari")
    expect(halt).to_contain_text("moving the disks")
    halt.get_by_role("button", name="Resume recovery").focus()
    page.keyboard.press("Enter")
    expect(halt).not_to_be_visible()
