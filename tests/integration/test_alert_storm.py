"""A storm for real: fifty agents die at once, with the parts as processes, a real server and a real receiver."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from backup_worker import alerts, backups
from em_bridge import Publisher
from tests.integration.conftest import ValkeyServer
from tests.integration.parts import Part
from tests.receivers import WebHook
from tests.small_fleet import SmallFleet, until

pytestmark = [pytest.mark.valkey, pytest.mark.timeout(300)]

AGENTS = tuple(f"a{number:02}" for number in range(50))


def test_fifty_deaths_at_once_are_a_page_not_fifty_and_a_receiver_that_hangs_holds_up_no_recovery(
    tmp_path: Path, valkey: ValkeyServer
) -> None:
    fleet = SmallFleet(tmp_path, AGENTS, limits={"reserve_bytes": 0, "fleet_recoveries": 1000})
    client = valkey.client()
    runtime = fleet.runtime(client)
    for agent in AGENTS:
        backups.by_hand(runtime, agent, "daily", now=time.time())
    with WebHook() as hook, WebHook() as stuck:
        stuck.mode = "hang"
        fleet.edit(
            "backup_schedule.json",
            lambda document: document.update(alerts=[hook.url, stuck.url], paging={"group_seconds": 2}),
        )
        env = {"REDIS_URL": valkey.url, "BACKUP_CONFIG": str(fleet.config_dir)}
        parts = [Part(tmp_path, name, env=env) for name in ("dispatcher", "worker", "scheduler")]
        try:
            with Publisher(valkey.url) as em:
                for agent in AGENTS:
                    em.agent_state(agent, "DEAD", reason="no heartbeat for 60 s")
                    # As an EM finds them: one by one, over some seconds.
                    time.sleep(0.15)
            # Nobody can start these: they have no start command, so each death ends with a human.
            until(lambda: _escalated(client) == set(AGENTS), 200)
            until(lambda: _named(hook, "could not be recovered") == set(AGENTS), 60)
        finally:
            for part in parts:
                part.close()
    assert _named(hook, "is dead; recovering it") | _named(hook, "could not be recovered") == set(AGENTS)
    titles = [message["title"] for message in hook.got]
    # One page, and one notice of what ended: each recovery, when it was given up.
    pages = [title for title in titles if not title.startswith("[resolved]")]
    assert len(pages) == 1, titles
    assert len(titles) <= 2, titles
    assert len(alerts.receiver_states(client)) == 2


def _escalated(client: object) -> set[str]:
    found = alerts.open_alerts(client)  # type: ignore[arg-type]  # a client of redis-py
    return {one.key.partition("/")[2] for one in found if one.key.startswith("escalation/")}


def _named(hook: WebHook, words: str) -> set[str]:
    """Return the agents of which the messages say these words."""
    texts = [f"{message['title']}\n{message['message']}" for message in hook.got]
    return {agent for agent in AGENTS for text in texts if f"{agent} {words}" in text}
