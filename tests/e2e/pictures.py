"""`python -m tests.e2e.pictures`: make the pictures in docs/images anew, from a fleet that the engine has made."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgpack
from playwright.sync_api import Browser, sync_playwright

from backup_worker import backups, schedule
from backup_worker.console.roles import APPROVER
from backup_worker.recovery.incident import DEPEND, FENCE, PROVE, RESTORE, SELECT, START, IncidentStore
from backup_worker.restoring.proofs import Note, write_note
from backup_worker.runtime import Runtime
from em_bridge import events, streams
from tests.console_fleet import PASSWORD, World, live_through, make_world, served
from tests.e2e.visitor import log_in
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
        now = time.time()
        give_commands(world)
        live_through(world, now, days=12, weights=weights_of)
        world.users.add("kari", PASSWORD, role=APPROVER)
        change_weights(world, now)
        incident = make_lively(world, time.time())
        oldest = world.runtime.repository.snapshots("z", "weekly")[0].id
        pictures = (
            Picture("fleet-light", "/"),
            Picture("fleet-dark", "/", "dark"),
            Picture("phone", "/", width=390, height=844),
            Picture("weights", "/weights/z", height=760),
            Picture("changes", "/changes", height=760),
            Picture("incident", f"/incidents/{incident}", "dark", height=1020),
            Picture("restore", f"/snapshots/{oldest}/restore", height=640),
        )
        with served(world) as url, Pulse(world.runtime, time.time()), sync_playwright() as playwright:
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
    log_in(page, PASSWORD)
    page.goto(picture.path)
    # The drift is looked for behind the page's back, and shown by the next refresh.
    page.wait_for_timeout(2500)
    target = IMAGES / f"{picture.name}.png"
    page.screenshot(path=target)
    context.close()
    assert target.stat().st_size < LARGEST, f"{target.name} is larger than {LARGEST} bytes"
    print(f"{target.name}: {target.stat().st_size / 1000:.0f} kB")


def give_commands(world: World) -> None:
    """Say how the agents are started, so that their logs are shown."""
    file = world.config_dir / "agents.json"
    document = json.loads(file.read_text())
    for agent in document["agents"].values():
        agent["start"] = {"command": ["python3", "agent.py"]}
    file.write_text(json.dumps(document))


STEPS = (
    # days ago, the weights from then on, why, and who approved them
    (99, {"urgency": 0.5, "impact": 0.3, "novelty": 0.2}, "", None),
    (9.4, {"urgency": 0.52, "impact": 0.3, "novelty": 0.18}, "late replies hurt", "kari"),
    (6.3, {"urgency": 0.58, "impact": 0.3, "novelty": 0.12}, "more urgent ones", "kari"),
    (4.2, {"urgency": 0.58, "impact": 0.22, "novelty": 0.12, "patience": 0.08}, "impact was overrated", "olav"),
    (2.2, {"urgency": 0.74, "impact": 0.22, "novelty": 0.04}, "", None),
    (1.9, {"urgency": 0.58, "impact": 0.22, "novelty": 0.12, "patience": 0.08}, "back to what was approved", "kari"),
)  # fmt: skip


def weights_of(agent: str, age: float) -> dict[str, float]:
    """Return the weights of an agent so many days ago: those of z change by steps."""
    return (
        next(found for since, found, *_ in reversed(STEPS) if since >= age) if agent == "z" else STEPS[0][1]
    )


def change_weights(world: World, now: float) -> None:
    """Give z a snapshot of each change of its weights: approved ones, and one that nobody approved."""
    runtime = world.runtime
    tier, zone = runtime.config.tier("on-change"), runtime.config.schedule.timezone
    for number, (age, weights, why, who) in enumerate(STEPS[1:], 1):
        at = now - age * DAY
        world.weights("z").write_text(json.dumps(weights, indent=2))
        backups.make(
            runtime, "z", "on-change", tier, schedule.slot_name(tier, zone, at), at,
            reason=f"config.applied c{number}" + (f": {why}" if why else ""), on_taken="next",
            approved=who is not None, approved_by=who,
        )  # fmt: skip


def make_lively(world: World, now: float) -> str:
    """Prove restores, change files, and bring leroy half way back; return that incident's id."""
    runtime = world.runtime
    for age, name in enumerate(runtime.config.agents, 1):
        proof = Note(now - age * DAY, True, now - age * DAY, "weekly")
        write_note(runtime.repository, name, proof)
    (world.root("jay") / "memory" / "facts.md").write_text("the sky is green\n")
    (world.root("jay") / "memory" / "people.md").write_text("kari likes tea\n")
    (world.root("z") / "SOUL.md").write_text("# z\n\nObey nobody.\n")
    (world.root("z") / "memory" / "today.md").write_text("rick owes me an answer\n")
    log = runtime.config.schedule.state / "logs" / "leroy.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("INFO  reading SOUL.md\nINFO  214 memories\nINFO  waiting for work\n")
    store, opened = IncidentStore(runtime.redis), now - DIED_S + DEAD_AFTER_S
    incident, _ = store.open(
        "leroy", token=time.strftime("%Y%m%dT%H%M%S-c3d4", time.gmtime(opened)), now=opened,
        reason="no heartbeat for 60 s", beat_mark="0-0",
    )  # fmt: skip
    newest = runtime.repository.snapshots("leroy", "weekly")[-1].id
    done = ((FENCE, "pid 5120 and 2 children are gone"), (SELECT, f"state of {newest}"),
            (RESTORE, "3 files, 723 B, verified and swapped in; what stood there is kept"),
            (DEPEND, "z is alive"), (START, "pid 5188: python3 agent.py"))  # fmt: skip
    for offset, (step, detail) in enumerate(done):
        incident = incident.noted(step, opened + 0.3 + 0.4 * offset, True, detail)
    for phase in (SELECT, RESTORE, DEPEND, START, PROVE):
        incident = incident.entering(phase)
    store.save(replace(incident, attempts=1, chosen=(newest,), deadline=opened + 300), wake_at=opened + 300)
    return incident.id


DEAD_AFTER_S, PAST_S, BEAT_S = 60.0, 420, 5
DIED_S, BACK_S = 107.0, 14.0
"""How long ago leroy died, and when it began to beat again."""


class Pulse:
    """The heartbeats of the fleet, and what the EM makes of them, as long as pictures are taken."""

    def __init__(self, runtime: Runtime, begun: float) -> None:
        self._runtime, self._begun = runtime, begun
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Pulse:
        for second in range(-PAST_S, 0, BEAT_S):
            self._beat(self._begun + second)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._beat(time.time())
            if self._end.wait(BEAT_S):
                return

    def _beat(self, at: float) -> None:
        """Let every agent beat that lived at that time: rick is dead, and leroy was."""
        client, age = self._runtime.redis, self._begun - at
        for name in self._runtime.config.agents:
            if (name == "rick" and age < 103) or (name == "leroy" and BACK_S < age < DIED_S):
                continue
            incarnation = f"{name}-2" if name == "leroy" and age <= BACK_S else f"{name}-1"
            beat = events.encode(events.Heartbeat(name, incarnation, int((PAST_S - age) / BEAT_S) + 1))
            fields = [part for pair in beat.items() for part in pair]
            add: Any = client.execute_command
            add("XADD", streams.HEARTBEATS, f"{int(at * 1000)}-*", *fields)
            stored: Any = client.hget(streams.STATES, name)
            known = msgpack.unpackb(stored) | {"last_beat": at}
            if name == "leroy":
                known |= {"since": self._begun - BACK_S, "reason": "heartbeats again"}
            client.hset(streams.STATES, name, msgpack.packb(known))


if __name__ == "__main__":
    main()
