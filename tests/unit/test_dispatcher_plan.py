"""Which job an event becomes."""

from __future__ import annotations

import re

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backup_worker import jobs
from backup_worker.dispatcher import plan
from backup_worker.queueing import queues
from backup_worker.queueing.due import BackupDue, IncidentDue, MaintenanceDue
from em_bridge import events, streams
from em_bridge.errors import InvalidEvent

ENTRY = "1795441803123-7"
AT = 1795441803.123


@pytest.mark.parametrize(
    ("event", "queue", "job_id", "function"),
    [
        (events.AgentState("z", "DEAD"), "recovery", f"agent-state_{ENTRY}", "agent_state"),
        (events.AgentState("z", "ALIVE"), "maintenance", f"agent-state_{ENTRY}", "agent_state"),
        (events.AgentState("z", "DEGRADED"), "maintenance", f"agent-state_{ENTRY}", "agent_state"),
        (
            events.ConfigApplied("c1", "z", ("a.json",)),
            "backup",
            f"config-change_{ENTRY}",
            "config_change",
        ),
        (
            events.ConfigProposed("c1", "z", ("a.json",), "em"),
            "backup",
            f"config-change_{ENTRY}",
            "config_change",
        ),
        (events.ConfigApproved("c1", "kari"), "backup", f"config-change_{ENTRY}", "config_change"),
        (events.ConfigRejected("c1", "kari"), "backup", f"config-change_{ENTRY}", "config_change"),
        (BackupDue("daily", "2026-11-23", "z", AT), "backup", "daily_2026-11-23_z", "backup"),
        (BackupDue("daily", "2026-11-23", "z", AT, attempt=2), "backup", f"due_{ENTRY}", "backup"),
        (IncidentDue("i-1"), "recovery", f"due_{ENTRY}", "incident"),
        (MaintenanceDue("watch"), "maintenance", f"due_{ENTRY}", "maintenance"),
    ],
)
def test_an_event_becomes_the_job_of_the_contract(
    event: events.Event, queue: str, job_id: str, function: str
) -> None:
    job = plan(event.stream, ENTRY, event)
    assert (job.queue, job.id, job.function) == (queue, job_id, function)
    assert f"backup_worker.jobs.{job.function}" in queues.ALLOWED
    assert callable(getattr(jobs, job.function))


def test_every_allowed_function_exists_and_nothing_else_of_that_module_is_allowed() -> None:
    assert {name.rpartition(".")[2] for name in queues.ALLOWED} == {
        "backup",
        "config_change",
        "agent_state",
        "incident",
        "restore",
        "maintenance",
    }


@pytest.mark.parametrize(
    "event",
    [
        events.Heartbeat("z", "1", 1),
        events.Message("z", "jay", 1, b"", 0.0),
        events.DeadLetter("em:due", ENTRY, "", 0.0, {}),
    ],
)
def test_an_event_that_nobody_here_handles_is_refused(event: events.Event) -> None:
    with pytest.raises(InvalidEvent, match="is not handled here"):
        plan(event.stream, ENTRY, event)


@given(tier=st.text(min_size=1, max_size=300), slot=st.text(min_size=1, max_size=300))
def test_a_slot_that_cannot_name_a_job_is_refused_and_never_raises_anything_else(
    tier: str, slot: str
) -> None:
    # RQ refuses such an id in the middle of the transaction, which would end the dispatcher.
    try:
        job = plan("em:due", ENTRY, BackupDue(tier, slot, "z", AT))
    except InvalidEvent as error:
        assert "\n" not in error.message
    else:
        assert re.fullmatch(r"[A-Za-z0-9_-]+", job.id)
        assert (tier, slot) == (job.args["tier"], job.args["slot"])


def test_a_job_carries_the_servers_time_of_its_event_not_the_senders() -> None:
    job = plan(streams.AGENT_STATE, ENTRY, events.AgentState("z", "DEAD", at=1.0))
    assert job.args["at"] == AT


def test_a_job_of_a_change_carries_no_content() -> None:
    # A megabyte of proposed content stays on the stream; the job reads it there.
    event = events.ConfigProposed("c1", "z", ("a.json",), "em", proposed={"a.json": b"x" * 900_000})
    assert len(msgpack.packb(dict(plan(streams.CONFIG_CHANGE, ENTRY, event).args))) < 1000


HOSTS = {"z": "web1"}


@pytest.mark.parametrize(
    ("event", "queue"),
    [
        (events.AgentState("z", "DEAD"), "recovery.web1"),
        (events.AgentState("z", "ALIVE"), "maintenance"),
        (events.AgentState("jay", "DEAD"), "recovery"),
        (events.ConfigApplied("c", "z", ("a",)), "backup.web1"),
        (events.ConfigProposed("c", "z", ("a",), "em"), "backup.web1"),
        (events.ConfigApproved("c", "kari"), "backup"),
        (BackupDue("daily", "s", "z", AT), "backup.web1"),
        (BackupDue("daily", "s", "jay", AT), "backup"),
        (MaintenanceDue("watch"), "maintenance"),
    ],
)
def test_the_jobs_of_an_agent_with_a_host_go_to_that_host(event: events.Event, queue: str) -> None:
    assert plan(event.stream, ENTRY, event, HOSTS).queue == queue
