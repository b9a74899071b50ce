"""What is missing, what is stuck, and who is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fakeredis
import pytest

from backup_worker import alerts, schedule
from backup_worker.maintenance import lookout, maintain, notices, pings
from backup_worker.maintenance.lookout import missing_backups, oldest_waiting
from backup_worker.queueing import due
from backup_worker.runtime import Runtime
from backup_worker.snapshots import take_snapshot
from em_bridge import events, streams
from em_bridge.errors import NotFound
from tests.small_fleet import SmallFleet

SEVEN = 1795417200.0  # 2026-11-23 07:00 UTC, when the daily tier fires
HOUR = 3600.0
GRACE = 30 * 60.0


@pytest.fixture
def fleet(tmp_path: Path) -> SmallFleet:
    return SmallFleet(tmp_path, ("z", "jay"), limits={"overdue_minutes": GRACE / 60})


@pytest.fixture
def client() -> Any:
    return fakeredis.FakeRedis()


@pytest.fixture
def runtime(fleet: SmallFleet, client: Any) -> Runtime:
    return fleet.runtime(client)


def make(runtime: Runtime, agent: str, slot: str, now: float) -> None:
    files = runtime.config.files_of(agent)
    take_snapshot(
        runtime.repository,
        files,
        tier="daily",
        slot=slot,
        include=["*"],
        unchanged="copy",
        now=now,
        reason="t",
    )


def announce(client: Any, agent: str, slot: str, at: float) -> None:
    """Let the scheduler have announced the slot at `at`."""
    late = schedule.Due("daily", slot, agent, at)
    client.set(streams.once_key(lookout.slot_announcement(late)), streams.id_at(at))


def overdue(runtime: Runtime, now: float) -> set[tuple[str, str]]:
    return {(agent, late.slot) for (_, agent), late in missing_backups(runtime, now).items()}


def open_keys(client: Any) -> list[str]:
    return sorted(alert.key for alert in alerts.open_alerts(client))


def test_a_slot_that_is_there_is_not_missing_and_one_that_is_not_is(runtime: Runtime) -> None:
    make(runtime, "z", "2026-11-23", SEVEN)
    assert overdue(runtime, SEVEN + HOUR) == {("jay", "2026-11-23")}


def test_a_slot_has_its_time_before_it_counts_as_missing(runtime: Runtime) -> None:
    for agent in ("z", "jay"):
        make(runtime, agent, "2026-11-22", SEVEN - 24 * HOUR)
    assert overdue(runtime, SEVEN + GRACE - 1) == set()
    assert overdue(runtime, SEVEN + GRACE + 1) == {("z", "2026-11-23"), ("jay", "2026-11-23")}


def test_a_slot_announced_late_has_its_time_from_then(runtime: Runtime, client: Any) -> None:
    # Everything was down until noon, or the agent is new.
    noon = SEVEN + 5 * HOUR
    for agent in ("z", "jay"):
        announce(client, agent, "2026-11-23", noon)
    assert overdue(runtime, noon + GRACE - 1) == set()
    assert overdue(runtime, noon + GRACE + 1) == {("z", "2026-11-23"), ("jay", "2026-11-23")}


def test_a_slot_that_passed_while_everything_was_down_is_made_up_by_the_newer_one(
    runtime: Runtime, fleet: SmallFleet, client: Any
) -> None:
    # Every half hour, as long as a slot has its time: the scheduler comes back at 09:40 and announces that of 09:30.
    fleet.edit(
        "backup_schedule.json",
        lambda document: document["tiers"]["daily"].update(cron="*/30 * * * *", slot="%Y-%m-%d-%H%M"),
    )
    back = SEVEN + 2 * HOUR + 40 * 60
    for agent in ("z", "jay"):
        announce(client, agent, "2026-11-23-0930", back)
    runtime = fleet.runtime(client)
    assert overdue(runtime, back + 5) == set()
    assert overdue(runtime, back + GRACE + 5) == {("z", "2026-11-23-0930"), ("jay", "2026-11-23-0930")}


def test_a_slot_that_nobody_announced_is_missing_also_without_redis(fleet: SmallFleet) -> None:
    assert overdue(Runtime(fleet.config), SEVEN + HOUR) == {("z", "2026-11-23"), ("jay", "2026-11-23")}


def test_yesterdays_snapshot_does_not_stand_in_for_todays(runtime: Runtime) -> None:
    make(runtime, "z", "2026-11-22", SEVEN - 24 * HOUR)
    assert ("z", "2026-11-23") in overdue(runtime, SEVEN + HOUR)


def test_a_missing_backup_alerts_once_and_resolves_when_it_is_made(
    runtime: Runtime, fleet: SmallFleet, client: Any
) -> None:
    make(runtime, "jay", "2026-11-23", SEVEN)
    for _ in range(3):
        maintain.run(runtime, "watch", now=SEVEN + HOUR)
    assert open_keys(client) == ["missing/daily/z"]
    assert len(fleet.history("alert")) == 1
    make(runtime, "z", "2026-11-23", SEVEN + HOUR)
    maintain.run(runtime, "watch", now=SEVEN + HOUR + 60)
    assert open_keys(client) == []


def append(client: Any, event: events.Event, at: float) -> str:
    entry: bytes = client.xadd(event.stream, events.encode(event), id=f"{int(at * 1000)}-1")
    return entry.decode()


def test_nothing_waits_where_nothing_was_ever_published(runtime: Runtime) -> None:
    assert oldest_waiting(runtime, SEVEN) == 0.0


def test_an_event_waits_until_it_is_acknowledged_not_only_read(runtime: Runtime, client: Any) -> None:
    streams.ensure_group(client, due.STREAM, streams.DISPATCHER_GROUP)
    entry = append(client, due.IncidentDue("i"), SEVEN)
    assert oldest_waiting(runtime, SEVEN + 90) == 90.0
    client.xreadgroup(streams.DISPATCHER_GROUP, "one", {due.STREAM: ">"})
    assert oldest_waiting(runtime, SEVEN + 95) == 95.0
    client.xack(due.STREAM, streams.DISPATCHER_GROUP, entry)
    assert oldest_waiting(runtime, SEVEN + 100) == 0.0


def test_events_wait_also_where_no_dispatcher_ever_ran(runtime: Runtime, client: Any) -> None:
    append(client, events.AgentState("z", "DEAD"), SEVEN)
    assert oldest_waiting(runtime, SEVEN + 90) == 90.0


def test_the_oldest_of_all_streams_counts(runtime: Runtime, client: Any) -> None:
    for stream in (streams.AGENT_STATE, streams.CONFIG_CHANGE, due.STREAM):
        streams.ensure_group(client, stream, streams.DISPATCHER_GROUP)
    append(client, due.IncidentDue("i"), SEVEN)
    append(client, events.AgentState("z", "DEAD"), SEVEN - 30)
    append(client, events.ConfigApproved("c", "kari"), SEVEN - 10)
    assert oldest_waiting(runtime, SEVEN) == 30.0


def test_events_that_nobody_takes_alert_and_resolve(runtime: Runtime, client: Any) -> None:
    streams.ensure_group(client, due.STREAM, streams.DISPATCHER_GROUP)
    entry = append(client, due.IncidentDue("i"), SEVEN)
    for agent in ("z", "jay"):
        make(runtime, agent, "2026-11-23", SEVEN)
    maintain.run(runtime, "watch", now=SEVEN + 61)
    assert open_keys(client) == ["lag"]
    client.xreadgroup(streams.DISPATCHER_GROUP, "one", {due.STREAM: ">"})
    client.xack(due.STREAM, streams.DISPATCHER_GROUP, entry)
    # The alert's own delivery was asked for by an event, which has just been published.
    client.xgroup_setid(due.STREAM, streams.DISPATCHER_GROUP, "$")
    maintain.run(runtime, "watch", now=SEVEN + 62)
    assert open_keys(client) == []


def dead_letter(client: Any, at: float) -> str:
    return append(client, streams.dead_letter("em:due", "1-1", "why", {}, at), at)


def test_a_dead_letter_that_came_behind_an_acknowledgement_alerts_anew(runtime: Runtime, client: Any) -> None:
    for agent in ("z", "jay"):
        make(runtime, agent, "2026-11-23", SEVEN)
    dead_letter(client, SEVEN)
    maintain.run(runtime, "watch", now=SEVEN + 1)
    alerts.acknowledge(client, "dead-letter", "kari", SEVEN + 2)
    maintain.run(runtime, "watch", now=SEVEN + 2)
    (known,) = alerts.open_alerts(client)
    assert known.acknowledged_by == "kari"
    second = dead_letter(client, SEVEN + 3)
    maintain.run(runtime, "watch", now=SEVEN + 4)
    (news,) = alerts.open_alerts(client)
    assert (news.key, news.acknowledged_by) == ("dead-letter", None)
    assert second in news.body
    client.delete(streams.DEAD_LETTER)  # trimmed at the end of its time
    maintain.run(runtime, "watch", now=SEVEN + 5)
    assert open_keys(client) == []


def test_one_broken_agent_opens_one_alert_however_many_letters_it_makes(
    runtime: Runtime, client: Any
) -> None:
    # Each minute's letter used to open an alert of its own, which stayed for as long as the letter: a month.
    for minute in range(3):
        last = dead_letter(client, SEVEN + 60 * minute)
        maintain.run(runtime, "watch", now=SEVEN + 60 * minute + 1)
    (told,) = (alert for alert in alerts.open_alerts(client) if alert.key.startswith("dead-letter"))
    assert (told.key, told.count) == ("dead-letter", 3)
    assert told.body.startswith("3 events") and last in told.body


def test_an_unknown_task_is_refused(runtime: Runtime) -> None:
    with pytest.raises(NotFound, match="no maintenance task “dance”"):
        maintain.run(runtime, "dance", now=SEVEN)


def test_every_task_that_is_asked_for_exists() -> None:
    by_the_clock = {*notices.TASKS, pings.TASK}
    assert maintain.EVERY_S.keys() | by_the_clock == maintain.TASKS.keys()


@pytest.mark.parametrize("task", sorted(maintain.TASKS))
def test_every_task_may_run_twice_on_an_empty_server(runtime: Runtime, task: str) -> None:
    assert maintain.run(runtime, task, now=SEVEN) is not None
    assert maintain.run(runtime, task, now=SEVEN + 1) is not None


def test_a_damaged_snapshot_is_found_by_the_scrub_and_alerted(
    runtime: Runtime, fleet: SmallFleet, client: Any
) -> None:
    make(runtime, "z", "2026-11-23", SEVEN)
    stored = fleet.folder / "backups/daily/2026-11-23/z/files/weights.json"
    stored.chmod(0o600)
    stored.write_text('{"speed": 0.6}\n')
    later = SEVEN + 400 * 86400
    assert maintain.run(runtime, "scrub", now=later)["bad"] == ["daily/2026-11-23/z"]
    assert "rot/daily/2026-11-23/z" in open_keys(client)


def test_the_end_of_a_silence_s_time_is_on_the_record_once_and_sends_what_it_held_back(
    runtime: Runtime, fleet: SmallFleet, client: Any
) -> None:
    begun = alerts.silences.begin(client, ["lag"], (), for_s=60, by="kari", why="disks", now=SEVEN)
    alerts.raise_alert(client, alerts.Alert("lag", "critical", "t", "b"), now=SEVEN)
    maintain.run(runtime, "deliver", now=SEVEN + 59)
    assert fleet.history() == []
    for now in (SEVEN + 60, SEVEN + 90):
        maintain.run(runtime, "deliver", now=now)
    (line,) = fleet.history("silence-ended")
    assert (line["id"], line["by"], line["why"]) == (begun.id, "its time was over", "disks")
    (line,) = fleet.history("alert-delivery")
    assert (line["keys"], line["failed"]) == (["lag"], ["no receiver is configured"])
