"""Suspects that servers on one PostgreSQL write down at the same moment."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from sqlalchemy import select, text

from adapters.database.database import Database
from adapters.database.rows import MetaRow
from adapters.store.suspects import LOSSES_KEY, META_KEY, StoredSuspects
from tests.support import databases

_BLOCKED = text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
)


async def written(database: Database) -> dict[str, Any]:
    query = select(MetaRow.key, MetaRow.value).where(MetaRow.key.in_((META_KEY, LOSSES_KEY)))
    async with database.read() as session:
        return {key: json.loads(value) for key, value in await session.execute(query)}


async def blocked(database: Database) -> None:
    """Waits until a statement waits for a row that another transaction has changed."""
    async with asyncio.timeout(60):
        while True:
            async with database.read() as session:
                if await session.scalar(_BLOCKED):
                    return
            await asyncio.sleep(0.02)


async def test_servers_that_lose_their_engines_together_keep_each_others(tmp_path: Path) -> None:
    async with databases.opened("postgres", tmp_path) as mine:
        theirs = Database(mine.url.render_as_string(hide_password=False), timeout=60.0)
        loss = {"at": 4e9, "who": "them"}
        async with mine.write() as session:
            session.add_all([MetaRow(key=META_KEY, value="[]"), MetaRow(key=LOSSES_KEY, value="[]")])
        suspects = await StoredSuspects(mine).open()
        async with theirs.write() as session:
            (await session.get_one(MetaRow, META_KEY)).value = json.dumps(["x"])
            (await session.get_one(MetaRow, LOSSES_KEY)).value = json.dumps([loss])
            await session.flush()
            suspects.note(["y"])
            suspects.note_losses([{"at": 4e9, "who": "me"}])
            await blocked(mine)
        async with asyncio.timeout(60):
            while "y" not in (found := await written(mine))[META_KEY]:
                await asyncio.sleep(0.02)
        await suspects.stop()
        await theirs.close()
    assert found == {META_KEY: ["x", "y"], LOSSES_KEY: [loss, {"at": 4e9, "who": "me"}]}
