"""The demo: a fleet lives through backups, a change, deaths, an EM crash, a replay and an escalation.

Nothing is simulated: the parts are the processes of `backup-worker up`, the agents are processes, kills are SIGKILL,
and every claim is checked before it is printed. Whatever happens, no process is left behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backup_worker.demo.fleet import AGENTS, DEPENDS_ON, Fleet
from backup_worker.demo.pager import Pager
from backup_worker.demo.show import Show, Step, wait_for
from backup_worker.demo.steps import Demo
from backup_worker.embedded import url_file
from backup_worker.recovery import processes
from backup_worker.runtime import Runtime
from em_bridge import connection
from em_bridge.errors import AgentBackupError, RedisUnavailable


def run(folder: Path, show: Show) -> bool:
    """Run every step in `folder` (empty) and return whether all of it worked."""
    fleet = Fleet(folder)
    with contextlib.suppress(AgentBackupError), Pager() as pager, _living(fleet, show, pager) as demo:
        demo.first_backups()
        demo.approved_change()
        demo.wiped_and_killed()
        demo.all_killed()
        demo.em_killed()
        demo.no_state_to_trust()
        demo.totals()
        return True
    return False


@contextlib.contextmanager
def _living(fleet: Fleet, show: Show, pager: Pager) -> Iterator[Demo]:
    """Start the fleet and every part; end them all, whatever happens."""
    up: subprocess.Popen[bytes] | None = None
    log = (fleet.folder / "up.log").open("wb")
    try:
        with show.step("a fleet of an EM and four agents, and the parts of Agent Backup") as step:
            fleet.make(pager.url)
            up = subprocess.Popen(
                [sys.executable, "-m", "backup_worker", "up", "--no-console", "--config", fleet.config_dir],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Its own group: Ctrl-C reaches the demo, which then ends the parts in their order.
                start_new_session=True,
                env={name: value for name, value in os.environ.items() if name != "REDIS_URL"},
            )
            demo = _connect(fleet, show, pager, step)
        yield demo
    finally:
        _end(fleet, up)
        log.close()


def _end(fleet: Fleet, up: subprocess.Popen[bytes] | None) -> None:
    # A second Ctrl-C must not leave processes behind.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        # The parts first: they would bring the agents back.
        if up is not None and up.poll() is None:
            up.terminate()
            try:
                up.wait(40)
            except subprocess.TimeoutExpired:
                up.kill()
                up.wait()
        if fleet.config_dir.exists():
            for agent in DEPENDS_ON:
                processes.fence(fleet.process(agent), term_grace_s=1.0)
    finally:
        signal.signal(signal.SIGINT, before)


def _connect(fleet: Fleet, show: Show, pager: Pager, step: Step) -> Demo:
    state = fleet.config.schedule.state
    wait_for("the embedded Valkey", 20, lambda: url_file(state).exists())
    url = url_file(state).read_text().strip()
    client = connection.connect(url)
    wait_for("the embedded Valkey to answer", 20, lambda: _answers(client))
    fleet.start(["em", *AGENTS], url)
    demo = Demo(fleet, show, pager, Runtime(fleet.config, client, url))
    wait_for("all agents to be ALIVE", 30, lambda: all(demo.state_of(agent) == "ALIVE" for agent in AGENTS))
    show.say(f"in {fleet.folder}: agents {', '.join(DEPENDS_ON)}, each a process; Valkey {_version(client)}")
    step.facts = {"agents": list(DEPENDS_ON), "folder": str(fleet.folder)}
    return demo


def _answers(client: Any) -> bool:
    with contextlib.suppress(RedisUnavailable), connection.translate_errors(client):
        return bool(client.ping())
    return False


def _version(client: Any) -> str:
    info = client.info("server")
    return str(info.get("valkey_version") or info.get("redis_version"))
