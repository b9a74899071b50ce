"""The regular look: no good backup for too long, a server nearly full, messages nobody routes, alerts that are over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fakeredis
import pytest

from backup_worker import alerts, by_hand, jobs
from backup_worker.alerts import Alert
from backup_worker.maintenance import lookout, maintain
from backup_worker.runtime import Runtime
from backup_worker.snapshots import take_snapshot
from em_bridge import events, streams
from tests.small_fleet import SmallFleet

SEVEN = 1795417200.0  # 2026-11-23 07:00 UTC, when the daily tier fires
HOUR = 3600.0
DAY = 86400.0


class Server(fakeredis.FakeRedis):
    """One that says how full it is."""

    memory: tuple[int, int] | None = None

    def info(self, *sections: str, **more: Any) -> Any:
        if self.memory is None:
            return super().info(*sections)
        return {"used_memory": self.memory[0], "maxmemory": self.memory[1]}


@pytest.fixture
def fleet(tmp_path: Path) -> SmallFleet:
    return SmallFleet(tmp_path, ("z", "jay"), limits={"overdue_minutes": 60, "reserve_bytes": 0})


@pytest.fixture
def client() -> Server:
    return Server()


@pytest.fixture
def runtime(fleet: SmallFleet, client: Server) -> Runtime:
    return fleet.runtime(client)


def make(fleet: SmallFleet, agent: str, day: int, *, good: bool = True) -> None:
    """Make the daily snapshot of the day so many days from the 23rd."""
    soul = fleet.root(agent) / "SOUL.md"
    soul.write_text(f"I am {agent}.\n" if good else "")
    take_snapshot(
        fleet.repository, fleet.config.files_of(agent), tier="daily", slot=f"2026-11-{23 + day}", include=["*"],
        unchanged="copy", now=SEVEN + day * DAY, reason="t",
    )  # fmt: skip


def stale(fleet: SmallFleet, now: float) -> dict[tuple[str, str], float | None]:
    return lookout.stale_backups(fleet.config, fleet.repository.snapshots(), now)


def open_keys(client: Any) -> list[str]:
    return sorted(alert.key for alert in alerts.open_alerts(client))


def test_two_runs_without_a_good_snapshot_make_an_agent_stale_and_a_good_one_ends_it(
    fleet: SmallFleet, runtime: Runtime, client: Server
) -> None:
    make(fleet, "z", 0)
    make(fleet, "z", 1, good=False)
    assert stale(fleet, SEVEN + DAY + 2 * HOUR) == {}
    make(fleet, "z", 2, good=False)
    assert stale(fleet, SEVEN + 2 * DAY + HOUR - 1) == {}, "the second run still has its time"
    late = SEVEN + 2 * DAY + 2 * HOUR
    assert stale(fleet, late) == {("daily", "z"): SEVEN}
    lookout.look(runtime, fleet.repository.snapshots(), late)
    assert open_keys(client) == ["stale/daily/z"]
    assert "50 h old" in alerts.open_alerts(client)[0].body
    make(fleet, "z", 3)
    lookout.look(runtime, fleet.repository.snapshots(), SEVEN + 3 * DAY)
    assert open_keys(client) == []


def test_an_agent_that_never_had_a_good_one_is_stale_after_two_runs_and_one_without_any_is_missing(
    fleet: SmallFleet,
) -> None:
    make(fleet, "z", 0, good=False)
    assert stale(fleet, SEVEN + DAY + 2 * HOUR) == {}
    make(fleet, "z", 1, good=False)
    make(fleet, "z", 2, good=False)
    assert stale(fleet, SEVEN + 2 * DAY + 2 * HOUR) == {("daily", "z"): None}


def test_freshness_follows_the_cron_expression_not_a_number_of_hours(fleet: SmallFleet) -> None:
    # Only on weekdays: over the weekend nothing becomes stale. The 27th is a Friday.
    fleet.edit("backup_schedule.json", lambda document: document["tiers"]["daily"].update(cron="0 7 * * 1-5"))
    make(fleet, "z", 4)
    assert stale(fleet, SEVEN + 6 * DAY + 12 * HOUR) == {}
    assert stale(fleet, SEVEN + 7 * DAY + 2 * HOUR) == {}
    assert stale(fleet, SEVEN + 8 * DAY + 2 * HOUR) == {("daily", "z"): SEVEN + 4 * DAY}


@pytest.mark.parametrize(
    ("used", "limit", "severity"), [(91, 100, "critical"), (85, 100, None), (10, 100, None), (10**9, 0, None)]
)
def test_a_server_that_is_nearly_full_alerts_before_it_takes_nothing_any_more(
    runtime: Runtime, client: Server, used: int, limit: int, severity: str | None
) -> None:
    client.memory = used, limit
    lookout.look(runtime, [], SEVEN)
    assert [one.severity for one in alerts.open_alerts(client)] == ([severity] if severity else [])


def test_memory_that_is_a_little_better_is_not_well_yet(runtime: Runtime, client: Server) -> None:
    for used, keys in ((91, ["memory"]), (85, ["memory"]), (79, []), (85, [])):
        client.memory = used, 100
        lookout.look(runtime, [], SEVEN)
        assert open_keys(client) == keys


def test_messages_that_nobody_routes_alert_until_somebody_does(runtime: Runtime, client: Server) -> None:
    message = events.encode(events.Message("z", "jay", 1, b"hello"))
    client.xadd(streams.MESSAGES, message, id=f"{int(SEVEN * 1000)}-0")  # type: ignore[arg-type]  # bytes are fine
    lookout.look(runtime, [], SEVEN + 59)
    assert open_keys(client) == []
    lookout.look(runtime, [], SEVEN + 61)
    assert open_keys(client) == ["stuck"]
    client.xgroup_create(streams.MESSAGES, streams.ROUTER_GROUP, "0")
    ((_, [(entry, _)]),) = client.xreadgroup(streams.ROUTER_GROUP, "em", {streams.MESSAGES: ">"})  # type: ignore[misc]
    lookout.look(runtime, [], SEVEN + 62)
    assert open_keys(client) == ["stuck"], "read, and not done with"
    client.xack(streams.MESSAGES, streams.ROUTER_GROUP, entry)
    lookout.look(runtime, [], SEVEN + 63)
    assert open_keys(client) == []


def test_a_backup_made_by_hand_ends_the_alert_about_the_one_that_failed(
    fleet: SmallFleet, runtime: Runtime, client: Server
) -> None:
    for key in (
        "failed/daily/z",
        "suspect/daily/z",
        "failed/daily/jay",
        "failed/daily/gone",
        "failed/gone/z",
    ):
        alerts.raise_alert(client, Alert(key, "critical", "t", "b"), now=SEVEN - 10)
    make(fleet, "z", 0)
    lookout.look(runtime, fleet.repository.snapshots(), SEVEN + 10)
    assert open_keys(client) == ["failed/daily/jay"]


def test_a_snapshot_that_is_not_good_ends_no_alert_about_a_suspect_one(
    fleet: SmallFleet, runtime: Runtime, client: Server
) -> None:
    for key in ("failed/daily/z", "suspect/daily/z"):
        alerts.raise_alert(client, Alert(key, "critical", "t", "b"), now=SEVEN - 10)
    make(fleet, "z", 0, good=False)
    lookout.look(runtime, fleet.repository.snapshots(), SEVEN + 10)
    assert open_keys(client) == ["suspect/daily/z"]


def test_what_fails_again_and_again_has_one_alert_and_is_forgotten_with_its_job(
    runtime: Runtime, client: Server
) -> None:
    keys = {jobs._failure_key("maintenance", {"task": "scrub"}) for _ in range(2)}
    assert keys == {"job/maintenance/scrub"}
    assert jobs._failure_key("maintenance", {"task": 5}) == ""
    assert jobs._failure_key("backup", {"agent": "z"}) == ""
    alerts.raise_alert(client, Alert("job/planted", "critical", "t", "b"), now=SEVEN)
    lookout.look(runtime, [], SEVEN + 6 * DAY)
    assert open_keys(client) == ["job/planted"]
    lookout.look(runtime, [], SEVEN + 8 * DAY)
    assert open_keys(client) == []


def test_all_of_it_is_part_of_the_watch(fleet: SmallFleet, runtime: Runtime, client: Server) -> None:
    client.memory = 95, 100
    found = maintain.run(runtime, "watch", now=SEVEN)
    assert (found["memory"], found["stale"]) == (0.95, [])
    assert "memory" in open_keys(client)


def test_a_command_s_good_backups_say_nothing_where_nothing_was_told(fleet: SmallFleet) -> None:
    row = {"id": "daily/x/z", "agent": "z", "status": "good", "problems": [], "warnings": []}
    by_hand.tell(Runtime(fleet.config), "daily", [row], [])
    assert fleet.history() == []
