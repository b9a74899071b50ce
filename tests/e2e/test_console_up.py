"""The console as a user gets it: `init`, `user add`, `up`, a browser; nothing here calls the project's functions."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.e2e.visitor import logged_in
from tests.integration.conftest import free_port
from tests.integration.parts import Part
from tests.small_fleet import until

PASSWORD = "correct horse battery"
AGENTS = {"em": ["em"], "z": ["agent", "z"]}


@dataclass
class House:
    """A fleet that `up` runs."""

    folder: Path
    up: Part
    port: int

    def process(self, agent: str) -> psutil.Process:
        """Return the living process of an agent."""
        found = [
            one
            for one in psutil.process_iter()
            if readable(one).get("AGENT_ROOT") == str(self.folder / "agents" / agent)
            and one.status() != psutil.STATUS_ZOMBIE
        ]
        assert len(found) == 1, found
        return found[0]


def readable(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def command(folder: Path, *words: str, given: str = "") -> None:
    env = {name: value for name, value in os.environ.items() if name not in ("REDIS_URL", "BACKUP_CONFIG")}
    subprocess.run(
        [sys.executable, "-m", "backup_worker", *words], cwd=folder, input=given, env=env, text=True, check=True,
        capture_output=True, timeout=60,
    )  # fmt: skip


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    for agent in AGENTS:
        root = folder / "agents" / agent
        root.mkdir(parents=True)
        (root / "SOUL.md").write_text(f"# {agent}\n\nBe useful.\n")
        (root / "priority_weights.json").write_text('{"urgency": 0.5}')
    command(folder, "init", "--from", str(folder / "agents"))
    file = folder / "config" / "agents.json"
    document = json.loads(file.read_text())
    for agent, words in AGENTS.items():
        document["agents"][agent] |= {
            "start": {"command": [sys.executable, "-m", "em_bridge", *words, "--heartbeat", "0.2"]},
            "heartbeat": {"dead_after": 1.5, "verify_within": 20, "stable_beats": 15},
            "recovery": {"stable_for": 1},
        }
    file.write_text(json.dumps(document))
    command(folder, "user", "add", "kari", "--role", "approver", "--password-stdin", given=PASSWORD + "\n")
    port = free_port()
    up = Part(folder, "up", "--config", str(folder / "config"), "--listen", f"127.0.0.1:{port}")
    made = House(folder, up, port)
    try:
        up.says("Ctrl-C stops", 30)
        yield made
    finally:
        up.close()
        for agent in AGENTS:
            with contextlib.suppress(AssertionError, psutil.Error):
                made.process(agent).kill()


@pytest.fixture
def page(house: House, browser: Browser) -> Iterator[Page]:
    until(lambda: listens(house.port), 20)
    with logged_in(browser, f"http://127.0.0.1:{house.port}", PASSWORD, timeout_ms=20_000) as opened:
        yield opened


def start(page: Page, agent: str) -> None:
    """Have the console start an agent, and wait until it lives."""
    page.get_by_text(f"Recover {agent} …").click()
    page.get_by_label(f"reason for recovering {agent}").fill("first start")
    page.locator(f"#agent-{agent}").get_by_role("button", name="Stop, restore, start").click()
    expect(page.locator("main .tag.recovered")).to_be_visible(timeout=30_000)
    page.get_by_role("link", name="Fleet", exact=True).click()


def test_a_death_and_its_recovery_are_seen_live_in_the_console_of_up(house: House, page: Page) -> None:
    start(page, "em")
    start(page, "z")
    card = page.locator("#agent-z")
    expect(card.locator(".tag.ALIVE")).to_be_visible(timeout=30_000)
    streams: list[str] = []
    page.on("request", lambda request: streams.append(request.url) if "/events" in request.url else None)
    page.reload()
    page.evaluate("window.untouched = true")
    first = house.process("z")
    first.send_signal(signal.SIGKILL)
    expect(card.get_by_role("link", name="Recovery is in")).to_be_visible()
    expect(card.get_by_role("link", name="Recovery is in")).not_to_be_visible(timeout=30_000)
    expect(card.locator(".tag.ALIVE")).to_be_visible()
    expect(card.locator("svg.bars title")).to_contain_text("new incarnation")
    assert streams, "no stream of events was opened"
    assert page.evaluate("window.untouched"), "the page was loaded anew"
    assert house.process("z").pid != first.pid
    page.get_by_role("link", name="Incidents").click()
    rows = page.get_by_role("row", name="z-")
    expect(rows).to_have_count(2)
    expect(rows.first).to_contain_text("recovered")


def test_after_a_restart_of_the_console_an_open_page_follows_again(house: House, page: Page) -> None:
    page.evaluate("window.untouched = true")
    consoles = [one for one in house.up.family() if "console" in one.cmdline()]
    assert len(consoles) == 1
    with page.expect_response(lambda answer: "/events" in answer.url and answer.ok, timeout=90_000):
        consoles[0].kill()
    # The page asks once when its stream opens; what is shown later was told by it.
    page.wait_for_timeout(1500)
    command(house.folder, "pause-recovery", "--reason", "told by the new stream")
    expect(page.get_by_text("told by the new stream")).to_be_visible(timeout=4_000)
    assert page.evaluate("window.untouched"), "the page was loaded anew"
    command(house.folder, "resume-recovery")
