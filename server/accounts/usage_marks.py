"""Which turns of a journal of usage are in the database: a row of ``meta`` for each journal.

    usage:<id> = <turn>    the last turn that is there

A mark goes with its file.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from adapters.database.database import Database
from adapters.database.rows import MetaRow

META_PREFIX = "usage:"  # and a journal's id


async def written(session: AsyncSession, journal: str) -> int:
    """The last turn that is in the database, 0 for none; waits for a commit of it that is still under way."""
    key = META_PREFIX + journal
    # A row that is not there cannot be waited for.
    inserting: Any = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    await session.execute(inserting(MetaRow).values(key=key, value="0").on_conflict_do_nothing())
    found = await session.scalar(select(MetaRow.value).where(MetaRow.key == key).with_for_update())
    return int(found or 0)


async def mark(session: AsyncSession, journal: str, turn: int) -> None:
    """In the transaction that writes the records of ``turn``."""
    key, value = META_PREFIX + journal, str(turn)
    marked = update(MetaRow).where(MetaRow.key == key).values(value=value).returning(MetaRow.key)
    if await session.scalar(marked) is None:
        await session.execute(insert(MetaRow).values(key=key, value=value))


async def forget(database: Database, journal: str) -> None:
    """After its file is gone, or its lines would be written again."""
    async with database.append() as session:
        await session.execute(delete(MetaRow).where(MetaRow.key == META_PREFIX + journal))
