"""A real browser for the tests that drive the console."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.tools import needs


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = needs(
        "chromium", "chromium-browser", "google-chrome", why="the console is driven in a real browser"
    )
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--headless"])
        yield started
        started.close()
