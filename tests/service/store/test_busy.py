"""SQLite is held by another process: writes are told so within seconds, and everything else goes on."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path

import pytest
from sqlalchemy import update

from adapters.database import turns
from adapters.database.rows import MetaRow
from tests.service.http.test_api import error
from tests.support import tiny
from tests.support.databases import KINDS, opened
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")


async def test_writes_are_refused_and_may_be_repeated_while_inference_goes_on(tmp_path: Path) -> None:
    async with fake_site(tmp_path) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)})
        other = await holding(tmp_path / "loraplex.db")
        began = time.monotonic()
        writes = [site.admin.post("/admin/v1/tenants", json={"id": f"t{number}"}) for number in range(6)]
        held = asyncio.gather(*writes, site.upload("acme", "b", tiny.adapter(2)))
        assert (await site.chat(key, "hi", model="a")).status_code == 200
        assert (await site.admin.get("/admin/v1/tenants")).status_code == 200
        for answer in await held:
            error(answer, 503, "storage_busy")
            assert int(answer.headers["Retry-After"]) >= 1
        # One after another they would take seven times as long.
        assert time.monotonic() - began < 6 * turns.STUCK_S
        other.execute("ROLLBACK")
        other.close()
        assert (await site.admin.post("/admin/v1/tenants", json={"id": "t0"})).status_code == 201
        assert (await site.upload("acme", "b", tiny.adapter(2))).status_code == 201


async def test_a_budget_is_known_while_nothing_can_be_written(tmp_path: Path) -> None:
    """Whoever asks for the first time has to be looked up; what waits to be written counts."""
    async with fake_site(tmp_path) as site:
        key = await site.tenant("acme", {"a": tiny.adapter(1)}, budgets={"day": {"tokens": 200}})
        other = await holding(tmp_path / "loraplex.db")
        first = await site.chat(key, "hi", model="a", max_tokens=10)
        assert first.status_code == 200
        left = 200 - first.json()["usage"]["total_tokens"]
        error(await site.chat(key, "hi", model="a", max_tokens=left + 1), 429, "insufficient_quota")
        other.execute("ROLLBACK")
        other.close()


async def test_a_short_lock_is_waited_for(tmp_path: Path) -> None:
    async with fake_site(tmp_path) as site:
        other = await holding(tmp_path / "loraplex.db")
        write = asyncio.create_task(site.admin.post("/admin/v1/tenants", json={"id": "acme"}))
        await asyncio.sleep(0.5)
        other.execute("ROLLBACK")
        other.close()
        assert (await write).status_code == 201


@pytest.mark.parametrize("kind", KINDS)
async def test_each_answer_to_a_writer_is_headway_for_those_that_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Where a write takes long by itself, nothing holds the database."""
    answered = 0

    def headway(_: turns.Turns) -> None:
        nonlocal answered
        answered += 1

    monkeypatch.setattr(turns.Turns, "headway", headway)
    async with opened(kind, tmp_path) as database:
        answered = 0
        await database.ping()
        assert answered == 0, "readers have no turn"
        async with database.append() as session:
            for number in range(4):
                before = answered
                await session.execute(update(MetaRow).where(MetaRow.key == f"n{number}").values(value="1"))
                assert answered == before + 1


async def holding(file: Path) -> sqlite3.Connection:
    """A connection that has the write lock, taken in a thread: the server of this process may be writing."""
    other = sqlite3.connect(file, timeout=60, isolation_level=None, check_same_thread=False)
    await asyncio.to_thread(other.execute, "BEGIN IMMEDIATE")
    return other
