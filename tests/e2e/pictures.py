"""`python -m tests.e2e.pictures`: make the pictures in docs/images anew, from a fleet that the engine has made."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from playwright.sync_api import Browser, sync_playwright

from backup_worker import backups
from backup_worker.console.roles import APPROVER
from backup_worker.proofs import Note, write_note
from backup_worker.recovery.incident import DEPEND, FENCE, RESTORE, SELECT, IncidentStore
from backup_worker.runtime import Runtime
from em_bridge import events, streams
from tests.console_fleet import PASSWORD, World, live_through, make_world, served
from tests.integration.conftest import ValkeyServer

IMAGES = Path(__file__).parents[2] / "docs" / "images"
LARGEST = 200_000
DAY = 86400.0


@dataclass(frozen=True)
class Picture:
    """A page to be taken: its address, how wide the window is, and in which scheme."""

    name: str
    path: str
    scheme: Literal["light", "dark"] = "light"
    width: int = 1280
    height: int = 900


def main() -> None:
    """Make all pictures."""
    folder = Path(tempfile.mkdtemp(prefix="pictures-"))
    (folder / "valkey").mkdir()
    server = ValkeyServer(folder / "valkey")
    IMAGES.mkdir(exist_ok=True)
    try:
        world = make_world(folder / "fleet", server.url)
        live_through(world, time.time(), days=12)
        world.users.add("kari", PASSWORD, role=APPROVER)
        change_weights(world)
        incident = make_lively(world)
        oldest = world.runtime.repository.snapshots("z", "weekly")[0].id
        pictures = (
            Picture("fleet-light", "/"),
            Picture("fleet-dark", "/", "dark"),
            Picture("phone", "/", width=390, height=844),
            Picture("weights", "/weights/z", height=760),
            Picture("changes", "/changes", height=760),
            Picture("incident", f"/incidents/{incident}", "dark", height=820),
            Picture("restore", f"/snapshots/{oldest}/restore", height=640),
        )
        with served(world) as url, sync_playwright() as playwright:
            chromium = shutil.which("chromium") or shutil.which("google-chrome")
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for picture in pictures:
                take(browser, url, picture)
            browser.close()
    finally:
        server.close()
        shutil.rmtree(folder, ignore_errors=True)


def take(browser: Browser, url: str, picture: Picture) -> None:
    """Log in and take one picture."""
    size: Any = {"width": picture.width, "height": picture.height}
    context = browser.new_context(base_url=url, color_scheme=picture.scheme, viewport=size)
    page = context.new_page()
    page.goto("/login")
    page.get_by_label("Name").fill("kari")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    page.goto(picture.path)
    # The drift is looked for behind the page's back, and shown by the next refresh.
    page.wait_for_timeout(2500)
    target = IMAGES / f"{picture.name}.png"
    page.screenshot(path=target)
    context.close()
    assert target.stat().st_size < LARGEST, f"{target.name} is larger than {LARGEST} bytes"
    print(f"{target.name}: {target.stat().st_size / 1000:.0f} kB")


def change_weights(world: World) -> None:
    """Give z some approved changes of its weights, and one that nobody approved."""
    runtime, now = world.runtime, time.time()
    steps = (
        (9, 0.52, 0.34, "late replies hurt", "kari"), (6, 0.61, 0.34, "more urgent ones", "kari"),
        (4, 0.61, 0.22, "impact was overrated", "olav"), (1, 0.74, 0.22, "", None),
    )  # fmt: skip
    tier = runtime.config.tier("on-change")
    for number, (age, urgency, impact, why, who) in enumerate(steps, 1):
        weights = {"urgency": urgency, "impact": impact, "novelty": 0.2, "patience": 0.08 * number}
        world.weights("z").write_text(json.dumps(weights, indent=2))
        backups.make(
            runtime, "z", "on-change", tier, f"2026-11-{12 + number:02d}-101500", now - age * DAY + 3600,
            reason=f"config.applied c{number}" + (f": {why}" if why else ""), on_taken="next",
            approved=who is not None, approved_by=who,
        )  # fmt: skip


def make_lively(world: World) -> str:
    """Let the agents beat, prove restores, change files, and bring leroy half way back; return that incident's id."""
    runtime, now = world.runtime, time.time()
    beat(runtime, now)
    for age, name in enumerate(runtime.config.agents, 1):
        proof = Note(now - age * DAY, True, now - age * DAY, "weekly")
        write_note(runtime.repository, name, proof)
    (world.root("jay") / "memory" / "facts.md").write_text("the sky is green\n")
    (world.root("jay") / "memory" / "people.md").write_text("kari likes tea\n")
    store = IncidentStore(runtime.redis)
    incident, _ = store.open(
        "leroy", token="20261123T090000-c3d4", now=now - 14, reason="no heartbeat for 60 s", beat_mark="0-0"
    )
    done = ((FENCE, "pid 5120 and 2 children are gone"), (SELECT, "daily and weekly of today are proven"),
            (RESTORE, "7 files, 1.4 KiB; what stood there is kept"))  # fmt: skip
    for offset, (step, detail) in enumerate(done):
        incident = incident.noted(step, now - 13 + offset, True, detail)
    for phase in (SELECT, RESTORE, DEPEND):
        incident = incident.entering(phase)
    newest = runtime.repository.snapshots("leroy", "weekly")[-1].id
    store.save(replace(incident, attempts=1, chosen=(newest,)), wake_at=now + 300)
    return incident.id


def beat(runtime: Runtime, now: float) -> None:
    """Write five minutes of heartbeats, some with a gap, one with a new incarnation."""
    rows = []
    for name in runtime.config.agents:
        for number in range(84):
            at = now - 420 + 5 * number
            silent = (name == "rick" and number > 66) or (name == "jay" and 40 < number < 48)
            if not silent:
                incarnation = "second" if name == "leroy" and number > 55 else "first"
                rows.append((at, events.encode(events.Heartbeat(name, incarnation, number + 1))))
    add: Any = runtime.redis.execute_command
    for at, fields in sorted(rows, key=lambda row: row[0]):
        add(
            "XADD",
            streams.HEARTBEATS,
            f"{int(at * 1000)}-*",
            *[part for pair in fields.items() for part in pair],
        )


if __name__ == "__main__":
    main()
