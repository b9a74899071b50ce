"""Run the suites one after the other and print how long each took: `python -m tests [SUITE…]`.

Some suites wait for many real processes, and a busy machine can starve one of them. What fails there is run once more,
alone; if it passes then, the suite passes, and the table says which tests had to be repeated. The units and the faults
are never repeated: a promise that is broken once is broken.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

from em_bridge import clock

SUITES = ("unit", "integration", "faults", "e2e")
SIDE_BY_SIDE = {"integration": ("--numprocesses", "3", "--dist", "loadfile")}
"""Suites that mostly wait, each test on a server of its own: several files of them run at once."""

REPEATABLE = ("integration", "e2e")

TESTS_FAILED, NO_TESTS_COLLECTED = 1, 5
MOST_REPEATED = 5
"""More failures than this are no accident, and are not repeated."""


def pytest(*arguments: str) -> tuple[int, list[str]]:
    """Run pytest, passing its output on; return its exit code and the names of the tests that failed."""
    failed: list[str] = []
    command = [sys.executable, "-m", "pytest", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := re.match(r"(?:FAILED|ERROR) (tests/\S+?::.*?)(?: - .*)?$", line):
                failed.append(found[1])
    return process.returncode, failed


def run(suite: str) -> tuple[int, list[str]]:
    """Run one suite; return its exit code and the tests that passed only when they were repeated."""
    folder = Path(__file__).parent / suite
    code, failed = pytest(str(folder), *SIDE_BY_SIDE.get(suite, ()))
    if suite not in REPEATABLE or code != TESTS_FAILED or not 0 < len(failed) <= MOST_REPEATED:
        return code, []
    print(f"\n── {suite}: {len(failed)} once more, alone ──", flush=True)
    return pytest(str(folder), "--last-failed")[0], failed


def main(wanted: list[str]) -> int:
    """Run `wanted` (default: all suites); return 0 only if every one passed and none was empty."""
    # A shell that starts us in the background has us ignore Ctrl-C, and so would every program that we start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    results: list[tuple[str, int, list[str], float]] = []
    for suite in wanted or SUITES:
        print(f"\n── {suite} ──", flush=True)
        begun = clock.monotonic()
        results.append((suite, *run(suite), clock.monotonic() - begun))
    print("\nsuite         result   seconds")
    for suite, code, repeated, seconds in results:
        word = {0: "passed", NO_TESTS_COLLECTED: "EMPTY"}.get(code, "FAILED")
        print(f"{suite:<13} {word:<8} {seconds:7.1f}")
        for name in repeated:
            print(f"    repeated: {name}")
    return int(any(code for _, code, _, _ in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
