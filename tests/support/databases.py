"""Databases to test on, each test its own: a SQLite file, and one of a PostgreSQL server.

Those with tables are copies of one that each process makes once: to make tables takes longer than most tests.
So does it to turn the same statements into SQL for each database: a process does so once for all of a kind.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import tempfile
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.util import LRUCache

from adapters.database import postgres as opening_postgres
from adapters.database import sqlite as opening_sqlite
from adapters.database.database import Database
from tests.support.services import postgres

KINDS = ["sqlite", "postgres"]
_sqlite = b""  # a file with tables, once it was asked for
_postgres = ""  # the name of a database with tables


class _Statements(LRUCache[Any, Any]):
    """SQLAlchemy's cache of compiled statements, by the kind of a database instead of by each engine.

    A key begins with the engine's own dialect, and two of one class and one server's version write the same.
    """

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(_of_its_kind(key), default)

    def __setitem__(self, key: Any, compiled: Any) -> None:
        super().__setitem__(_of_its_kind(key), compiled)


def _of_its_kind(key: Any) -> Any:
    dialect, *others = key
    return (type(dialect), dialect.server_version_info, *others)


_statements = _Statements(2000)


def _engine(*args: Any, **options: Any) -> AsyncEngine:
    made = create_async_engine(*args, **options)
    made.sync_engine.update_execution_options(compiled_cache=_statements)
    return made


for module in (opening_sqlite, opening_postgres):
    vars(module)["create_async_engine"] = _engine


@asynccontextmanager
async def opened(kind: str, folder: Path) -> AsyncIterator[Database]:
    """A new database with its tables."""
    async with with_tables(kind, folder) as url:
        database = Database(url, timeout=60.0)
        await database.open()
        yield database
        await database.close()


@asynccontextmanager
async def empty(kind: str, folder: Path) -> AsyncIterator[str]:
    """The URL of a database that nobody has opened yet."""
    if kind == "sqlite":
        yield f"sqlite+aiosqlite:///{_file_in(folder)}"
        return
    async with _postgres_database("") as url:
        yield url


@asynccontextmanager
async def with_tables(kind: str, folder: Path) -> AsyncIterator[str]:
    """The URL of a database with tables and no rows; to open it is quick."""
    if kind == "sqlite":
        await copy_tables(_file_in(folder))
        yield f"sqlite+aiosqlite:///{_file_in(folder)}"
        return
    async with _postgres_database(f" TEMPLATE {await _template()}") as url:
        yield url


async def copy_tables(file: Path) -> None:
    """Makes ``file`` a SQLite database with tables, unless something is there."""
    global _sqlite
    if not _sqlite:
        with tempfile.TemporaryDirectory() as folder:
            async with empty("sqlite", Path(folder)) as url:
                await _make_tables(url)
            _sqlite = _file_in(Path(folder)).read_bytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as made:
            made.write(_sqlite)


def _file_in(folder: Path) -> Path:
    return folder / "private" / "loraplex.db"


async def _make_tables(url: str) -> None:
    database = Database(url)
    await database.open()
    await database.close()


async def _template() -> str:
    global _postgres
    if not _postgres:
        name = f"loraplex_template_{uuid.uuid4().hex}"
        await _administer(f"CREATE DATABASE {name}")
        if "LORAPLEX_TEST_POSTGRES" in os.environ:  # which outlives the tests
            atexit.register(lambda: asyncio.run(_administer(f"DROP DATABASE IF EXISTS {name}")))
        await _make_tables(_url_of(name))
        _postgres = name
    return _postgres


@asynccontextmanager
async def _postgres_database(how: str) -> AsyncIterator[str]:
    name = f"loraplex_test_{uuid.uuid4().hex}"
    await _administer(f"CREATE DATABASE {name}{how}")
    yield _url_of(name)
    await _administer(f"DROP DATABASE {name} WITH (FORCE)")


def _url_of(name: str) -> str:
    return make_url(postgres()).set(database=name).render_as_string(hide_password=False)


async def _administer(statement: str) -> None:
    server = create_async_engine(postgres(), isolation_level="AUTOCOMMIT")
    try:
        async with server.connect() as connection:
            await connection.execute(text(statement))
    finally:
        await server.dispose()
