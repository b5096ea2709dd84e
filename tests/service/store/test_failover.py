"""PostgreSQL is lost and its standby promoted under a server whose URL names both."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from adapters.database.glance import glance
from adapters.database.rows import MetaRow
from adapters.database.urls import checked_url
from adapters.store.transfer import transfer
from tests.service.http.test_api import error
from tests.service.store.test_outages import until, until_ready
from tests.support import databases, tiny
from tests.support.services import PostgresServer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")


@pytest.fixture
def pair() -> Iterator[tuple[PostgresServer, PostgresServer]]:
    """A primary, and a standby that has each change before it is acknowledged."""
    primary = PostgresServer()
    standby = primary.standby()
    yield primary, standby
    for one in (standby, primary):
        one.kill()


@pytest.fixture
def frozen(pair: tuple[PostgresServer, PostgresServer]) -> Iterator[list[psutil.Process]]:
    """Processes to end after the test."""
    stopped: list[psutil.Process] = []
    yield stopped
    for one in stopped:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


def both(*servers: PostgresServer) -> str:
    hosts = "&".join(f"host=127.0.0.1:{one.port}" for one in servers)
    return f"postgresql://loraplex@/postgres?{hosts}"


@pytest.mark.parametrize("how", ["killed", "silent"])
async def test_the_server_goes_over_to_the_promoted_standby(
    how: str, tmp_path: Path, pair: tuple[PostgresServer, PostgresServer], frozen: list[psutil.Process]
) -> None:
    """Killed, its port refuses; a machine that is gone says nothing, and its connections stay open."""
    primary, standby = pair
    url = both(primary, standby)
    async with fake_site(tmp_path, database_url=url, database_timeout=4.0) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        assert (await site.admin.post("/admin/v1/tenants", json={"id": "early"})).status_code == 201
        if how == "killed":
            primary.kill()
        else:
            frozen.extend(primary.freeze())
        await asyncio.to_thread(standby.promote)
        await until(lambda: site.admin.post("/admin/v1/tenants", json={"id": "late"}), 201)
        await until(lambda: site.chat(key, "hi", model="a", max_tokens=4), 200)
        await until_ready(site)
        listed = (await site.admin.get("/admin/v1/tenants")).json()["data"]
        assert {one["id"] for one in listed} == {"acme", "early", "late"}
    assert standby.ask("SELECT count(*) FROM tenants") == "3"


async def test_a_primary_that_became_a_standby_is_left(
    tmp_path: Path, pair: tuple[PostgresServer, PostgresServer]
) -> None:
    """As after a switchover: it takes connections and reads, and refuses every change."""
    primary, standby = pair
    async with fake_site(tmp_path, database_url=both(primary, standby), database_timeout=4.0) as site:
        assert (await site.admin.post("/admin/v1/tenants", json={"id": "early"})).status_code == 201
        await asyncio.to_thread(primary.ask, "ALTER SYSTEM SET default_transaction_read_only = on")
        await asyncio.to_thread(primary.ask, "SELECT pg_reload_conf()")
        refused = await site.admin.post("/admin/v1/tenants", json={"id": "none"})
        error(refused, 503, "database_unavailable")
        await asyncio.to_thread(standby.promote)
        await until(lambda: site.admin.post("/admin/v1/tenants", json={"id": "late"}), 201)
        await until_ready(site)
    assert standby.ask("SELECT count(*) FROM tenants") == "2"


async def test_a_restore_goes_to_the_promoted_standby_and_a_start_looks_there(
    tmp_path: Path, pair: tuple[PostgresServer, PostgresServer]
) -> None:
    """The first host takes connections, and no changes."""
    primary, standby = pair
    url = checked_url(both(primary, standby))
    async with databases.opened("sqlite", tmp_path) as source:
        async with source.write() as session:
            session.add(MetaRow(key="installation", value="here"))
        await asyncio.to_thread(primary.ask, "ALTER SYSTEM SET default_transaction_read_only = on")
        await asyncio.to_thread(primary.ask, "SELECT pg_reload_conf()")
        await asyncio.to_thread(standby.promote)
        await transfer(source.url, url)
    assert (await glance(url, "installation")).installation == "here"


async def test_a_start_looks_past_a_primary_that_says_nothing(
    pair: tuple[PostgresServer, PostgresServer],
    frozen: list[psutil.Process],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("adapters.database.glance.OPEN_CONNECT_TIMEOUT_S", 20.0)
    primary, standby = pair
    frozen.extend(primary.freeze())
    await asyncio.to_thread(standby.promote)
    seen = await glance(checked_url(both(primary, standby)), "installation")
    assert seen.revision is None
