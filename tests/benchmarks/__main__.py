"""`python -m tests.benchmarks [--only NAME]… [--quick]`: figures side by side with peers, as Markdown on stdout."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.benchmarks import bus, console, ends, engine, parts, peers, per_file, recovery
from tests.benchmarks.measure import Settings, Table, machine, remove

BENCHMARKS: dict[str, Callable[[Settings], Iterator[Table]]] = {
    "small": engine.small,
    "medium": engine.medium,
    "large": engine.large,
    "one": engine.one,
    "growth": engine.growth,
    "per-file": per_file.costs,
    "startup": engine.startup,
    "publish": bus.publish,
    "route": bus.route,
    "replay": bus.replay,
    "dispatch": bus.dispatch,
    "ends": ends.ends,
    "kinds": ends.kinds,
    "restart": parts.restart,
    "latency": parts.latency,
    "idle": parts.idle,
    "waves": recovery.waves,
    "fleet": recovery.fleet_of_dead,
    "detection": recovery.detection,
    "killed": recovery.killed_worker,
    "console": console.pages,
}


def main() -> int:
    """Run the benchmarks; return 1 if one of them could not be carried out."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS)
    )
    parser.add_argument("--quick", action="store_true", help="less data, medians of 3 instead of 5")
    parser.add_argument(
        "--folder", type=Path, help="where the data are made (default: the system's temporary folder)"
    )
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="agent-backup-bench-", dir=options.folder))
    settings = Settings(quick=options.quick, folder=folder)
    programs, notes = peers.install()
    for line in (*machine(folder), *peers.versions(programs), *bus.versions(), *notes):
        print(f"- {line}", flush=True)
    print(f"- medians of {settings.runs}\n" + ("- quick: less data\n" if settings.quick else ""), flush=True)
    failed = 0
    try:
        for name in options.only or BENCHMARKS:
            begun = time.perf_counter()
            try:
                for table in BENCHMARKS[name](settings):
                    print(table, flush=True)
            except Exception:
                failed += 1
                print(f"### {name}: COULD NOT BE MEASURED\n", flush=True)
                traceback.print_exc()
            print(f"{name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    finally:
        remove(folder)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
