"""Agents on several hosts: each is backed up and recovered by the workers of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from backup_worker.dispatcher import Dispatcher
from backup_worker.queueing import due, queues
from backup_worker.queueing.hosts import hosts_of, queues_of
from backup_worker.recovery.incident import IncidentStore
from backup_worker.recovery.service import RecoveryService
from em_bridge import Publisher, streams
from em_bridge.connection import connect
from tests.integration.conftest import ValkeyServer
from tests.integration.parts import Part
from tests.integration.test_worker import work_off
from tests.small_fleet import DAILY, ON_CHANGE, SmallFleet, until

pytestmark = pytest.mark.valkey

SLOT = "2026-11-23"


@pytest.fixture
def fleet(tmp_path: Path) -> SmallFleet:
    """Agents z on host one, jay on host two, rick anywhere; approvals make snapshots too."""
    tiers = {"daily": DAILY, "on-change": ON_CHANGE | {"events": ["config.approved"]}}
    found = SmallFleet(tmp_path, ("z", "jay", "rick"), tiers=tiers)
    place(found, z="one", jay="two")
    return found


def place(fleet: SmallFleet, **hosts: str | None) -> None:
    def edit(document: Any) -> None:
        for agent, host in hosts.items():
            document["agents"][agent]["host"] = host

    fleet.edit("agents.json", edit)


def dispatch(valkey: ValkeyServer, fleet: SmallFleet) -> None:
    hosts = hosts_of(fleet.config)
    one = Dispatcher(connect(valkey.url, retrying=False), hosts=lambda: hosts)
    one.prepare()
    while one.step(block_ms=1):
        pass


def waiting(client: Redis) -> dict[str, int]:
    names: Any = client.smembers("rq:queues")
    counts: dict[str, Any] = {name.decode(): client.llen(name.decode()) for name in names}
    return {name.removeprefix("rq:queue:"): count for name, count in counts.items() if count}


def backup_all(client: Redis, slot: str = SLOT) -> None:
    for agent in ("z", "jay", "rick"):
        streams.append(client, due.BackupDue("daily", slot, agent, 0.0))


def test_a_host_has_queues_of_its_own_while_an_agent_is_there(fleet: SmallFleet) -> None:
    assert queues_of(fleet.config, "one") == ["recovery.one", "backup.one"]
    assert queues_of(fleet.config, "three") == []


def test_two_workers_of_different_hosts_each_back_up_their_own_agents(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet, parts: list[Part]
) -> None:
    def worker(host: str) -> Part:
        words = ("worker", "--host", host, "--processes", "1", "--redis-url", valkey.url)
        parts.append(Part(fleet.folder, *words, "--config", str(fleet.config_dir)))
        return parts[-1]

    two = worker("two")
    two.says("working on backup.two")
    backup_all(client)
    dispatch(valkey, fleet)
    until(lambda: sorted(fleet.snapshots) == [f"daily/{SLOT}/jay", f"daily/{SLOT}/rick"])
    assert waiting(client) == {"backup.one": 1}  # nobody else takes it
    one = worker("one")
    until(lambda: len(fleet.snapshots) == 3)
    assert "working on backup.two" not in one.log

    one.says("working on recovery.one")
    assert one.stop() == 0
    assert one.living() == []


def test_workers_of_a_host_that_gets_its_first_agent_serve_it_without_a_restart(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet, parts: list[Part]
) -> None:
    words = ("worker", "--host", "three", "--processes", "1", "--redis-url", valkey.url)
    parts.append(Part(fleet.folder, *words, "--config", str(fleet.config_dir)))
    parts[0].says("working on backup with")
    assert "three" not in parts[0].log.replace("--host three", "")
    place(fleet, z="three")
    parts[0].says("working on backup.three")
    streams.append(client, due.BackupDue("daily", SLOT, "z", 0.0))
    dispatch(valkey, fleet)
    until(lambda: fleet.snapshots == [f"daily/{SLOT}/z"])


def test_an_approval_that_does_not_name_the_agent_is_passed_on_to_its_host(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet
) -> None:
    em = Publisher(valkey.url)
    em.config_proposed("c1", "z", ["weights.json"], "em")
    em.config_approved("c1", "kari")
    dispatch(valkey, fleet)
    assert waiting(client) == {"backup.one": 1, "backup": 1}
    work_off(valkey, fleet, "backup")
    assert waiting(client) == {"backup.one": 2}
    assert fleet.snapshots == []
    work_off(valkey, fleet, "backup.one")
    assert [one.rpartition("/")[2] for one in fleet.snapshots] == ["z"]
    assert waiting(client) == {}


def test_hosts_that_contradict_each_other_do_not_pass_a_job_to_and_fro(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet
) -> None:
    streams.append(client, due.BackupDue("daily", SLOT, "z", 0.0))
    dispatch(valkey, fleet)
    place(fleet, z="two")
    work_off(valkey, fleet, "backup.one")
    assert waiting(client) == {"backup.two": 1}
    place(fleet, z="one")
    work_off(valkey, fleet, "backup.two")
    assert waiting(client) == {}
    assert fleet.snapshots == [f"daily/{SLOT}/z"]


def test_an_incident_is_advanced_on_the_host_of_its_agent(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet
) -> None:
    # Its deadlines and a human's order do not name the agent.
    opened = RecoveryService(fleet.runtime(client)).open("z", "by hand")
    dispatch(valkey, fleet)
    assert waiting(client).pop(queues.RECOVERY) == 1
    work_off(valkey, fleet, queues.RECOVERY)
    assert waiting(client).get("recovery.one") == 1
    assert IncidentStore(client).get(opened.id).version == opened.version
    work_off(valkey, fleet, "recovery.one")
    assert IncidentStore(client).get(opened.id).version > opened.version


def test_the_death_of_an_agent_goes_straight_to_its_host(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet
) -> None:
    Publisher(valkey.url).agent_state("z", "DEAD", reason="silent")
    dispatch(valkey, fleet)
    assert waiting(client) == {"recovery.one": 1}
    work_off(valkey, fleet, "recovery.one")
    assert fleet.history("recovery")[0]["agent"] == "z"


def test_a_death_told_in_another_case_reaches_the_host_of_the_agent_and_opens_its_incident(
    valkey: ValkeyServer, client: Redis, fleet: SmallFleet
) -> None:
    # Ids are unique ignoring case, so there is nobody else that this could mean.
    Publisher(valkey.url).agent_state("Z", "DEAD", reason="silent")
    dispatch(valkey, fleet)
    work_off(valkey, fleet, queues.RECOVERY)
    assert waiting(client).get("recovery.one") == 1
    work_off(valkey, fleet, "recovery.one")
    assert fleet.history("recovery")[0]["agent"] == "z"
