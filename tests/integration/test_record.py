"""The record under a full disk and under kills, on a real server and with real processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backup_worker.history import History, kept
from tests.integration.conftest import ValkeyServer
from tests.living_fleet import Fleet
from tests.small_disk import fill, small_disk
from tests.small_fleet import SmallFleet

pytestmark = pytest.mark.valkey

WRITER = """
import sys
from pathlib import Path
from backup_worker.config import load
from backup_worker.runtime import Runtime
from em_bridge.connection import connect
runtime = Runtime(load(Path(sys.argv[1])), connect(sys.argv[2]))
for number in range(int(sys.argv[4])):
    runtime.record("recovery", agent=sys.argv[3], number=number)
"""


@pytest.fixture
def fleet(tmp_path: Path, valkey: ValkeyServer) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, valkey.url)
    yield fleet
    fleet.close()


def test_a_recovery_goes_its_way_while_the_record_cannot_be_written(fleet: Fleet) -> None:
    fleet.add("z")
    fleet.backup("z")
    record = fleet.runtime.history.path
    before = len(list(fleet.runtime.history.read()))
    record.rename(record.with_name("safe"))
    record.mkdir()
    incident = fleet.recover("z")
    assert incident.state == "recovered"
    waiting = kept.waiting(fleet.client)
    assert waiting >= len(incident.steps)
    record.rmdir()
    record.with_name("safe").rename(record)
    assert kept.write(fleet.client, fleet.runtime.history, time.time()) == waiting
    report = fleet.runtime.history.verify()
    assert (report.ok, report.lines) == (True, before + waiting)
    steps = [line["step"] for line in fleet.history("recovery")]
    assert steps == [*(step.step for step in incident.steps), "recovered"]


def test_a_recovery_goes_its_way_while_the_disk_of_the_record_is_really_full(
    fleet: Fleet, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "small", "128k") as disk:
        file = tmp_path / "config" / "backup_schedule.json"
        document = json.loads(file.read_text())
        file.write_text(json.dumps(document | {"history": str(disk / "system-history.jsonl")}))
        fleet.add("z")
        fleet.backup("z")
        record = fleet.runtime.history
        while record.path.stat().st_size % 4096 < 3600:
            record.append("prune", now=1.0, id="weekly/2026-W48/z")
        filler = fill(disk)
        # Room is left for a line or two, and for a part of the next one.
        incident = fleet.recover("z")
        assert incident.state == "recovered"
        waiting = kept.waiting(fleet.client)
        assert waiting > 0
        assert kept.write(fleet.client, record, time.time()) == 0
        filler.unlink()
        assert kept.write(fleet.client, record, time.time()) == waiting
        report = record.verify()
        assert report.ok, report.problem
        steps = [line["step"] for line in fleet.history("recovery")]
        assert steps == [*(step.step for step in incident.steps), "recovered"]


def test_many_processes_on_a_full_disk_lose_no_line_and_keep_their_order(
    tmp_path: Path, valkey: ValkeyServer
) -> None:
    fleet = SmallFleet(tmp_path)
    record = tmp_path / "history.jsonl"
    record.mkdir()

    def start(name: str, count: int) -> subprocess.Popen[bytes]:
        words: list[str | Path] = [
            sys.executable,
            "-c",
            WRITER,
            fleet.config_dir,
            valkey.url,
            name,
            str(count),
        ]
        return subprocess.Popen(words, stderr=subprocess.DEVNULL)

    writers = [start(name, 60) for name in ("a", "b", "c")]
    client = valkey.client()
    while kept.waiting(client) < 30:
        time.sleep(0.01)
    record.rmdir()
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    kept.write(client, History(record), time.time())
    assert History(record).verify().lines == 180
    for name in ("a", "b", "c"):
        assert [line["number"] for line in History(record).read(agent=name)] == list(range(60))


def test_writers_killed_while_files_are_put_aside_leave_one_sound_record(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from backup_worker.history import History\n"
        "h = History(Path(sys.argv[1]), max_bytes=4096)\n"
        "while True: print(h.append('backup', now=1.0, padding='x' * 1500)['seq'], flush=True)"
    )
    path, last = tmp_path / "system-history.jsonl", 0
    for round_ in range(6):
        writer = subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True)
        assert writer.stdout
        for _ in range(7 + round_ * 5):
            last = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        last = max([last, *(int(line) for line in writer.stdout.read().split())])
        writer.wait()
    history = History(path)
    history.append("restore", now=2.0)
    report = history.verify()
    assert report.ok
    assert report.lines > last
    assert len(list(tmp_path.glob("system-history.*.jsonl"))) > 20
