"""PostgreSQL is restarted, cut off or silent under a server: what is asked then and what is there after."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from sqlalchemy import make_url, select, text
from sqlalchemy.exc import TimeoutError as NoConnectionFree
from sqlalchemy.ext.asyncio import create_async_engine

from adapters.database import postgres as opening_postgres
from adapters.database.database import Database
from adapters.database.rows import MetaRow, UsageRow, now
from adapters.errors import DatabaseUnavailable
from server.accounts.usage import Usage, UsageWriter
from tests.service.http.test_api import error
from tests.support import databases, tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.proxy import Proxy, proxy
from tests.support.services import postgres
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")


@pytest.fixture
async def way(tmp_path: Path) -> AsyncIterator[tuple[str, Proxy]]:
    """The URL of a database behind a proxy, and the proxy."""
    async with databases.empty("postgres", tmp_path) as url:
        there = make_url(url)
        async with proxy(there.host or "", there.port or 5432) as between:
            yield there.set(port=between.port).render_as_string(hide_password=False), between


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Database]:
    database = Database(url, timeout=60.0)
    await database.open()
    yield database
    await database.close()


async def until_ready(site: Site) -> None:
    """Waits until the server says that it is."""
    async with asyncio.timeout(60):
        while (await site.http.get("/ready")).status_code != 200:
            await asyncio.sleep(0.05)


async def until(ask: Callable[[], Awaitable[httpx.Response]], status: int) -> None:
    """Asks again where the database did not answer in time, as of a machine that stands still."""
    async with asyncio.timeout(120):
        while (answer := await ask()).status_code != status:
            assert answer.status_code == 503, answer.text


async def test_a_restart_of_the_database_costs_nobody_an_answer(
    tmp_path: Path, way: tuple[str, Proxy]
) -> None:
    url, between = way
    async with fake_site(tmp_path, database_url=url) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        for number in range(5):
            between.drop()
            assert (await site.chat(key, "hi", model="a")).status_code == 200
            made = await site.admin.post("/admin/v1/tenants", json={"id": f"t{number}"})
            assert made.status_code == 201, made.text
            assert (await site.http.get("/ready")).status_code == 200


async def test_inference_goes_on_without_the_database_and_its_usage_is_kept(
    tmp_path: Path, way: tuple[str, Proxy]
) -> None:
    url, between = way
    slow = FakeEngine(tiny.base(), times=Times(step=0.02))
    async with fake_site(tmp_path, slow, database_url=url) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        assert (await site.chat(key, "hi", model="a", max_tokens=4)).status_code == 200
        body = {
            "model": "a",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 50,
            "stream": True,
        }
        async with site.http.stream("POST", "/v1/chat/completions", json=body, headers=bearer(key)) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            between.cut()
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert "error" not in "".join(rest)
        for _ in range(3):
            assert (await site.chat(key, "hi", model="a", max_tokens=4)).status_code == 200
        ready = await site.http.get("/ready")
        assert (ready.status_code, ready.json()["checks"]["engine"]) == (503, "ok")
        assert (await site.http.get("/health")).status_code == 200
        refused = await site.admin.post("/admin/v1/tenants", json={"id": "late"})
        error(refused, 503, "database_unavailable")
        assert int(refused.headers["Retry-After"]) >= 1
        error(await site.upload("acme", "b", tiny.adapter(2)), 503, "database_unavailable")
        strange = await site.http.get("/v1/models", headers=bearer("lp-nobody-has-this"))
        assert strange.status_code in (401, 503), "it cannot be told; but not a 500"
        await between.mend()
        await until_ready(site)
        assert (await site.admin.post("/admin/v1/tenants", json={"id": "late"})).status_code == 201
        assert (await site.upload("acme", "b", tiny.adapter(2))).status_code == 201
        await site.services.usage_writer.flush()
        used = (await site.admin.get("/admin/v1/usage?tenant=acme")).json()
        assert sum(row["requests"] for row in used["data"]) == 5, json.dumps(used)


async def test_a_database_that_says_nothing_hangs_nobody(tmp_path: Path, way: tuple[str, Proxy]) -> None:
    """As where its process is stopped, or a network swallows what is sent: no connection ends by itself."""
    url, between = way
    async with fake_site(tmp_path, database_url=url) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        assert (await site.chat(key, "hi", model="a", max_tokens=4)).status_code == 200
    async with fake_site(tmp_path, database_url=url, database_timeout=1.0) as site:
        await until(lambda: site.chat(key, "hi", model="a", max_tokens=4), 200)
        between.swallow()
        for _ in range(3):
            async with asyncio.timeout(120):
                assert (await site.chat(key, "hi", model="a", max_tokens=4)).status_code == 200
        alone = time.monotonic()
        error(await site.admin.get("/admin/v1/tenants?limit=8"), 503, "database_unavailable")
        alone = time.monotonic() - alone
        asked = [site.admin.post("/admin/v1/tenants", json={"id": f"t{number}"}) for number in range(8)]
        asked += [site.admin.get("/admin/v1/tenants?limit=7") for _ in range(24)]
        began = time.monotonic()
        for answer in await asyncio.gather(*asked, site.upload("acme", "b", tiny.adapter(2))):
            error(answer, 503, "database_unavailable")
            assert int(answer.headers["Retry-After"]) >= 1
        most = max(25, 0.6 * len(asked) * alone)
        assert time.monotonic() - began < most, "one after another they take longer than that"
        strange = await site.http.get("/v1/models", headers=bearer("lp-" + "x" * 43))
        error(strange, 503, "database_unavailable")
        ready = await site.http.get("/ready")
        assert (ready.status_code, ready.json()["checks"]["engine"]) == (503, "ok")
        assert (await site.http.get("/health")).status_code == 200
        await between.mend()
        await until_ready(site)
        await until(lambda: site.admin.post("/admin/v1/tenants", json={"id": "t0"}), 201)
        await until(lambda: site.upload("acme", "b", tiny.adapter(2)), 201)
    async with fake_site(tmp_path, database_url=url) as site:
        used = (await site.admin.get("/admin/v1/usage?tenant=acme")).json()
        assert sum(row["requests"] for row in used["data"]) == 5, json.dumps(used)


async def test_connections_that_are_cut_again_and_again_end_in_no_500(
    tmp_path: Path, way: tuple[str, Proxy]
) -> None:
    """In the middle of statements, of a rollback, of a ping: the driver has another error for each."""
    url, _ = way
    statuses: Counter[int] = Counter()
    async with fake_site(tmp_path, database_url=url) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        done = asyncio.Event()

        async def ask(number: int) -> None:
            while not done.is_set():
                made = await site.admin.post("/admin/v1/tenants", json={"id": f"t{number}"})
                read = await site.chat(key, "hi", model="a", max_tokens=1)
                gone = await site.admin.delete(f"/admin/v1/tenants/t{number}")
                statuses.update(one.status_code for one in (made, read, gone))

        asking = [asyncio.create_task(ask(number)) for number in range(8)]
        killer = create_async_engine(make_url(postgres()), isolation_level="AUTOCOMMIT")
        others = "datname = :name AND pid <> pg_backend_pid()"
        end = text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
        async with killer.connect() as connection:
            for _ in range(60):
                await connection.execute(end, {"name": make_url(url).database})
                await asyncio.sleep(0.03)
        await killer.dispose()
        done.set()
        await asyncio.gather(*asking)
        await until_ready(site)
    assert statuses.keys() <= {200, 201, 204, 404, 409, 503}, statuses
    assert statuses[200] + statuses[201] + statuses[204] > 0


async def test_a_write_that_cannot_begin_does_not_make_the_server_forget(
    tmp_path: Path, way: tuple[str, Proxy]
) -> None:
    url, between = way
    async with fake_site(tmp_path, database_url=url) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        assert (await site.chat(key, "hi", model="a", max_tokens=1)).status_code == 200
        between.cut()
        error(await site.admin.post("/admin/v1/tenants", json={"id": "late"}), 503, "database_unavailable")
        assert (await site.chat(key, "hi", model="a", max_tokens=1)).status_code == 200
        await between.mend()


async def write_one(database: Database, between: Proxy, *, passes: bool, cut: bool = False) -> None:
    """A change whose commit ends its connection."""
    async with database.write() as session:
        session.add(MetaRow(key="one", value="1"))
        await session.flush()
        between.lose(b"COMMIT", passes=passes, cut=cut)


async def test_a_commit_whose_answer_is_lost_is_acknowledged(way: tuple[str, Proxy]) -> None:
    """It was made: who is told that nothing was changed would send it again."""
    url, between = way
    async with opened(url) as database:
        await write_one(database, between, passes=True)
        async with database.read() as session:
            assert await session.get(MetaRow, "one") is not None


async def test_a_commit_is_asked_for_until_a_connection_is_free(
    way: tuple[str, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That none is says nothing about the change: at a failover all of them wait for the old primary."""
    monkeypatch.setattr(opening_postgres, "SETTLE_S", 60.0)
    engine = create_async_engine(way[0], pool_size=1, max_overflow=0, pool_timeout=0.2)
    async with engine.connect() as only:
        await only.execute(text("CREATE TABLE one (id int)"))
        transaction = await only.scalar(opening_postgres.TRANSACTION)
        await only.commit()
        asking = asyncio.create_task(opening_postgres.is_committed(engine, transaction))
        for _ in range(2):  # who asks after it is told so after it
            await asyncio.sleep(0)
            with pytest.raises(NoConnectionFree):
                await engine.connect()
    assert await asking
    await engine.dispose()


async def test_a_commit_that_did_not_arrive_is_refused(way: tuple[str, Proxy]) -> None:
    url, between = way
    async with opened(url) as database:
        with pytest.raises(DatabaseUnavailable, match="nothing was changed"):
            await write_one(database, between, passes=False)
        async with database.read() as session:
            assert await session.get(MetaRow, "one") is None


@pytest.mark.parametrize("passes", [True, False], ids=["made", "not made"])
async def test_usage_whose_commit_has_no_answer_is_written_once(passes: bool, way: tuple[str, Proxy]) -> None:
    """Else a customer would be billed twice for it."""
    url, between = way
    async with opened(url) as database:
        writer = UsageWriter(database, keep_days=30)
        writer.record(Usage(now(), "acme", None, None, None, "chat", "completed", "r", output_tokens=7))
        between.lose(b"COMMIT", passes=passes)
        for _ in range(2):
            with contextlib.suppress(DatabaseUnavailable):
                await writer.flush()
        async with database.read() as session:
            assert (await session.scalars(select(UsageRow.output_tokens))).all() == [7]


async def test_a_commit_of_which_nothing_is_known_is_called_that(
    way: tuple[str, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening_postgres, "SETTLE_S", 0.5)
    url, between = way
    async with opened(url) as database:
        with pytest.raises(DatabaseUnavailable, match="is not known"):
            await write_one(database, between, passes=True, cut=True)
