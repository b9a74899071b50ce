"""How things are measured: contenders in turn, medians, ratios against a peer of the same run; and where.

A figure from another machine, or from another minute, says little; a ratio of two medians whose runs alternate
says which of the two is faster here. So no figure is printed without its peers.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

Phases = Mapping[str, float]
"""What one run took: phase -> seconds."""

OURS = "agent-backup"


class BenchError(Exception):
    """A measured program failed, so that its time means nothing."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line asked for; `folder` is scratch space that the caller removes."""

    quick: bool
    folder: Path

    @property
    def runs(self) -> int:
        """Runs of each contender, of which the median counts."""
        return 3 if self.quick else 5


def run(argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> float:
    """Run a program to its end; return its wall-clock seconds, from before its start to its exit."""
    with _started(argv, env, cwd) as (process, begun):
        output = process.communicate()[0]
        seconds = time.perf_counter() - begun
    _check(argv, process.returncode, output)
    return seconds


def _check(argv: Sequence[str], code: int, output: bytes) -> None:
    if code != 0:
        tail = output.decode(errors="replace").strip()[-600:]
        raise BenchError(f"{' '.join(argv[:4])} … ended with {code}: {tail}")


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for a measured program: ours, and Python programs may keep their compiled modules.

    Without those, each start compiles them anew, as no installed program does.
    """
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return inherited | dict(more or {})


@contextlib.contextmanager
def _started(argv: Sequence[str], env: Mapping[str, str] | None, cwd: Path | None):
    begun = time.perf_counter()
    process = subprocess.Popen(
        argv,
        env=environment(env),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        yield process, begun
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def peak_memory(argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> int:
    """Run a program, and return the most bytes (PSS: shared pages count once) that all its processes held at once.

    Sampled every 20 ms, which costs the program some time: never measure both in one run.
    """
    peak = 0
    with _started(argv, env, cwd) as (process, _):
        # Nobody may block on a full pipe while we only look.
        said: list[bytes] = []
        reader = threading.Thread(target=lambda: said.append(process.communicate()[0]), daemon=True)
        reader.start()
        tree = psutil.Process(process.pid)
        while reader.is_alive():
            with contextlib.suppress(psutil.Error, OSError):
                peak = max(peak, sum(_pss(p.pid) for p in [tree, *tree.children(recursive=True)]))
            time.sleep(0.02)
    _check(argv, process.returncode, said[0])
    return peak


def _pss(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(b"Pss:"))
    except (OSError, StopIteration):
        return 0


def in_turn(contenders: Mapping[str, Callable[[], Phases]], runs: int) -> dict[str, dict[str, list[float]]]:
    """Run A B C, B C A, C A B…; return phase -> contender -> seconds of each run."""
    results: dict[str, dict[str, list[float]]] = {}
    names = list(contenders)
    for number in range(runs):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            # What the last one left unwritten must not weigh on the next one.
            os.sync()
            for phase, seconds in contenders[name]().items():
                results.setdefault(phase, {}).setdefault(name, []).append(seconds)
    return {phase: {name: results[phase][name] for name in names} for phase in results}


@dataclass
class Table:
    """Rows of text under a title, printed as Markdown."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """Append one row."""
        self.rows.append(cells)

    def __str__(self) -> str:
        lines = [list(self.columns), *map(list, self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        head, *body = [
            "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines
        ]
        rule = "| " + " | ".join("-" * width for width in widths) + " |"
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([f"### {self.title}", "", head, rule, *body, *([""] if notes else []), *notes, ""])


def times_table(title: str, results: Mapping[str, Mapping[str, Sequence[float]]]) -> Table:
    """Return a table of seconds: one row a phase and contender, with how many times as fast as each we are."""
    table = Table(title, ("phase", "contender", "median s", "least to most s", f"{OURS} is … times as fast"))
    for phase, by_name in results.items():
        ours = statistics.median(by_name[OURS])
        for name, seconds in by_name.items():
            middle = statistics.median(seconds)
            spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
            ratio = "" if name == OURS else f"{middle / ours:.2f}"
            table.add(phase, name, f"{middle:.3f}", spread, ratio)
    return table


def rates_table(
    title: str, results: Mapping[str, Mapping[str, Sequence[float]]], counts: Mapping[str, int]
) -> Table:
    """Return a table of things a second: one row a phase and contender, with our share of each peer's rate."""
    table = Table(title, ("phase", "contender", "median /s", "least to most /s", f"{OURS} reaches"))
    for phase, by_name in results.items():
        ours = statistics.median(by_name[OURS])
        for name, seconds in by_name.items():
            middle, count = statistics.median(seconds), counts[phase]
            spread = f"{count / max(seconds):,.0f} to {count / min(seconds):,.0f}"
            ratio = "" if name == OURS else f"{middle / ours:.0%}"
            table.add(phase, name, f"{count / middle:,.0f}", spread, ratio)
    return table


def linear_fit(points: Iterable[tuple[float, float]]) -> tuple[float, float, float]:
    """Return intercept, slope and R² of the least-squares line through `points`."""
    xs, ys = zip(*points, strict=True)
    slope, intercept = statistics.linear_regression(xs, ys)
    return intercept, slope, statistics.correlation(xs, ys) ** 2


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` (0 to 1) of `values` do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def machine(folder: Path) -> list[str]:
    """Return what the figures depend on: date, processor, memory, kernel, file system."""
    now = datetime.datetime.now().astimezone().isoformat(timespec="minutes")
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    memory = psutil.virtual_memory().total / 2**30
    mounts = [line.split()[:3] for line in _lines("/proc/self/mounts")]
    below = [m for m in mounts if folder.resolve().is_relative_to(m[1])]
    kind = max(below, key=lambda mount: len(mount[1]))[2] if below else "?"
    return [
        f"date: {now}",
        f"processor: {model}, {os.cpu_count()} cores; load before: {os.getloadavg()[0]:.1f}",
        f"memory: {memory:.0f} GiB",
        f"kernel: {platform.system()} {platform.release()}; file system of the data: {kind}",
        f"Python {platform.python_version()}",
    ]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def remove(*paths: Path) -> None:
    """Remove folders, there or not."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
