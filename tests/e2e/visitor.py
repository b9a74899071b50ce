"""A person who logs in at the console with a browser."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from playwright.sync_api import Browser, Page, expect


def log_in(page: Page, password: str) -> None:
    """Fill in the form of the login on `page`, as kari, and wait for the fleet."""
    page.goto("/")
    page.get_by_label("Name").fill("kari")
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", name="Fleet")).to_be_visible()


@contextlib.contextmanager
def logged_in(browser: Browser, address: str, password: str, *, timeout_ms: float = 10_000) -> Iterator[Page]:
    """Give a page of the console at `address` on which kari is logged in."""
    context = browser.new_context(base_url=address, accept_downloads=True)
    context.set_default_timeout(timeout_ms)
    page = context.new_page()
    log_in(page, password)
    yield page
    context.close()
