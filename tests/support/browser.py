"""A real Chromium for tests of the console: the system's, as ``chromium`` or by LORAPLEX_TEST_CHROMIUM."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from playwright.async_api import ConsoleMessage, Page, Request, async_playwright, expect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str:
    """Its path; skips the test where there is none."""
    given = os.environ.get("LORAPLEX_TEST_CHROMIUM")
    found = given or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium here; install one, or name one in LORAPLEX_TEST_CHROMIUM")
    return found


@asynccontextmanager
async def browsing(url: str, *, elsewhere: tuple[str, ...] = (), **options: Any) -> AsyncIterator[Page]:
    """A page of a fresh profile; fails at its end if a script failed or anything went to another host, but
    to those that begin as ``elsewhere`` says."""
    faults: list[str] = []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox"], timeout=180_000
        )
        context = await browser.new_context(base_url=url, **options)
        page = await context.new_page()

        def said(line: ConsoleMessage) -> None:
            if "Content Security" in line.text:
                faults.append(line.text)

        def went(request: Request) -> None:
            if not request.url.startswith((url, "data:", *elsewhere)):
                faults.append(f"another host: {request.url}")

        page.on("pageerror", lambda error: faults.append(f"script: {error}"))
        page.on("console", said)
        page.on("request", went)
        # A busy machine draws slowly.
        page.set_default_timeout(120_000)
        expect.set_options(timeout=120_000)
        yield page
        await browser.close()
    assert faults == [], faults


@asynccontextmanager
async def loading(page: Page) -> AsyncIterator[None]:
    """Around what leads to another page, or to the same one anew; it is there at the end, script included.

    A link, a form, an action whose answer makes the page load itself: until then a test would read the old
    page, find nothing on an empty one, press a button that has no script yet, or have its own way to a page
    broken off by that one. What leads nowhere fails here after the page's own limit.
    """
    async with page.expect_event("framenavigated", lambda frame: frame == page.main_frame):
        yield
    await page.wait_for_load_state()


async def follow(page: Page, name: str, *, exact: bool = True) -> None:
    """Clicks the link of this name."""
    async with loading(page):
        await page.get_by_role("link", name=name, exact=exact).click()


async def sign_in(page: Page, key: str) -> None:
    await page.goto("/console")
    await page.get_by_label("Key").fill(key)
    async with loading(page):
        await page.get_by_role("button", name="Sign in").click()
    await page.get_by_role("button", name="Sign out").wait_for()
