"""All rows of one database into another, SQLite or PostgreSQL each, as of one moment."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing

from sqlalchemy import URL, Connection, delete, func, insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from adapters.database import postgres
from adapters.database.database import OPEN_CONNECT_TIMEOUT_S, Database, check_revision, newest_revision
from adapters.database.rows import AuditRow, Base, MetaRow, TenantRow, UsageRow, VersionRow

_BATCH = 1000
# What a database that was only just made has no rows of.
_FILLED = (TenantRow, VersionRow, UsageRow, AuditRow)
_COUNTED = (UsageRow, AuditRow)  # whose ids PostgreSQL counts up


class NotEmpty(ValueError):
    """Rows would be mixed with others."""


async def transfer(source: URL, target: URL, look: Callable[[], None] = lambda: None) -> None:
    """Copies every row. ``target`` is made, or is new; one with customers in it raises NotEmpty. ``look`` is
    called now and then, at least after each ``_BATCH`` rows, and what it raises ends the copy.

    ``source`` is read in one transaction, beside whatever else is done to it. Its schema is this program's:
    ValueError if it is an earlier one, SchemaTooNew if it is a later one. Raises SQLAlchemy's errors.
    """
    made = Database(target.render_as_string(hide_password=False))
    try:
        await made.open()
    finally:
        await made.close()
    if target.get_backend_name() == "sqlite":
        # A write-ahead log would have all rows, and its end would copy them into the file: twice the room.
        with closing(sqlite3.connect(str(target.database))) as empty:
            empty.execute("PRAGMA journal_mode = DELETE")
    reading, writing = _engine(source), _engine(target)
    try:
        if source.get_backend_name() != "sqlite":
            reading = reading.execution_options(isolation_level="REPEATABLE READ")
        async with reading.connect() as old, writing.begin() as new:
            await old.run_sync(_check_schema)
            if source.get_backend_name() == "sqlite":
                await old.execute(text("BEGIN"))
            for row in _FILLED:
                if await new.scalar(select(func.count()).select_from(row)):
                    shown = target.render_as_string()
                    raise NotEmpty(f"{shown} has rows already; give an empty database to restore into")
            await new.execute(delete(MetaRow))
            for table in Base.metadata.sorted_tables:
                rows = await old.stream(select(table))
                async for batch in rows.mappings().partitions(_BATCH):
                    await new.execute(insert(table), [dict(row) for row in batch])
                    look()
            await _count_on(new)
    finally:
        await reading.dispose()
        await writing.dispose()


def _engine(url: URL) -> AsyncEngine:
    if url.get_backend_name() == "sqlite":
        return create_async_engine(url, poolclass=NullPool)
    return postgres.once(url, OPEN_CONNECT_TIMEOUT_S)


def _check_schema(connection: Connection) -> None:
    revision = check_revision(connection)
    if revision != newest_revision():
        raise ValueError(
            f"the schema of {connection.engine.url.render_as_string()} is {revision}, this program's is"
            f" {newest_revision()}; start this version on it once, or use the version that it belongs to"
        )


async def _count_on(connection: AsyncConnection) -> None:
    """Lets new ids come after those that were copied."""
    if connection.dialect.name == "sqlite":
        return
    for row in _COUNTED:
        name = row.__tablename__
        last = await connection.scalar(select(func.max(row.id)))
        if last is not None:
            query = text("SELECT setval(pg_get_serial_sequence(:name, 'id'), :last)")
            await connection.execute(query, {"name": name, "last": last})
