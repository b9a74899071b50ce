"""The snapshot engine against restic, borg, rsync and `cp -a`: whole commands, from their start to their exit.

What each does is not the same, and the tables cannot show it: our backup syncs, reads everything back from the disk and
judges it; so does our restore. restic encrypts, restic and borg compress and find duplicates; both sync. rsync and
`cp -a` do none of it, and leave the writing to the kernel, which is why `cp -a` also runs with a sync behind it. The
bare loop syncs and reads back what it copies, and does nothing else: no program in Python that does so is much faster.

Each run gets folders of its own, and small files are removed only at the very end: for minutes after a removal ext4
searches long for inodes that were not in use just now, and whoever comes next would pay for it.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Protocol

from tests.benchmarks import data, peers
from tests.benchmarks.measure import (
    OURS,
    BenchError,
    Settings,
    Table,
    in_turn,
    linear_fit,
    peak_memory,
    remove,
    run,
    times_table,
)

TIERS: dict[str, object] = {
    "daily": {"cron": "0 7 * * *", "include": ["*"], "slot": "%Y-%m-%d", "keep": 30, "unchanged": "link"}
}
BARE = "bare loop"
PHASES = FULL, AGAIN, RESTORE = "full", "unchanged again", "restore"

Command = tuple[list[str], Path | None, Mapping[str, str]]


class Contender(Protocol):
    """One program with a repository of its own below its folder."""

    def prepare(self) -> None:
        """Make an empty repository; not timed."""

    def command(self, phase: str) -> Command:
        """Return the arguments, the working directory and the environment for a phase."""


class Ours:
    """`backup-worker`, without Redis."""

    def __init__(self, folder: Path, fleet: data.Fleet) -> None:
        self.folder, self.fleet = folder, fleet
        self.config = data.write_config(folder, fleet, tiers=TIERS)

    def prepare(self) -> None:
        """Nothing: the first backup makes the repository."""

    def command(self, phase: str) -> Command:
        """Return the command; the second backup shares unchanged files and re-reads them all."""
        program = [sys.executable, "-m", "backup_worker"]
        rest = {"BACKUP_CONFIG": str(self.config)}
        if phase == RESTORE:
            target = str(self.folder / "restored")
            return [*program, "restore", *self.fleet.agents, "--to", target], None, rest
        return [*program, "backup", "--tier", "daily"], None, rest


class Restic:
    """restic with a local repository and its defaults."""

    def __init__(self, folder: Path, fleet: data.Fleet) -> None:
        self.folder, self.fleet = folder, fleet
        self.env = {
            "RESTIC_REPOSITORY": str(folder / "repository"),
            "RESTIC_PASSWORD": "benchmark",
            "RESTIC_CACHE_DIR": str(folder / "cache"),
        }

    def prepare(self) -> None:
        """Make a repository."""
        run(["restic", "init"], env=self.env)

    def command(self, phase: str) -> Command:
        """Return the command."""
        if phase == RESTORE:
            return ["restic", "restore", "latest", "--target", str(self.folder / "restored")], None, self.env
        return ["restic", "backup", "."], self.fleet.root, self.env


class Borg:
    """borg without encryption, otherwise with its defaults."""

    def __init__(self, folder: Path, fleet: data.Fleet) -> None:
        self.folder, self.fleet = folder, fleet
        self.env = {
            "BORG_REPO": str(folder / "repository"),
            "BORG_BASE_DIR": str(folder / "base"),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }

    def prepare(self) -> None:
        """Make a repository."""
        (self.folder / "restored").mkdir(parents=True)
        run(["borg", "init", "--encryption", "none"], env=self.env)

    def command(self, phase: str) -> Command:
        """Return the command."""
        if phase == RESTORE:
            return ["borg", "extract", f"::{FULL}"], self.folder / "restored", self.env
        return ["borg", "create", f"::{phase.replace(' ', '-')}", "."], self.fleet.root, self.env


class Rsync:
    """rsync into a folder; the second run makes a folder of hard links to the first."""

    def __init__(self, folder: Path, fleet: data.Fleet) -> None:
        self.folder, self.fleet = folder, fleet

    def prepare(self) -> None:
        """Make the folder above the copies."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def command(self, phase: str) -> Command:
        """Return the command."""
        first, second = self.folder / "first", self.folder / "second"
        restored = self.folder / "restored"
        argv = {
            FULL: [f"{self.fleet.root}/", str(first)],
            AGAIN: [f"--link-dest={first}", f"{self.fleet.root}/", str(second)],
            RESTORE: [f"{first}/", str(restored)],
        }[phase]
        return ["rsync", "-a", *argv], None, {}


class Copy:
    """`cp -a`, with or without waiting for the disk; the second run copies everything a second time."""

    def __init__(self, folder: Path, fleet: data.Fleet, *, sync: bool) -> None:
        self.folder, self.fleet, self.sync = folder, fleet, sync

    def prepare(self) -> None:
        """Make the folder above the copies."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def command(self, phase: str) -> Command:
        """Return the command."""
        first, second = str(self.folder / "first"), str(self.folder / "second")
        source, target = {
            FULL: (str(self.fleet.root), first),
            AGAIN: (str(self.fleet.root), second),
            RESTORE: (first, str(self.folder / "restored")),
        }[phase]
        if self.sync:
            return ["sh", "-c", 'cp -a "$0" "$1" && sync -f "$1"', source, target], None, {}
        return ["cp", "-a", source, target], None, {}


class BareLoop:
    """The same system calls for each file, in as many processes, in a straight line of Python."""

    def __init__(self, folder: Path, fleet: data.Fleet) -> None:
        self.folder, self.fleet = folder, fleet

    def prepare(self) -> None:
        """Make the folder above the copies."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def command(self, phase: str) -> Command:
        """Return the command."""
        first = str(self.folder / "first")
        words = {
            FULL: [str(self.fleet.root), first],
            AGAIN: [str(self.fleet.root), str(self.folder / "second"), first],
            RESTORE: [first, str(self.folder / "restored")],
        }[phase]
        return [sys.executable, "-m", "tests.benchmarks.bare_files", *words], None, {}


Makers = Mapping[str, Callable[[Path, data.Fleet], Contender]]


def makers(programs: Sequence[str]) -> Makers:
    """Return what makes each contender that is there, ours first."""
    known: Makers = {"restic": Restic, "borg": Borg, "rsync": Rsync}
    return {
        OURS: Ours,
        **{program: known[program] for program in programs},
        "cp -a": partial(Copy, sync=False),
        "cp -a + sync": partial(Copy, sync=True),
        BARE: BareLoop,
    }


def lifecycles(
    folder: Path, fleet: data.Fleet, made: Makers, phases: Sequence[str], *, keep: bool
) -> dict[str, Callable[[], Mapping[str, float]]]:
    """Return for each contender what runs the phases once, in a new folder of its own."""
    numbers = count()

    def live(name: str) -> Mapping[str, float]:
        place = folder / f"{next(numbers)}"
        contender = made[name](place, fleet)
        contender.prepare()
        took = {}
        for phase in phases:
            os.sync()
            argv, cwd, env = contender.command(phase)
            took[phase] = run(argv, cwd=cwd, env=env)
        if not keep:
            remove(place)
        return took

    return {name: partial(live, name) for name in made}


def compare(settings: Settings, fleet: data.Fleet, programs: Sequence[str], *, keep: bool) -> Iterator[Table]:
    """Yield the times of full, unchanged again and restore, and the memory and processor time of each."""
    folder = settings.folder / f"contenders-{fleet.root.name}"
    # The bare loop holds whole files in memory: it is made for small ones.
    made = {name: make for name, make in makers(programs).items() if keep or name != BARE}
    _check_space(settings.folder, fleet, settings.runs if keep else 1)
    yield times_table(fleet.title, in_turn(lifecycles(folder, fleet, made, PHASES, keep=keep), settings.runs))
    yield from _costs(folder / "costs", fleet, made)
    if not keep:
        remove(folder)


def _check_space(folder: Path, fleet: data.Fleet, runs: int) -> None:
    # The last block of a file is partly empty; a run makes about a dozen copies, and so does measuring the memory.
    copies = 13 * (runs + 1)
    needed, free = (fleet.bytes + fleet.files * 4096) * copies, shutil.disk_usage(folder).free
    if free < needed:
        raise BenchError(
            f"{needed / 1e9:.0f} GB are needed in “{folder}”, and {free / 1e9:.0f} are free: use --folder"
        )
    names, left = fleet.files * 5 // 4 * copies, os.statvfs(folder).f_favail
    # Some file systems have no fixed number of inodes, and say 0.
    if 0 < left < names:
        raise BenchError(f"{names:,} inodes are needed in “{folder}”, and {left:,} are free: use --folder")


def _costs(folder: Path, fleet: data.Fleet, made: Makers) -> Iterator[Table]:
    memory = Table(f"Most memory of all processes together, {fleet.title} (MB)", ("contender", *PHASES))
    processor = Table(f"Processor seconds, user + system, {fleet.title}", ("contender", *PHASES))
    for name, make in made.items():
        contender = make(folder / name, fleet)
        contender.prepare()
        peaks, spent = [], []
        for phase in PHASES:
            argv, cwd, env = contender.command(phase)
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            peaks.append(peak_memory(argv, cwd=cwd, env=env))
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent.append((after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime))
        memory.add(name, *(f"{peak / 1e6:.0f}" for peak in peaks))
        processor.add(name, *(f"{user:.2f} + {system:.2f}" for user, system in spent))
    memory.notes.append("the page cache is not counted; one run, sampled every 20 ms")
    processor.notes.append(
        "of the same run; other programs on the machine disturb this less than they do the clock"
    )
    yield memory
    yield processor


def small(settings: Settings) -> Iterator[Table]:
    """1,000 agents with 52 files each."""
    agents = 100 if settings.quick else 1000
    root = settings.folder / "small"
    fleet = data.make_small_files(root, agents=agents, files=52, mean_bytes=6500)
    yield from _against_all(settings, fleet, keep=True)


def medium(settings: Settings) -> Iterator[Table]:
    """4 agents with 300 files each."""
    root = settings.folder / "medium"
    fleet = data.make_small_files(root, agents=4, files=300, mean_bytes=26_000)
    yield from _against_all(settings, fleet, keep=True)


def large(settings: Settings) -> Iterator[Table]:
    """4 agents with 256 MiB each."""
    size = 32 << 20 if settings.quick else 256 << 20
    fleet = data.make_large_files(settings.folder / "large", agents=4, size_bytes=size)
    yield from _against_all(settings, fleet, keep=False)
    remove(fleet.root)


def one(settings: Settings) -> Iterator[Table]:
    """One agent with 52,000 files: what a single one takes of memory and of the processors."""
    files = 5_200 if settings.quick else 52_000
    fleet = data.make_small_files(settings.folder / "one", agents=1, files=files, mean_bytes=2000)
    programs, notes = peers.install()
    time.sleep(data.REST_S)
    yield from _noted(_costs(settings.folder / "one-costs", fleet, makers(programs)), notes)


def _against_all(settings: Settings, fleet: data.Fleet, *, keep: bool) -> Iterator[Table]:
    programs, notes = peers.install()
    yield from _noted(compare(settings, fleet, programs, keep=keep), notes)


def _noted(tables: Iterator[Table], notes: list[str]) -> Iterator[Table]:
    for table in tables:
        table.notes += notes
        yield table


def growth(settings: Settings) -> Iterator[Table]:
    """One agent with 1,000 to 100,000 files, beside `cp -a` with a sync."""
    sizes = (1_000, 3_000, 10_000) if settings.quick else (1_000, 3_000, 10_000, 30_000, 100_000)
    table = Table(
        "Growth with the number of files of one agent (2 kB each), full backup",
        ("files", f"{OURS} s", "cp -a + sync s", f"{OURS} is … times as fast"),
    )
    points: dict[str, list[tuple[float, float]]] = {}
    made = {name: make for name, make in makers(()).items() if name in (OURS, "cp -a + sync")}
    for size in sizes:
        root = settings.folder / f"growth-{size}"
        fleet = data.make_small_files(root, agents=1, files=size, mean_bytes=2000)
        runs = lifecycles(settings.folder / f"grown-{size}", fleet, made, (FULL,), keep=True)
        medians = {name: statistics.median(all_) for name, all_ in in_turn(runs, 3)[FULL].items()}
        for name, seconds in medians.items():
            points.setdefault(name, []).append((size, seconds))
        mine, theirs = medians[OURS], medians["cp -a + sync"]
        table.add(f"{size:,}", f"{mine:.3f}", f"{theirs:.3f}", f"{theirs / mine:.2f}")
    for name, line in points.items():
        start, slope, r2 = linear_fit(line)
        table.notes.append(f"{name}: {start:.2f} s + {slope * 1e6:.0f} µs a file, R² = {r2:.4f}")
    yield table


def startup(settings: Settings) -> Iterator[Table]:
    """`backup-worker list` with a few snapshots, beside the lists of the peers and a bare interpreter."""
    programs, notes = peers.install()
    fleet = data.make_small_files(settings.folder / "listed", agents=4, files=52, mean_bytes=2000)
    made = makers([program for program in programs if program != "rsync"])
    lists: dict[str, Callable[[], Mapping[str, float]]] = {}
    for name, words in (
        (OURS, [sys.executable, "-m", "backup_worker", "list"]),
        ("restic", ["restic", "snapshots"]),
        ("borg", ["borg", "list"]),
    ):
        if name in made:
            contender = made[name](settings.folder / f"listing-{name}", fleet)
            contender.prepare()
            argv, cwd, env = contender.command(FULL)
            run(argv, cwd=cwd, env=env)
            lists[name] = partial(_timed_list, words, env)
    lists["python -c pass"] = partial(_timed_list, [sys.executable, "-c", "pass"], {})
    for warm_up in lists.values():
        warm_up()
    table = times_table("Start-up: a list of 4 snapshots", in_turn(lists, settings.runs * 2))
    yield from _noted(iter([table]), [*notes, "aim: below 0.3 s"])


def _timed_list(words: list[str], env: Mapping[str, str]) -> Mapping[str, float]:
    return {"list": run(words, env=env)}
