"""SQLite by aiosqlite: a statement is one turn of the connection's thread, whatever it brings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiosqlite
import pytest
import pytest_asyncio
from sqlalchemy import func, insert, select, text, update
from sqlalchemy.exc import IntegrityError, OperationalError

from adapters.database.database import Database
from adapters.database.rows import MetaRow
from adapters.database.sqlite import ROWS_AT_ONCE
from tests.support.databases import opened

MANY = ROWS_AT_ONCE * 2 + 7
KEYS = [f"{number:06}" for number in range(MANY)]


@pytest_asyncio.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    async with opened("sqlite", tmp_path) as made:
        yield made


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is handed over to threads of connections that are open."""
    handed: list[Any] = []
    execute: Any = aiosqlite.Connection._execute

    async def counted(self: aiosqlite.Connection, what: Any, *args: Any, **options: Any) -> Any:
        handed.append(what)
        return await execute(self, what, *args, **options)

    monkeypatch.setattr(aiosqlite.Connection, "_execute", counted)
    return handed


async def fill(database: Database) -> None:
    async with database.append() as session:
        await session.execute(insert(MetaRow), [{"key": key, "value": "v"} for key in KEYS])


async def test_a_statement_is_one_turn(database: Database, turns: list[Any]) -> None:
    await database.ping()  # which opens a connection
    turns.clear()
    async with database.read() as session:
        await session.scalar(select(func.count()).select_from(MetaRow))
    assert len(turns) == 3, "where it begins, the statement, where it ends"
    turns.clear()
    async with database.append() as session:
        await session.execute(insert(MetaRow), [{"key": key, "value": "v"} for key in "abc"])
    assert len(turns) == 4, "the lock, a look whether it may be written, the statement, where it ends"


async def test_all_rows_come_however_many(database: Database) -> None:
    await fill(database)
    in_order = select(MetaRow.key).order_by(MetaRow.key)
    async with database.read() as session:
        found = (await session.scalars(in_order)).all()
        assert found == sorted(found)
        assert set(KEYS) <= set(found)
        streamed = [key async for key in await session.stream_scalars(in_order)]
        assert streamed == list(found)
        pieces = (await session.stream_scalars(in_order)).partitions(ROWS_AT_ONCE - 1)
        assert [key async for piece in pieces for key in piece] == list(found)
        first = await session.stream_scalars(in_order)
        assert await first.first() == found[0]


async def test_what_is_left_in_the_middle_holds_nothing(database: Database) -> None:
    await fill(database)
    async with database.read() as session:
        rows = await session.stream_scalars(select(MetaRow.key))
        await anext(aiter(rows))
    async with asyncio.timeout(60), database.append() as session:
        changed = await session.execute(update(MetaRow).values(value="w"))
    assert changed.rowcount > MANY  # type: ignore[attr-defined]


async def test_a_statement_that_fails_leaves_a_connection_that_works(database: Database) -> None:
    async with database.read() as session:
        with pytest.raises(OperationalError, match="no such table"):
            await session.execute(text("SELECT * FROM unheard_of"))
        assert await session.scalar(text("SELECT 5")) == 5
    with pytest.raises(IntegrityError):
        async with database.append() as session:
            await session.execute(insert(MetaRow), [{"key": "twice", "value": "v"}] * 2)
    async with database.read() as session:
        assert await session.get(MetaRow, "twice") is None


async def test_a_transaction_that_is_still_being_begun_is_rolled_back(database: Database) -> None:
    """By whoever gives a connection back before its thread has come to it."""
    async with database.read() as session:
        connection = await session.connection()
        raw: Any = (await connection.get_raw_connection()).driver_connection
        await session.rollback()
        assert not raw.in_transaction
        beginning = asyncio.create_task(raw.execute("BEGIN"))
        await asyncio.sleep(0)
        beginning.cancel()
        await raw.rollback()
        assert not raw.in_transaction


async def test_a_new_rows_id_and_what_is_returned(database: Database) -> None:
    async with database.append() as session:
        await session.execute(text("CREATE TABLE numbered (id INTEGER PRIMARY KEY, name TEXT)"))
        made = await session.execute(text("INSERT INTO numbered (name) VALUES ('a')"))
        assert (made.lastrowid, made.rowcount) == (1, 1)  # type: ignore[attr-defined]
        told = await session.execute(text("INSERT INTO numbered (name) VALUES ('b') RETURNING id, name"))
        assert told.all() == [(2, "b")]


async def test_how_a_connection_is_opened(database: Database) -> None:
    async with database.read() as session:
        found = [
            await session.scalar(text(f"PRAGMA {name}"))
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        ]
    assert found == ["wal", 2, 1, 3000]
