"""Which turns of a journal of usage are in the database: a row of ``meta`` for each journal.

    usage:<id> = <turn> <seconds since 1970>    the last turn that is there, and when it was said

A mark goes with its file. That of a file that was lost with its machine goes ``MARK_DAYS`` after it was last
said; a process that lives says its own once a day.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from adapters.database.database import Database
from adapters.database.rows import MetaRow, now

META_PREFIX = "usage:"  # and a journal's id
MARK_DAYS = 180


async def written(session: AsyncSession, journal: str) -> int:
    """The last turn that is in the database, 0 for none; waits for a commit of it that is still under way."""
    key = META_PREFIX + journal
    # A row that is not there cannot be waited for.
    inserting: Any = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    await session.execute(inserting(MetaRow).values(key=key, value=_value(0)).on_conflict_do_nothing())
    found = await session.scalar(select(MetaRow.value).where(MetaRow.key == key).with_for_update())
    return int(found.split()[0]) if found else 0


async def mark(session: AsyncSession, journal: str, turn: int) -> None:
    """In the transaction that writes the records of ``turn``."""
    key, value = META_PREFIX + journal, _value(turn)
    marked = update(MetaRow).where(MetaRow.key == key).values(value=value).returning(MetaRow.key)
    if await session.scalar(marked) is None:
        await session.execute(insert(MetaRow).values(key=key, value=value))


async def renew(database: Database, journal: str) -> None:
    """Says again, now, what is written."""
    async with database.append() as session:
        await mark(session, journal, await written(session, journal))


async def forget(database: Database, journal: str) -> None:
    """After its file is gone, or its lines would be written again."""
    async with database.append() as session:
        await session.execute(delete(MetaRow).where(MetaRow.key == META_PREFIX + journal))


async def forget_old(database: Database, *, days: int = MARK_DAYS) -> int:
    """Forgets the marks that nobody has said for so long, and returns how many; none without a time."""
    query = select(MetaRow.key, MetaRow.value).where(MetaRow.key.startswith(META_PREFIX, autoescape=True))
    async with database.read() as session:
        marks = (await session.execute(query)).all()
    last = (now() - timedelta(days=days)).timestamp()
    old = [(key, value) for key, value in marks if " " in value and float(value.split()[1]) < last]
    if old:
        async with database.append() as session:
            for key, value in old:  # not one that is said at this moment
                await session.execute(delete(MetaRow).where(MetaRow.key == key, MetaRow.value == value))
    return len(old)


def outlived(changed: float) -> bool:
    """Whether the mark of a file that was last changed then (seconds since 1970) may be forgotten already."""
    return changed < (now() - timedelta(days=MARK_DAYS)).timestamp()


def _value(turn: int) -> str:
    return f"{turn} {int(now().timestamp())}"
