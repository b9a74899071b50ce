"""Programs that some tests need beside Python: `make test` does without them, `.ci/run` installs them and insists."""

from __future__ import annotations

import os
import shutil

import pytest


def needs(*programs: str, why: str) -> str:
    """Return the path of the first of `programs` that is installed.

    If none is, the test is skipped with the reason; under `CI` it fails instead, so that nothing is left out unseen.
    """
    for program in programs:
        if path := shutil.which(program):
            return path
    message = f"{' or '.join(programs)} is not installed: {why}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
