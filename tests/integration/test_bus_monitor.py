"""The monitor, the pulse and the runner on a real Valkey, with real processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
import redis

from em_bridge import Agent, ExecutionManager, streams
from em_bridge.connection import connect
from em_bridge.errors import LeaseLost
from em_bridge.events import AgentState, Heartbeat, decode
from em_bridge.lease import Lease
from em_bridge.monitor import Monitor
from em_bridge.pulse import Pulse
from tests.integration.conftest import ValkeyServer, free_port
from tests.integration.processes import EM_BRIDGE, Process, em_bridge, eventually, python

pytestmark = pytest.mark.valkey

DEAD_AFTER_S = 1.0


def set_fleet(client: redis.Redis, *agents: str, dead_after: float = DEAD_AFTER_S) -> None:
    client.hset(streams.FLEET, mapping={agent: msgpack.packb({"dead_after": dead_after}) for agent in agents})


def changes(client: redis.Redis) -> list[str]:
    events = [decode(fields) for _, fields in streams.read_range(client, streams.AGENT_STATE)]
    return [f"{event.agent} {event.state}" for event in events if isinstance(event, AgentState)]


def beats(client: redis.Redis, agent: str) -> list[Heartbeat]:
    events = [decode(fields) for _, fields in streams.read_range(client, streams.HEARTBEATS)]
    return [event for event in events if isinstance(event, Heartbeat) and event.agent == agent]


@pytest.fixture
def em(valkey: ValkeyServer) -> Iterator[ExecutionManager]:
    set_fleet(valkey.client(), "z", "jay")
    with ExecutionManager(valkey.url) as manager:
        assert manager.wait_until_leading(5)
        yield manager


SLEEPER = """
import sys, time
from em_bridge import Agent
with Agent(sys.argv[1], sys.argv[2], outbox=sys.argv[3], heartbeat_s=0.1):
    time.sleep(60)
"""


def agent(folder: Path, name: str, url: str) -> Process:
    return python(folder, name, SLEEPER, name, url, str(folder / f"{name}.outbox"))


def test_an_agent_that_is_killed_is_degraded_then_dead_and_alive_when_it_is_back(
    valkey: ValkeyServer, em: ExecutionManager, tmp_path: Path
) -> None:
    client = valkey.client()
    with agent(tmp_path, "z", valkey.url) as process:
        eventually(lambda: changes(client) == ["z ALIVE"])
        process.kill()
        eventually(lambda: changes(client) == ["z ALIVE", "z DEGRADED", "z DEAD"])
    with agent(tmp_path, "z", valkey.url):
        eventually(lambda: changes(client)[-1] == "z ALIVE")
        eventually(lambda: record(client, "z")["state"] == "ALIVE")
    found = record(client, "z")
    assert (
        found["incarnation"] == beats(client, "z")[-1].incarnation and found["last_beat"] > found["since"] - 1
    )


def record(client: redis.Redis, name: str) -> dict[str, object]:
    raw = client.hget(streams.STATES, name)
    return msgpack.unpackb(raw) if raw else {"state": None}


def test_a_paused_bus_is_not_a_death(valkey: ValkeyServer, em: ExecutionManager, tmp_path: Path) -> None:
    client = valkey.client()
    with agent(tmp_path, "z", valkey.url), agent(tmp_path, "jay", valkey.url):
        eventually(lambda: sorted(changes(client)) == ["jay ALIVE", "z ALIVE"])
        valkey.freeze()
        time.sleep(3 * DEAD_AFTER_S)
        valkey.thaw()
        time.sleep(2 * DEAD_AFTER_S)
        assert not [change for change in changes(client) if "DEAD" in change]


def test_a_restarted_bus_is_not_a_death(valkey: ValkeyServer, em: ExecutionManager, tmp_path: Path) -> None:
    client = valkey.client()
    with agent(tmp_path, "z", valkey.url), agent(tmp_path, "jay", valkey.url):
        eventually(lambda: sorted(changes(client)) == ["jay ALIVE", "z ALIVE"])
        valkey.kill()
        time.sleep(2 * DEAD_AFTER_S)
        valkey.start()
        time.sleep(2 * DEAD_AFTER_S)
        assert not [change for change in changes(client) if "DEAD" in change]
        assert beats(client, "z")


def test_a_frozen_manager_kills_nobody_when_it_wakes_up(valkey: ValkeyServer, tmp_path: Path) -> None:
    client = valkey.client()
    set_fleet(client, "z")
    with em_bridge(tmp_path, "em", valkey.url, "em") as em, agent(tmp_path, "z", valkey.url) as process:
        eventually(lambda: changes(client) == ["z ALIVE"])
        em.process.send_signal(signal.SIGSTOP)
        time.sleep(2.5 * DEAD_AFTER_S)
        em.process.send_signal(signal.SIGCONT)
        time.sleep(1.5 * DEAD_AFTER_S)
        assert changes(client) == ["z ALIVE"]
        process.kill()
        eventually(lambda: changes(client)[-1] == "z DEAD")


def test_a_new_manager_reports_a_death_in_its_absence_and_repeats_nothing(
    valkey: ValkeyServer, tmp_path: Path
) -> None:
    client = valkey.client()
    set_fleet(client, "z", "jay", "never")
    with agent(tmp_path, "jay", valkey.url):
        with agent(tmp_path, "z", valkey.url), ExecutionManager(valkey.url):
            eventually(lambda: sorted(changes(client)) == ["jay ALIVE", "z ALIVE"])
        with ExecutionManager(valkey.url):
            eventually(lambda: changes(client)[2:] == ["z DEGRADED", "z DEAD"])
            time.sleep(1.5 * DEAD_AFTER_S)
        with ExecutionManager(valkey.url):
            time.sleep(2 * DEAD_AFTER_S)
    assert sorted(changes(client)[:2]) == ["jay ALIVE", "z ALIVE"]
    assert changes(client)[2:] == ["z DEGRADED", "z DEAD"]


def test_an_agent_outside_the_fleet_is_not_reported(
    valkey: ValkeyServer, em: ExecutionManager, tmp_path: Path
) -> None:
    client = valkey.client()
    with Agent("guest", valkey.url, outbox=tmp_path / "g", heartbeat_s=0.1):
        eventually(lambda: client.sismember(streams.SEEN, "guest"))
        time.sleep(0.5)
    time.sleep(1.5 * DEAD_AFTER_S)
    assert changes(client) == []


def test_a_deposed_monitor_publishes_nothing(valkey: ValkeyServer) -> None:
    client = valkey.client()
    old = Lease(client, "em", holder="old", ttl_s=0.05)
    epoch = old.acquire()
    assert epoch is not None
    monitor = Monitor(connect(valkey.url, retrying=False), epoch=epoch)
    monitor.step()
    time.sleep(0.1)
    assert Lease(client, "em", holder="new", ttl_s=60).acquire()
    with Pulse(client, "z", interval_s=0.05):
        time.sleep(0.2)
        with pytest.raises(LeaseLost):
            for _ in range(10):
                monitor.step()
                time.sleep(0.05)
    assert changes(client) == [] and client.hlen(streams.STATES) == 0


def test_an_invalid_heartbeat_does_not_stop_the_monitor(valkey: ValkeyServer, em: ExecutionManager) -> None:
    client = valkey.client()
    with Pulse(client, "z", interval_s=0.1):
        # What stood on the stream before the monitor began, it does not read.
        eventually(lambda: changes(client) == ["z ALIVE"])
        client.xadd(streams.HEARTBEATS, {b"type": b"heartbeat", b"body": b"\xc1"})
        for _ in range(5):
            client.xadd(streams.HEARTBEATS, {b"nonsense": b"\xff"})
        with Pulse(client, "jay", interval_s=0.1):
            eventually(lambda: changes(client) == ["z ALIVE", "jay ALIVE"])
    assert client.xlen(streams.DEAD_LETTER) == 2, "one for each reason, not one for each beat"


def test_a_status_other_than_ok_degrades(valkey: ValkeyServer, em: ExecutionManager, tmp_path: Path) -> None:
    client = valkey.client()
    with Agent("z", valkey.url, outbox=tmp_path / "z", heartbeat_s=0.1) as z:
        eventually(lambda: changes(client) == ["z ALIVE"])
        z.status = "overloaded"
        eventually(lambda: changes(client) == ["z ALIVE", "z DEGRADED"])
        z.status = "ok"
        eventually(lambda: changes(client) == ["z ALIVE", "z DEGRADED", "z ALIVE"])


def test_only_the_manager_that_leads_beats_as_em(valkey: ValkeyServer) -> None:
    with ExecutionManager(valkey.url, heartbeat_s=0.1) as one:
        assert one.wait_until_leading(5)
        with ExecutionManager(valkey.url, heartbeat_s=0.1):
            time.sleep(0.6)
    found = beats(valkey.client(), "em")
    assert len(found) > 4 and "em" not in " ".join(changes(valkey.client()))
    first = found[0].incarnation
    assert [beat.seq for beat in found if beat.incarnation == first] == list(
        range(sum(beat.incarnation == first for beat in found))
    )


# a program that knows nothing of us


def run(folder: Path, url: str, *arguments: str) -> Process:
    return Process(
        folder, "run", EM_BRIDGE, "run", "rick", "--heartbeat", "0.1", *arguments, env={"REDIS_URL": url}
    )


def test_a_foreign_program_beats_while_it_lives(valkey: ValkeyServer, tmp_path: Path) -> None:
    client = valkey.client()
    with run(tmp_path, valkey.url, "--", "sh", "-c", "echo $AGENT_ID $$; sleep 1; exit 7") as process:
        assert process.process.wait(10) == 7
    name, pid = process.lines()[0].split()
    found = beats(client, "rick")
    assert name == "rick" and len(found) >= 5 and {beat.pid for beat in found} == {int(pid)}


def test_a_stopped_program_does_not_beat(valkey: ValkeyServer, tmp_path: Path) -> None:
    client = valkey.client()
    with run(tmp_path, valkey.url, "--", "sleep", "60"):
        eventually(lambda: beats(client, "rick"))
        pid = beats(client, "rick")[0].pid
        assert pid
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.3)
        count = len(beats(client, "rick"))
        time.sleep(0.5)
        assert len(beats(client, "rick")) == count
        os.kill(pid, signal.SIGCONT)
        eventually(lambda: len(beats(client, "rick")) > count)


def test_a_program_beats_only_while_its_health_command_succeeds(valkey: ValkeyServer, tmp_path: Path) -> None:
    client = valkey.client()
    flag = tmp_path / "healthy"
    with run(tmp_path, valkey.url, "--health", f"test -e {flag}", "--", "sleep", "60"):
        time.sleep(0.8)
        assert beats(client, "rick") == []
        flag.touch()
        eventually(lambda: len(beats(client, "rick")) > 2)
        flag.unlink()
        time.sleep(0.4)
        count = len(beats(client, "rick"))
        time.sleep(0.5)
        assert len(beats(client, "rick")) == count


def test_signals_reach_the_program_and_its_end_is_ours(valkey: ValkeyServer, tmp_path: Path) -> None:
    script = "trap 'exit 5' TERM; trap 'exit 6' INT; echo ready; while :; do sleep 0.05; done"
    for number, code in ((signal.SIGTERM, 5), (signal.SIGINT, 6)):
        with run(tmp_path, valkey.url, "--", "sh", "-c", script) as process:
            eventually(lambda p=process, n=code - 4: len(p.lines()) == n)  # type: ignore[misc]
            assert process.end(number) == code
    with run(tmp_path, valkey.url, "--", "sh", "-c", "kill -9 $$") as process:
        assert process.process.wait(10) == 128 + 9


def test_the_program_dies_with_its_wrapper(valkey: ValkeyServer, tmp_path: Path) -> None:
    with run(tmp_path, valkey.url, "--", "sh", "-c", "echo $$; exec sleep 60") as process:
        eventually(process.lines)
        pid = int(process.lines()[0])
        process.kill()
        eventually(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text())


def test_a_program_runs_on_while_redis_is_away(tmp_path: Path) -> None:
    with run(
        tmp_path, f"redis://127.0.0.1:{free_port()}", "--", "sh", "-c", "sleep 0.5; echo done"
    ) as process:
        assert process.process.wait(10) == 0
    assert process.lines() == ["done"]
    assert process.err.read_text().count("cannot be reached") == 1, "one line a change of state"
