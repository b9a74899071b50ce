"""The programs that we are compared with; those that are missing are installed from Debian's packages."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

PACKAGES = {"restic": "restic", "borg": "borgbackup", "rsync": "rsync"}
VERSION = {
    "restic": ("restic", "version"),
    "borg": ("borg", "--version"),
    "rsync": ("rsync", "--version"),
    "cp": ("cp", "--version"),
}


def install() -> tuple[list[str], list[str]]:
    """Install what is missing; return the programs that are there, and what to say about those that are not."""
    missing = [program for program in PACKAGES if shutil.which(program) is None]
    complaint = _apt_get([PACKAGES[program] for program in missing]) if missing else ""
    absent = [program for program in PACKAGES if shutil.which(program) is None]
    notes = [f"{program} is missing from every table: {complaint}" for program in absent]
    return [program for program in PACKAGES if program not in absent], notes


def _apt_get(packages: Sequence[str]) -> str:
    """Install Debian packages; return why that was not possible, or nothing."""
    by_hand = f"install it by hand: apt-get install {' '.join(packages)}"
    if shutil.which("apt-get") is None:
        return f"this is no Debian; {by_hand}"
    if os.geteuid() != 0:
        return f"installing needs root; {by_hand}"
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for argv in (
        ["apt-get", "update", "-q"],
        ["apt-get", "install", "-qy", "--no-install-recommends", *packages],
    ):
        done = subprocess.run(argv, env=quiet, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            return f"`{' '.join(argv[:2])}` failed ({last}); {by_hand}"
    return ""


def versions(programs: Sequence[str]) -> list[str]:
    """Return the first line of what each program says about its version."""
    return [
        subprocess.run(VERSION[program], capture_output=True, text=True, check=False).stdout.splitlines()[0]
        for program in (*programs, "cp")
    ]
