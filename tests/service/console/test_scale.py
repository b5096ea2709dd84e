"""The console with 1,000 customers and 10,000 adapters: what its pages cost, and what five who look at it do.

In calls of functions, the client's included, which are the same on every machine. ``pytest -s`` prints them
and the processor time. With ``BROWSER=1`` a real Chromium opens each page too, and says after how long it
could be used, by the clock: for a machine with nothing else to do.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import AdaptedConnection, event
from sqlalchemy.pool import Pool

from tests.service.console.test_sign_in import browser
from tests.support import tiny
from tests.support.browser import browsing, sign_in
from tests.support.calls import counted
from tests.support.site import ADMIN_KEY, Site
from tests.support.tiny import fake_site

PAGES = (
    "/", "/fleet/live", "/customers", "/customers?q=t99", "/customers/t5", "/customers/t5/adapters/a5",
    "/adapters", "/adapters?q=a7", "/requests", "/usage", "/audit", "/playground",
)  # fmt: skip
EACH = 1000  # instructions
EVERY_S = 2.0  # how often one looks


def copies(database: sqlite3.Connection, table: str, most: int, where: str, **columns: str) -> None:
    """``most`` copies of a row, with these columns of their own, by number ``i``."""
    names = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
    values = ", ".join(columns.get(name, name) for name in names)
    counted = f"WITH RECURSIVE k(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM k WHERE i < {most})"
    database.execute(
        f"{counted} INSERT INTO {table} ({', '.join(names)}) SELECT {values} FROM {table}, k {where}"
    )


def seed(file: Path) -> None:
    with sqlite3.connect(file) as database:
        own = "WHERE tenant = 't0' AND {} = 'a0'"
        copies(database, "tenants", 999, "WHERE id = 't0'", id="'t' || i", cache_salt="cache_salt || i")
        copies(database, "adapters", 9, own.format("name"), name="'a' || i", is_default="0")
        copies(database, "versions", 9, own.format("adapter"), adapter="'a' || i")
        for table in ("adapters", "versions"):
            copies(database, table, 999, "WHERE tenant = 't0'", tenant="'t' || i")
        assert database.execute("SELECT count(*) FROM versions").fetchone() == (10_000,)
    database.close()


async def opened(site: Site) -> None:
    """Each page in a browser: milliseconds until it is drawn and its script has run."""
    async with browsing(site.url) as page:
        await sign_in(page, ADMIN_KEY)
        for path in PAGES:
            if path == "/fleet/live":
                continue
            await page.goto(f"/console{path}", wait_until="load")
            took = await page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
            print(f"{path} in a browser: {took:.0f} ms")
            assert took < 1000, path


@contextmanager
def counted_statements() -> Iterator[Callable[[], int]]:
    """How many instructions SQLite's own machine has run so far, for connections that are opened meanwhile.

    They run in another thread, where ``counted`` sees nothing.
    """
    ran = 0

    def count() -> None:
        nonlocal ran
        ran += EACH

    def opened(connection: object, _: object) -> None:
        if isinstance(connection, AdaptedConnection):  # migrations have one of another kind
            connection.run_async(lambda made: made.set_progress_handler(count, EACH))

    event.listen(Pool, "connect", opened)
    try:
        yield lambda: ran
    finally:
        event.remove(Pool, "connect", opened)


async def test_pages_of_very_many_are_quick_and_looking_costs_little(tmp_path: Path) -> None:
    async with fake_site(tmp_path) as site:
        await site.tenant("t0", {"a0": tiny.adapter(1)})
    await asyncio.to_thread(seed, tmp_path / "loraplex.db")
    with counted_statements() as instructions:
        await looked_at(tmp_path, instructions)


async def looked_at(tmp_path: Path, instructions: Callable[[], int]) -> None:
    async with fake_site(tmp_path) as site, browser(site, ADMIN_KEY) as client:
        for page in PAGES:
            began, before = time.process_time(), instructions()
            with counted() as calls:
                answer = await client.get(f"/console{page}")
            took = time.process_time() - began
            ran = instructions() - before
            size = len(answer.content) >> 10
            print(f"{page}: {took * 1000:.0f} ms, {calls.count} calls, {ran} of SQLite's, {size} KiB")
            assert answer.status_code == 200, page
            assert calls.count < 600_000, page
            assert ran < 500_000, page
            assert len(answer.content) < 100 << 10, page

        if os.environ.get("BROWSER"):
            await opened(site)

        async def look() -> None:
            await client.get("/console/fleet/live", headers={"X-Fragment": "1"})
            await asyncio.sleep(EVERY_S)

        began = time.process_time()
        with counted() as calls:
            await asyncio.gather(*(look() for _ in range(5)))
        share = (time.process_time() - began) / EVERY_S
        print(f"five who look at Fleet: {share:.1%} of a core, {calls.count} calls")
        assert calls.count < 150_000
