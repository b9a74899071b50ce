"""Run the suites one after the other and print how long each took: `python -m tests [SUITE…]`."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from em_bridge import clock

SUITES = ("unit", "integration", "faults", "e2e")
SIDE_BY_SIDE = {"integration": ("--numprocesses", "3", "--dist", "loadfile")}
"""Suites that mostly wait, each test on a server of its own: several files of them run at once."""

NO_TESTS_COLLECTED = 5


def main(wanted: list[str]) -> int:
    """Run `wanted` (default: all suites); return 0 only if every one passed and none was empty."""
    # A shell that starts us in the background has us ignore Ctrl-C, and so would every program that we start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    here = Path(__file__).parent
    results: list[tuple[str, int, float]] = []
    for suite in wanted or SUITES:
        print(f"\n── {suite} ──", flush=True)
        begun = clock.monotonic()
        command = [sys.executable, "-m", "pytest", str(here / suite), *SIDE_BY_SIDE.get(suite, ())]
        code = subprocess.run(command, check=False).returncode
        results.append((suite, code, clock.monotonic() - begun))
    print("\nsuite         result   seconds")
    for suite, code, seconds in results:
        word = {0: "passed", NO_TESTS_COLLECTED: "EMPTY"}.get(code, "FAILED")
        print(f"{suite:<13} {word:<8} {seconds:7.1f}")
    return int(any(code for _, code, _ in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
