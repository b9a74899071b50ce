"""Children that are started again when they fall over, and end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from backup_worker.running.supervisor import LONGEST_PAUSE_S, STEADY_AFTER_S, Child, Supervisor
from tests.small_fleet import until


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
    }
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def program(text: str) -> list[str]:
    return [sys.executable, "-S", "-c", text]


def run_for(supervisor: Supervisor, seconds: float, *, tick_s: float = 0.02) -> None:
    threading.Timer(seconds, supervisor.request_stop).start()
    supervisor.run(tick_s=tick_s)


def test_a_child_that_ends_is_started_again(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    child = Child("one", program(f"open({str(marks)!r}, 'a').write('x')"))
    begun = time.monotonic()
    run_for(Supervisor([child]), 0.8, tick_s=30)
    # At once the first time; then after a second, which this test does not wait for. Nothing waits for a tick.
    assert marks.read_text() == "xx"
    assert time.monotonic() - begun < 5


def test_pauses_grow_up_to_a_limit_and_a_steady_child_is_forgiven() -> None:
    supervisor = Supervisor([])
    child = Child("one", program("pass"))
    now, pauses = 1000.0, []
    for _ in range(9):
        if child.process is None:
            child.start(now)
        assert child.process is not None
        child.process.wait()
        supervisor._keep(child, now + 1)
        pauses.append(child.due_at - now - 1)
        now = child.due_at
    assert pauses == [0, 2, 4, 8, 16, 30, 30, 30, LONGEST_PAUSE_S]
    child.start(now)
    assert child.process is not None
    child.process.wait()
    supervisor._keep(child, now + STEADY_AFTER_S)
    assert child.due_at == now + STEADY_AFTER_S


def test_a_child_that_cannot_be_started_ends_no_other_and_is_tried_again(tmp_path: Path) -> None:
    # As with no memory, process or descriptor left: one fork that failed used to end the whole service.
    missing = Child("missing", [str(tmp_path / "not-there")])
    living = Child("living", program("import time; time.sleep(60)"))
    supervisor = Supervisor([missing, living], grace_s=1)
    seen: list[bool] = []

    def look() -> None:
        seen.append(living.process is not None and living.process.poll() is None)
        if missing.failures > 1:
            supervisor.request_stop()

    threading.Timer(10, supervisor.request_stop).start()
    supervisor.run(tick_s=0.02, also=look)
    assert missing.failures == 2
    assert seen[-1]


def test_stopping_asks_first_and_kills_what_does_not_listen(tmp_path: Path) -> None:
    ready, polite = tmp_path / "ready", tmp_path / "polite"
    deaf = program(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"open({str(ready)!r}, 'w'); time.sleep(60)"
    )
    listening = program(
        "import signal, sys, time\n"
        f"def end(*_): open({str(polite)!r}, 'w'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); time.sleep(60)"
    )
    supervisor = Supervisor([Child("deaf", deaf), Child("listening", listening)], grace_s=0.3)
    threading.Timer(0.6, supervisor.request_stop).start()
    began = time.monotonic()
    supervisor.run(tick_s=0.02)
    assert ready.exists()
    assert polite.exists()
    assert time.monotonic() - began < 3
    assert all(child.process is None for child in supervisor.children)


def test_children_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    child = f"import os, time; open({str(pids)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from backup_worker.running.supervisor import Child, Supervisor;"
            f"Supervisor([Child('c', [sys.executable, '-S', '-c', {child!r}])]).run()",
        ]
    )
    until(lambda: pids.exists() and pids.read_text())
    below = psutil.Process(int(pids.read_text()))
    parent.kill()
    parent.wait()
    until(lambda: not below.is_running() or below.status() == psutil.STATUS_ZOMBIE, 3)


def test_what_is_kept_beside_the_children_is_asked_at_every_tick_and_its_failure_ends_them() -> None:
    asked: list[int] = []

    def keep() -> None:
        asked.append(1)
        if len(asked) > 3:
            raise RuntimeError("it cannot be kept")

    child = Child("one", program("import time; time.sleep(60)"))
    with pytest.raises(RuntimeError):
        Supervisor([child], grace_s=1).run(tick_s=0.05, also=keep)
    assert child.process is None


def test_ctrl_c_reaches_children_through_the_supervisor_alone() -> None:
    child = Child("one", program("import time; time.sleep(60)"))
    child.start(0.0)
    assert child.process is not None
    try:
        assert os.getpgid(child.process.pid) != os.getpgid(0)
    finally:
        child.process.kill()
        child.process.wait()
