"""The parts together: what is due is made once, what breaks is told, and everything survives being killed."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from pathlib import Path

import msgpack
import psutil
import pytest
import redis
from redis import Redis

from backup_worker import alerts, jobs, slots
from backup_worker.config import ConfigWatch
from backup_worker.dispatcher import Dispatcher, rq_job
from backup_worker.embedded import url_file
from backup_worker.maintenance import maintain
from backup_worker.queueing import due, queues
from backup_worker.running import services
from backup_worker.running.services import STANDSTILL_S, Scheduler
from backup_worker.snapshots import Manifest
from backup_worker.watchdog import Watchdog
from backup_worker.worker import make_worker
from em_bridge import Publisher, events, streams
from em_bridge.connection import connect
from tests.integration.conftest import ValkeyServer
from tests.integration.parts import Part
from tests.integration.test_worker import backup_of, work_off
from tests.small_fleet import SmallFleet, until

pytestmark = pytest.mark.valkey


@pytest.fixture
def fleet(tmp_path: Path) -> SmallFleet:
    return SmallFleet(tmp_path, ("z", "jay"))


class House:
    """Scheduler, dispatcher and workers, moved on by hand."""

    def __init__(self, fleet: SmallFleet, valkey: ValkeyServer) -> None:
        self.fleet, self.valkey, self.client = fleet, valkey, valkey.client()
        self.em = Publisher(valkey.url)

    def scheduler(self) -> Scheduler:
        return Scheduler(self.valkey.client(), ConfigWatch(self.fleet.config_dir))

    def work(self) -> None:
        """Dispatch what is there, and run the backups."""
        dispatcher = Dispatcher(connect(self.valkey.url, retrying=False))
        dispatcher.prepare()
        while dispatcher.step(block_ms=1):
            pass
        work_off(self.valkey, self.fleet)

    @property
    def announced(self) -> list[str]:
        """Return tier/slot/agent of what was announced."""
        found = []
        for _, fields in streams.read_range(self.client, due.STREAM):
            event = events.decode(fields)
            if isinstance(event, due.BackupDue):
                found.append(f"{event.tier}/{event.slot}/{event.agent}")
        return found

    @property
    def alerts(self) -> dict[str, str]:
        return {alert.key: alert.severity for alert in alerts.open_alerts(self.client)}

    def snapshot(self) -> Manifest:
        """Return the newest snapshot."""
        return self.fleet.repository.get(self.fleet.repository.snapshots()[-1].id)


@pytest.fixture
def house(fleet: SmallFleet, valkey: ValkeyServer) -> House:
    return House(fleet, valkey)


def test_three_schedulers_make_each_slot_once(house: House, fleet: SmallFleet) -> None:
    schedulers = [house.scheduler() for _ in range(3)]
    together = threading.Barrier(3)

    def announce(one: Scheduler) -> None:
        together.wait()
        for _ in range(20):
            one._announced.clear()
            one.step()

    threads = [threading.Thread(target=announce, args=(one,)) for one in schedulers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(house.announced) == len(set(house.announced)) == 2
    house.work()
    assert sorted(fleet.snapshots) == sorted(house.announced)
    assert len(fleet.history("backup")) == 2


def test_only_the_newest_missed_slot_is_made_up_and_once(house: House, fleet: SmallFleet) -> None:
    # No snapshot for weeks: everything was down.
    house.scheduler().step()
    house.work()
    made = fleet.snapshots
    assert len(made) == 2
    house.scheduler().step()
    house.work()
    house.client.flushall()  # the server forgot that it was announced
    house.scheduler().step()
    house.work()
    assert fleet.snapshots == made


def test_an_agent_added_while_running_gets_its_first_snapshot_at_once(
    house: House, fleet: SmallFleet
) -> None:
    scheduler = house.scheduler()
    scheduler.step()
    house.work()
    rick = fleet.folder / "agents" / "rick"
    rick.mkdir()
    (rick / "SOUL.md").write_text("I am rick\n")
    fleet.edit(
        "agents.json",
        lambda document: document["agents"].update(
            rick={"root": str(rick), "files": {"charter": ["SOUL.md"]}, "required": ["SOUL.md"]}
        ),
    )
    scheduler.step()
    house.work()
    assert [one for one in fleet.snapshots if one.endswith("/rick")] == [
        one for one in house.announced if one.endswith("/rick")
    ]
    assert any(one.endswith("/rick") for one in fleet.snapshots)


def test_a_broken_edit_keeps_the_last_good_configuration_alerts_once_and_resolves_when_mended(
    house: House, fleet: SmallFleet
) -> None:
    one, other = house.scheduler(), house.scheduler()
    one.step()
    other.step()
    good = (fleet.config_dir / "agents.json").read_text()
    (fleet.config_dir / "agents.json").write_text(good.replace('"root"', '"rot"', 1))
    one.step()
    assert house.alerts == {"config": "critical"}
    # The other one has not looked yet, so it sees nothing wrong: that is no reason to say that all is well.
    other.watch.refresh = lambda: False  # type: ignore[method-assign]
    other.step()
    assert house.alerts == {"config": "critical"}
    assert set(one.watch.current.agents) == {"z", "jay"}
    one.step()
    assert len(fleet.history("config")) == 1
    (fleet.config_dir / "agents.json").write_text(good)
    one.step()
    assert house.alerts == {}
    assert [line["key"] for line in fleet.history("alert-resolved")] == ["config"]


def test_an_alert_of_a_broken_edit_is_resolved_also_by_the_next_scheduler(
    house: House, fleet: SmallFleet
) -> None:
    one = house.scheduler()
    good = (fleet.config_dir / "agents.json").read_text()
    (fleet.config_dir / "agents.json").write_text("{")
    one.step()
    assert house.alerts == {"config": "critical"}
    (fleet.config_dir / "agents.json").write_text(good)
    house.scheduler().step()
    assert house.alerts == {}


def test_an_approved_change_becomes_an_approved_snapshot(house: House, fleet: SmallFleet) -> None:
    (fleet.root("z") / "weights.json").write_text('{"speed": 0.9}\n')
    house.em.config_applied("c1", "z", ["weights.json"], by="em", approved_by="kari", reason="faster")
    house.work()
    snapshot = house.snapshot()
    assert snapshot.id.startswith("on-change/")
    assert (snapshot.approved, snapshot.approved_by, snapshot.agent) == (True, "kari", "z")
    assert "faster" in snapshot.reason
    assert house.alerts == {}
    (line,) = fleet.history("change")
    assert (line["change"], line["approved"], line["approved_by"]) == ("c1", True, "kari")


def test_an_unapproved_change_is_kept_as_evidence_marked_and_alerted(house: House, fleet: SmallFleet) -> None:
    house.em.config_applied("c1", "z", ["weights.json"], by="leroy")
    house.work()
    assert (house.snapshot().approved, house.snapshot().approved_by) == (False, None)
    assert house.alerts == {"unapproved/c1": "critical"}
    assert "leroy" in alerts.open_alerts(house.client)[0].body


def test_two_applications_under_one_id_are_each_copied_from_their_own_agent(
    house: House, fleet: SmallFleet
) -> None:
    # Both are on the stream before the first job runs.
    for agent in ("z", "jay"):
        house.em.config_applied("c1", agent, ["weights.json"], by="em", approved_by="kari")
    house.work()
    assert sorted(one.rpartition("/")[2] for one in fleet.snapshots) == ["jay", "z"]
    assert sorted(line["agent"] for line in fleet.history("change")) == ["jay", "z"]


def test_a_job_run_twice_makes_one_snapshot_and_one_line(house: House, fleet: SmallFleet) -> None:
    house.em.config_applied("c1", "z", ["weights.json"], by="leroy")
    house.work()
    # As behind the kill of a worker that had not yet told RQ that it was done.
    for name in house.client.scan_iter("rq:job:*"):
        job_id = name.decode().removeprefix("rq:job:")
        if ":" not in job_id:
            house.client.rpush(f"rq:queue:{queues.BACKUP}", job_id)
    work_off(house.valkey, fleet)
    assert len(fleet.snapshots) == len(fleet.history("backup")) == len(fleet.history("change")) == 1
    assert len(fleet.history("alert")) == 1


def test_a_proposal_asks_a_human_until_it_is_decided(house: House) -> None:
    house.em.config_proposed("c1", "z", ["weights.json"], "leroy", reason="faster")
    house.work()
    assert house.alerts == {"change/c1": "info"}
    house.em.config_approved("c1", "kari")
    house.work()
    assert house.alerts == {}


def test_a_backup_that_cannot_be_made_is_told_and_is_resolved_by_the_next_good_one(
    house: House, fleet: SmallFleet
) -> None:
    root = fleet.root("z")
    root.rename(root.with_name("away"))
    house.scheduler().step()
    house.work()
    assert house.alerts == {"failed/daily/z": "critical"}
    (line,) = fleet.history("backup-failed")
    assert line["agent"] == "z"
    root.with_name("away").rename(root)
    streams.append(house.client, due.BackupDue("daily", "later", "z", 0.0))
    house.work()
    assert house.alerts == {}


def let_the_pauses_end(client: Redis) -> None:
    for name, note in slots.waiting(client).items():
        client.hset(slots.FAILED, name, msgpack.packb(note | {"again_at": 0.0}))


def test_a_slot_that_failed_is_tried_again_until_it_is_made_and_is_made_once(
    house: House, fleet: SmallFleet
) -> None:
    root = fleet.root("z")
    root.rename(root.with_name("away"))
    schedulers = [house.scheduler() for _ in range(2)]

    def go_on() -> None:
        for one in schedulers:
            one.step()
        house.work()

    go_on()
    slot = fleet.snapshots[0].split("/")[1]
    assert fleet.snapshots == [f"daily/{slot}/jay"]
    go_on()  # too early
    (line,) = fleet.history("backup-failed")
    assert "tried again in 5 minutes" in line["error"]
    let_the_pauses_end(house.client)
    go_on()
    go_on()  # too early for the next
    assert len(fleet.history("backup-failed")) == 2
    assert house.alerts == {"failed/daily/z": "critical"}
    root.with_name("away").rename(root)
    let_the_pauses_end(house.client)
    go_on()
    go_on()
    assert sorted(fleet.snapshots) == [f"daily/{slot}/jay", f"daily/{slot}/z"]
    assert house.alerts == {}
    assert slots.waiting(house.client) == {}
    assert house.announced.count(f"daily/{slot}/z") == 3


def test_a_slot_that_never_succeeds_is_given_up_until_the_next(
    house: House, fleet: SmallFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "PAUSES_S", slots.PAUSES_S[:2])
    fleet.root("z").rename(fleet.root("z").with_name("away"))
    scheduler = house.scheduler()
    for _ in range(5):
        scheduler.step()
        house.work()
        let_the_pauses_end(house.client)
    lines = fleet.history("backup-failed")
    assert len(lines) == 3
    assert "not tried again before its next slot" in lines[-1]["error"]
    assert slots.waiting(house.client) == {}


def test_that_nothing_is_watched_any_more_is_told_by_the_scheduler_itself(
    house: House, fleet: SmallFleet
) -> None:
    # Dispatchers or workers stand still: no other alert would ever arrive.
    fleet.edit("backup_schedule.json", lambda document: document.update(paging={"group_seconds": 0}))
    scheduler = house.scheduler()
    scheduler.step()
    scheduler.step()
    assert house.alerts == {}
    house.client.set(maintain.WATCHED_AT, time.time() - STANDSTILL_S - 1)
    scheduler.step()
    assert house.alerts == {"standstill": "critical"}
    assert [line["keys"] for line in fleet.history("alert-delivery")] == [["standstill"]]
    jobs.prepare(fleet.config_dir)
    maintain.run(fleet.runtime(house.client), "watch", now=time.time())
    scheduler.step()
    assert "standstill" not in house.alerts


def test_jobs_that_wait_where_nobody_works_are_told_until_somebody_does(
    house: House, fleet: SmallFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.edit("agents.json", lambda document: document["agents"]["z"].update(host="far"))
    monkeypatch.setattr(services, "UNSERVED_LOOK_S", 0.0)
    monkeypatch.setattr(services, "UNSERVED_AFTER_S", 0.2)
    queues.open_queue("backup.far", house.client).enqueue_many([rq_job(backup_of("z"))])
    # What is left of a worker that was killed there.
    house.client.sadd("rq:workers:backup.far", "rq:worker:dead")
    scheduler = house.scheduler()
    scheduler.step()
    assert house.alerts == {}  # its workers may just be starting
    time.sleep(0.25)
    scheduler.step()
    house.scheduler().step()  # another one, which has just begun to look, does not take that back
    assert house.alerts["unserved/backup.far"] == "critical"
    worker = make_worker("backup.far", house.client, lambda *_: None)
    worker.register_birth()
    scheduler.step()
    assert "unserved/backup.far" not in house.alerts
    worker.register_death()
    work_off(house.valkey, fleet, "backup.far")
    time.sleep(0.25)
    scheduler.step()
    assert "unserved/backup.far" not in house.alerts  # empty


# -- real processes ----------------------------------------------------------------------------------------------------


def start(parts: list[Part], fleet: SmallFleet, *words: str, env: dict[str, str] | None = None) -> Part:
    part = Part(fleet.folder, *words, "--config", str(fleet.config_dir), env=env)
    parts.append(part)
    return part


def start_up(parts: list[Part], fleet: SmallFleet, *options: str) -> tuple[Part, Redis]:
    """Start `up` and return it with a client of its server, once its parts work."""
    part = start(parts, fleet, "up", "--no-console", *options)
    part.says("Ctrl-C stops")
    url = options[1] if options else url_file(fleet.folder / "state").read_text().strip()
    client = connect(url)
    until(lambda: len(part.family()) >= 8 and client.exists("backup:alive:" + "worker:" + _host()), 30)
    return part, client


def _host() -> str:
    import socket

    return socket.gethostname()


def change_and_wait(client: Redis, fleet: SmallFleet, change: str) -> None:
    """Apply a change and wait for its snapshot: the whole way of an event."""
    before = len([one for one in fleet.snapshots if one.startswith("on-change/")])
    Publisher(client).config_applied(change, "z", ["weights.json"], by="em", approved_by="kari")
    until(
        lambda: len([one for one in fleet.snapshots if one.startswith("on-change/")]) == before + 1,
        25,
    )


def parts_of(up: Part) -> set[int]:
    """Return the processes that `up` itself has started; a worker's children come and go with its jobs."""
    return {one.pid for one in psutil.Process(up.process.pid).children()}


def gone(part: Part, within_s: float) -> None:
    until(lambda: not part.living(), within_s)


def test_up_killed_leaves_nothing_running_and_has_its_data_and_address_when_started_again(
    parts: list[Part], fleet: SmallFleet
) -> None:
    first, client = start_up(parts, fleet)
    change_and_wait(client, fleet, "c1")
    client.set("mine", "kept")
    url = url_file(fleet.folder / "state").read_text()
    assert url_file(fleet.folder / "state").stat().st_mode & 0o077 == 0
    first.kill()
    gone(first, 10)
    with pytest.raises(redis.ConnectionError):
        connect(url.strip(), retrying=False).ping()
    second, client = start_up(parts, fleet)
    assert url_file(fleet.folder / "state").read_text() == url
    assert client.get("mine") == b"kept"
    change_and_wait(client, fleet, "c2")

    # A second one on the same state is refused, and disturbs nothing.
    other = start(parts, fleet, "up", "--no-console")
    assert other.process.wait(15) == 1
    lines = other.log.strip().splitlines()
    assert any(line.startswith("error: an embedded Valkey already runs") for line in lines)
    assert lines[-1].startswith("hint: ")
    assert "Traceback" not in other.log

    # Its server killed: it comes back at the same address, with its data, and the parts go on.
    (server,) = [one for one in second.family() if "valkey" in one.name()]
    others = parts_of(second) - {server.pid}
    server.kill()

    def has_its_data_again() -> bool:
        with contextlib.suppress(redis.ConnectionError):
            return client.get("mine") == b"kept"
        return False

    until(has_its_data_again, 10)
    change_and_wait(client, fleet, "c3")
    assert others <= parts_of(second)

    assert second.stop(signal.SIGINT) == 0
    assert second.living() == []
    assert "Traceback" not in second.log


def test_sigterm_ends_up_with_all_its_parts(parts: list[Part], fleet: SmallFleet) -> None:
    up, _ = start_up(parts, fleet)
    assert up.stop(signal.SIGTERM) == 0
    assert up.living() == []
    assert "Traceback" not in up.log


def test_all_parts_outlive_a_server_that_is_killed_and_restarted(
    parts: list[Part], fleet: SmallFleet, valkey: ValkeyServer
) -> None:
    up, client = start_up(parts, fleet, "--redis-url", valkey.url)
    change_and_wait(client, fleet, "c1")
    before = parts_of(up)
    valkey.kill()
    time.sleep(3)
    spent_s = sum(one.cpu_times().user for one in up.living())
    time.sleep(1)
    assert sum(one.cpu_times().user for one in up.living()) - spent_s < 0.5, "somebody spins"
    valkey.start()
    change_and_wait(client, fleet, "c2")
    assert parts_of(up) == before
    assert "starting it again" not in up.log
    # The watchdog and the scheduler work, too.
    client.delete("backup:alive:watchdog:" + _host(), "backup:alive:scheduler:" + _host())
    until(lambda: client.exists("backup:alive:watchdog:" + _host(), "backup:alive:scheduler:" + _host()) == 2)
    valkey.freeze()  # no answer at all, instead of no server
    time.sleep(1)
    valkey.thaw()
    change_and_wait(client, fleet, "c3")
    assert parts_of(up) == before


def test_a_dispatcher_that_cannot_wake_incidents_ends_instead_of_doing_half_of_its_work(
    parts: list[Part], fleet: SmallFleet, valkey: ValkeyServer, client: Redis
) -> None:
    client.set(streams.FLEET, "not a hash")
    dispatcher = start(parts, fleet, "dispatcher", "--redis-url", valkey.url)
    assert dispatcher.process.wait(15) != 0


# -- the watchdog ------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_em(tmp_path: Path) -> SmallFleet:
    fleet = SmallFleet(tmp_path / "with-em", ("em", "z"))
    fleet.edit(
        "agents.json",
        lambda document: document["agents"]["em"].update(
            heartbeat={"dead_after": 2, "verify_within": 10, "stable_beats": 2}
        ),
    )
    return fleet


def deaths(client: Redis) -> list[events.AgentState]:
    found = [events.decode(fields) for _, fields in streams.read_range(client, streams.AGENT_STATE)]
    return [one for one in found if isinstance(one, events.AgentState) and one.state == events.DEAD]


def beat(client: Redis, seq: int) -> None:
    streams.append(client, events.Heartbeat("em", "first", seq))


def test_of_two_watchdogs_one_publishes_the_death_of_the_em_once(
    valkey: ValkeyServer, client: Redis, with_em: SmallFleet
) -> None:
    watchdogs = [Watchdog(valkey.client(), ConfigWatch(with_em.config_dir)) for _ in range(2)]
    for seq in range(20):
        beat(client, seq)
        for one in watchdogs:
            one.step()
        time.sleep(0.05)
    assert deaths(client) == []
    assert sorted(one.lease.epoch is None for one in watchdogs) == [False, True]

    def die() -> list[events.AgentState]:
        for one in watchdogs:
            one.step()
        return deaths(client)

    until(die, 6)
    for _ in range(10):
        die()
        time.sleep(0.05)
    (death,) = deaths(client)
    assert (death.agent, death.incarnation) == ("em", "first")


def test_a_watchdog_that_is_killed_is_replaced_within_seconds(
    valkey: ValkeyServer, client: Redis, with_em: SmallFleet, parts: list[Part]
) -> None:
    both = [start(parts, with_em, "watchdog", "--redis-url", valkey.url) for _ in range(2)]
    until(lambda: any("watching the EM" in one.log for one in both), 20)
    leader = next(one for one in both if "watching the EM" in one.log)
    (other,) = [one for one in both if one is not leader]
    beat(client, 1)
    leader.kill()
    other.says("watching the EM", 7)
    until(lambda: deaths(client), 6)
    time.sleep(1)
    assert len(deaths(client)) == 1


def test_a_death_of_the_em_that_a_full_server_does_not_take_is_published_when_there_is_room(
    valkey: ValkeyServer, client: Redis, with_em: SmallFleet
) -> None:
    watchdog = Watchdog(valkey.client(), ConfigWatch(with_em.config_dir))
    watchdog.step()
    beat(client, 1)
    watchdog.step()
    client.config_set("maxmemory", 1)
    try:

        def refused() -> bool:
            with contextlib.suppress(redis.exceptions.OutOfMemoryError):
                watchdog.step()
            sight = watchdog._detector.sight("em") if watchdog._detector else None
            return sight is not None and sight.state == events.DEAD

        until(refused, 6)
    finally:
        client.config_set("maxmemory", 0)
    assert deaths(client) == []
    watchdog.step()
    (death,) = deaths(client)
    assert death.agent == "em"
