"""Empty databases to test on, each test its own: a SQLite file, and one of a PostgreSQL server."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from adapters.database.database import Database
from tests.support.services import postgres

KINDS = ["sqlite", "postgres"]


@asynccontextmanager
async def opened(kind: str, folder: Path) -> AsyncIterator[Database]:
    """A new database with its tables."""
    async with empty(kind, folder) as url:
        database = Database(url)
        await database.open()
        yield database
        await database.close()


@asynccontextmanager
async def empty(kind: str, folder: Path) -> AsyncIterator[str]:
    """The URL of a database that nobody has opened yet."""
    if kind == "sqlite":
        yield f"sqlite+aiosqlite:///{folder / 'private' / 'loraplex.db'}"
        return
    name = f"loraplex_test_{uuid.uuid4().hex}"
    server = create_async_engine(postgres(), isolation_level="AUTOCOMMIT")
    try:
        async with server.connect() as connection:
            await connection.execute(text(f"CREATE DATABASE {name}"))
        yield make_url(postgres()).set(database=name).render_as_string(hide_password=False)
        async with server.connect() as connection:
            await connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    finally:
        await server.dispose()
