"""Two gateways, each a process of its own, over one PostgreSQL: one decides, and the other takes over.

They have no replica: what rollouts are judged by are rows of usage, and the test writes these.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import insert, select

from adapters.database.database import Database
from adapters.database.rows import LeaseRow, UsageRow
from server.accounts.usage import Usage, UsageWriter
from server.rollouts import runner
from tests.service.rollouts.test_kills import Client
from tests.service.rollouts.test_rollouts import QUICK, begun, two_versions, until
from tests.support import crashes, databases, tiny
from tests.support.fleet import FLEET_KEY
from tests.support.forks import PROCESSES
from tests.support.ports import unused


@asynccontextmanager
async def running(folder: Path, url: str) -> AsyncIterator[tuple[Any, httpx.AsyncClient]]:
    port = unused()
    settings = tiny.settings(
        folder / "data",
        role="gateway",
        fleet_key=FLEET_KEY,
        database_url=url,
        port=port,
        drain_timeout=0.1,
        log_level="error",
    )
    process = PROCESSES.Process(target=crashes.serve, args=(settings, tiny.base(), folder))
    process.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            async with asyncio.timeout(120):
                while not await _lives(http):
                    assert process.is_alive(), process.exitcode
                    await asyncio.sleep(0.1)
            yield process, http
    finally:
        process.kill()
        process.join()


async def _lives(http: httpx.AsyncClient) -> bool:
    with suppress(httpx.TransportError):
        return (await http.get("/health")).status_code == 200
    return False


def request(version: int, id_: str) -> Usage:
    return Usage(
        at=datetime.now(UTC),
        tenant="acme",
        key=None,
        adapter="a",
        version=version,
        endpoint="chat",
        outcome="completed",
        request_id=id_,
        output_tokens=5,
        first_token_seconds=0.1,
        seconds=0.2,
        finish="length",
    )


async def feed(database: Database) -> None:
    """Requests that end, of both versions, until it is cancelled."""
    writer, draw, number = UsageWriter(database, keep_days=90, rolls_up=False), random.Random(1), 0
    while True:
        for _ in range(10):
            number += 1
            writer.record(request(draw.choice((1, 2)), str(number)))
        await writer.flush()
        await asyncio.sleep(0.3)


async def holder(database: Database) -> str | None:
    async with database.read() as session:
        found: str | None = await session.scalar(select(LeaseRow.holder).where(LeaseRow.name == runner.LEASE))
        return found


async def test_one_decides_and_the_other_takes_over(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(databases.empty("postgres", tmp_path))
        async with tiny.fake_site(tmp_path / "data", database_url=url) as site:
            await two_versions(site)
        database = Database(url)
        stack.push_async_callback(database.close)
        process, http = await stack.enter_async_context(running(tmp_path, url))
        first = Client(http)
        guards = QUICK["guards"] | {"probes": False}  # type: ignore[operator]
        await first.begin(steps=[20, 40, 60, 80, 100], guards=guards)
        async with asyncio.timeout(120):
            while (held := await holder(database)) is None:
                await asyncio.sleep(0.1)
        _, other = await stack.enter_async_context(running(tmp_path, url))
        second = Client(other)
        second.one = first.one
        feeding = asyncio.create_task(feed(database))
        try:
            async with asyncio.timeout(120):
                while (await second.rollout())["step"] < 1:
                    assert await holder(database) == held, "the first one has it, and it alone decides"
                    await asyncio.sleep(0.1)
            await second.hold()
            os.kill(process.pid, signal.SIGKILL)
            async with asyncio.timeout(240):
                while (ended := await second.rollout())["state"] == "running":
                    await asyncio.sleep(0.2)
            assert await holder(database) not in (None, held), "the second one has taken over"
        finally:
            feeding.cancel()
        await second.hold()
        decided = [(decision["action"], decision["share"]) for decision in ended["decisions"]]
        assert decided == [
            ("start", 20), ("forward", 40), ("forward", 60), ("forward", 80), ("complete", 100)
        ]  # fmt: skip


async def test_a_record_that_is_committed_late_is_counted_once(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(databases.empty("postgres", tmp_path))
        site = await stack.enter_async_context(tiny.fake_site(tmp_path / "data", database_url=url))
        await two_versions(site)
        id_ = await begun(site, hold=3600)
        await until(site, id_, lambda found: found["share"] == 50)
        elsewhere = Database(url)
        stack.push_async_callback(elsewhere.close)

        async def seen(number: int) -> None:
            for _ in range(2):  # the second look finds nothing that the first one has counted
                site.services.judge.begun.set()
                found = await until(site, id_, lambda found: compared(found) >= number)
                assert compared(found) == number

        async with elsewhere.append() as late:
            await late.execute(insert(UsageRow), [request(2, "late").as_row()])
            site.services.usage_writer.record(request(1, "on time"))
            await seen(1)
        await seen(2)
        site.services.usage_writer.record(request(1, "the next"))
        await seen(3)


def compared(found: dict[str, Any]) -> int:
    numbers = found["numbers"]
    return int(numbers["new"]["requests"] + numbers["live"]["requests"]) if numbers else 0
