"""What one small file costs in processor time, beside the bare loop: one process, its start not counted.

Processor time says less than the clock, but it says it also on a machine that has other things to do. The least of all
runs counts, because disturbances only ever add. `python -m tests.benchmarks.per_file ours|bare FLEET FOLDER`: one run.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.benchmarks import bare_files, data
from tests.benchmarks.measure import OURS, Settings, Table, environment

FULL, AGAIN = "full", "unchanged again"


def _ours(root: Path, folder: Path) -> Iterator[Callable[[], None]]:
    from backup_worker.snapshots import AgentFiles, Repository
    from backup_worker.snapshots.take import taking
    from backup_worker.snapshots.together import together

    repo = Repository(folder)
    for slot in (FULL, AGAIN):

        def back_up(slot: str = slot.replace(" ", "-")) -> None:
            works = (
                (
                    number,
                    taking(
                        repo, AgentFiles(name, root / name, data.CLASSES, ["SOUL.md"]), tier="daily", slot=slot,
                        include=["*"], unchanged="link", now=time.time(), reason="benchmark",
                    ),
                )
                for number, name in enumerate(sorted(os.listdir(root)))
            )  # fmt: skip
            for outcome in together(works):
                if outcome.error:
                    raise outcome.error

        yield back_up


def _bare(root: Path, folder: Path) -> Iterator[Callable[[], None]]:
    agents = sorted(os.listdir(root))
    first, second = str(folder / "first"), str(folder / "second")
    os.makedirs(first)
    yield lambda: bare_files.work(0, agents, str(root), first, None)
    os.makedirs(second)
    yield lambda: bare_files.work(0, agents, str(root), second, first)


def _spent(work: Callable[[], None]) -> tuple[float, float]:
    before = resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime


def costs(settings: Settings) -> Iterator[Table]:
    """Yield the microseconds of processor time that each file costs."""
    agents = 50 if settings.quick else 200
    fleet = data.make_small_files(settings.folder / "per-file", agents=agents, files=52, mean_bytes=6500)
    time.sleep(data.REST_S)
    least: dict[tuple[str, str], tuple[float, float]] = {}
    for number in range(settings.runs):
        for name in ("ours", "bare"):
            folder = settings.folder / f"per-file-{name}-{number}"
            argv = [sys.executable, "-m", "tests.benchmarks.per_file", name, str(fleet.root), str(folder)]
            done = subprocess.run(argv, env=environment(), stdout=subprocess.PIPE, check=True)
            for phase, (user, system) in json.loads(done.stdout).items():
                known = least.get((phase, name), (user, system))
                least[phase, name] = min(user, known[0]), min(system, known[1])
    table = Table(
        f"Processor time a file, {fleet.title}, one process",
        ("phase", "contender", "user µs", "system µs", f"{OURS} costs … times as much"),
    )
    for phase in (FULL, AGAIN):
        ours = sum(least[phase, "ours"])
        for name, title in (("ours", OURS), ("bare", "bare loop")):
            user, system = (seconds / fleet.files * 1e6 for seconds in least[phase, name])
            ratio = "" if name == "ours" else f"{ours / sum(least[phase, name]):.1f}"
            table.add(phase, title, f"{user:.0f}", f"{system:.0f}", ratio)
    table.notes.append("the least of all runs; the bare loop judges nothing and writes no manifest")
    yield table


if __name__ == "__main__":
    _, wanted, fleet_root, place = sys.argv
    # As in the processes that share a fleet out.
    gc.disable()
    works = {"ours": _ours, "bare": _bare}[wanted](Path(fleet_root), Path(place))
    print(json.dumps({phase: _spent(work) for phase, work in zip((FULL, AGAIN), works, strict=True)}))
