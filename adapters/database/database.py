"""The database: how it is opened, read and written.

SQLite or PostgreSQL. What was committed survives a crash, and another process (the command line, a server
that is being replaced) sees it within ``WATCH_EVERY`` seconds. ``rows`` has the tables, ``cache`` answers
kept between writes.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import shutil
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import URL, Connection, event, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnectionFree
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.pool import PoolProxiedConnection

from adapters.database import postgres, sqlite
from adapters.database.rows import MetaRow
from adapters.database.turns import QueueStuck, QueueTooLong, Turns
from adapters.database.unusable import ordinary, usable
from adapters.database.urls import checked_url as checked_url
from adapters.errors import DatabaseUnavailable, StorageBusy, StorageFailed, StorageFull
from adapters.tasks import uninterruptible

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Coroutine[Any, Any, Any]])

MIGRATIONS = "adapters.database:migrations"
# How long a SQLite writer of another process (the command line, a backup) may hold up the start.
OPEN_BUSY_TIMEOUT_MS = 30_000
LEAST_FREE_BYTES = 8 << 20  # below it SQLite is taken for full
# How long PostgreSQL may take to connect or for one statement, in seconds, unless a setting says otherwise.
ANSWER_TIMEOUT_S = 5.0
OPEN_CONNECT_TIMEOUT_S = 30.0  # at a start, when the machine may have just booted
# Names the PostgreSQL advisory lock under which the schema is upgraded.
UPGRADE_LOCK = 0x6C6F7261
# The row of ``meta`` that every write changes, and how often other processes look at it, in seconds.
LAST_WRITE = "last_write"
WATCH_EVERY = 0.5
_NOTHING = text("UPDATE meta SET value = value WHERE 0")  # which SQLite refuses where it may only read
_LOOK = "SELECT value FROM meta WHERE key = 'last_write'"


class SchemaTooNew(ValueError):
    """The database was last used by a newer version of this program, whose tables are unknown here."""


def _whole(method: F) -> F:
    async def run(*args: Any, **options: Any) -> Any:
        return await uninterruptible(method(*args, **options))

    return cast("F", run)


class _Session(AsyncSession):
    """Ends every statement that it has begun, even if cancelled.

    The connection of one that was left in the middle could not be closed, and would keep the database locked.
    """

    execute = _whole(AsyncSession.execute)
    scalar = _whole(AsyncSession.scalar)  # type: ignore[assignment, arg-type]  # overloads with defaults
    get = _whole(AsyncSession.get)
    get_one = _whole(AsyncSession.get_one)
    merge = _whole(AsyncSession.merge)
    delete = _whole(AsyncSession.delete)
    flush = _whole(AsyncSession.flush)


class Database:
    """Sessions on one database.

    ``generation`` grows with every write, after it is on disk and before ``write()`` returns, and soon after
    one of another process while ``watch`` runs; it is what a ``ReadCache`` goes by. ``timeout`` is how long
    PostgreSQL may take to connect or for one statement, in seconds. A ValueError says what is wrong with
    ``url``.
    """

    def __init__(self, url: str, *, timeout: float = ANSWER_TIMEOUT_S) -> None:
        self.url = checked_url(url)
        self.generation = 0
        self._timeout = timeout
        self._engine = _engine(self.url, connect_timeout=timeout, statement_timeout=timeout)
        event.listen(self._engine.sync_engine, "after_cursor_execute", self._answered)
        self._reader = async_sessionmaker(self._engine, class_=_Session, expire_on_commit=False)
        writing = self._engine.execution_options(loraplex_writes=True)
        self._writer = async_sessionmaker(writing, class_=_Session, expire_on_commit=False)
        # Writers of this process wait here, in order, instead of in SQLite's busy handler, where they
        # would hold the connections that readers need, and the unlucky would time out.
        self._turns = Turns()
        self._last_write: str | None = None
        self._file: tuple[int, int] | None = None  # which file SQLite's is, once it is open

    def __repr__(self) -> str:
        return f"Database({self.url.render_as_string()!r}, generation={self.generation})"

    async def open(self) -> None:
        """Creates what is missing and upgrades the schema; SchemaTooNew if it is beyond this program.

        DatabaseUnusable where it cannot be reached or written.
        """
        if self.url.get_backend_name() == "sqlite":
            with usable(self.url):
                await asyncio.to_thread(_create_private, Path(str(self.url.database)))
        # SQLite alters a table by dropping and refilling it, and with foreign keys on that deletes
        # every row that refers to it.
        engine = _engine(
            self.url,
            foreign_keys=False,
            busy_timeout_ms=OPEN_BUSY_TIMEOUT_MS,
            connect_timeout=max(self._timeout, OPEN_CONNECT_TIMEOUT_S),
            statement_timeout=None,  # an upgrade may rewrite a large table, or wait for another process's
        )
        try:
            async with AsyncExitStack() as stack:
                beginning = engine.execution_options(loraplex_writes=True).begin()
                with usable(self.url):
                    connection = await stack.enter_async_context(beginning)
                await connection.run_sync(_upgrade)
        finally:
            await engine.dispose()
        if self.url.get_backend_name() == "sqlite":
            self._file = _identity(Path(str(self.url.database)))

    async def close(self) -> None:
        async with self._turns.last():
            await self._engine.dispose()

    async def ping(self) -> None:
        """Reads one row's worth; SQLAlchemy's errors come through."""
        async with self.read() as session:
            await session.execute(select(MetaRow.key).limit(1))

    async def ping_write(self) -> None:
        """Whether a change could be written now. Raises StorageFull, StorageBusy, and SQLAlchemy's errors."""
        if self.url.get_backend_name() == "sqlite":
            folder = Path(str(self.url.database)).parent
            free = (await asyncio.to_thread(shutil.disk_usage, folder)).free
            if free < LEAST_FREE_BYTES:
                raise StorageFull("There is no room for the database.")
        async with self.append() as session:
            await session.execute(select(MetaRow.key).limit(1))

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """One consistent look for a single statement; for several of them too on SQLite.

        Raises StorageFailed where SQLite's disk is the reason, DatabaseUnavailable where PostgreSQL is away.
        """
        session = self._reader()
        try:
            with _disk_errors():
                yield session
        finally:
            await _close(session)

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        """One transaction: on disk when the block has ended, gone without trace if the block raises.

        Raises StorageFull or StorageFailed where SQLite's disk is the reason, StorageBusy where another
        process holds SQLite's lock for seconds, DatabaseUnavailable where PostgreSQL is away.
        Cancelled during the commit, it ends the commit first. Writes take turns, and each one empties
        the read caches, of other processes too: nothing that happens per request belongs here.
        """
        mark = uuid.uuid4().hex
        async with self.append() as session:
            try:
                yield session
                # Last, because on PostgreSQL other writers wait for this row.
                await session.execute(update(MetaRow).where(MetaRow.key == LAST_WRITE).values(value=mark))
                self._last_write = mark
            finally:
                session.info["invalidates"] = True

    @asynccontextmanager
    async def append(self) -> AsyncIterator[AsyncSession]:
        """As ``write``, for rows that no read cache holds anything of."""
        async with self._its_turn():
            session, committing = self._writer(), False
            try:
                with _disk_errors():
                    self._refuse_another_file()
                    await self._begin(session)
                    yield session
                    committing = True  # from here on it may be on disk, whatever is raised
                    await uninterruptible(self._commit(session))
                    self._refuse_another_file()
            finally:
                try:
                    await _close(session)
                finally:
                    # One that failed before has changed nothing, and must not cost others what is remembered.
                    self.generation += committing and session.info.get("invalidates", False)

    async def _begin(self, session: AsyncSession) -> None:
        """SQLite opens a file for reading alone while its disk is read-only, and never again for writing."""
        if self.url.get_backend_name() != "sqlite":
            return
        try:
            await session.execute(_NOTHING)
        except DBAPIError as error:
            if getattr(error.orig, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_READONLY:
                raise
            await _close(session)  # with all that were opened before, since ``failed`` says so
            await session.execute(_NOTHING)

    async def _commit(self, session: AsyncSession) -> None:
        """Where PostgreSQL's answer is lost, asks again by another connection whether it was committed."""
        transaction = None
        if self.url.get_backend_name() != "sqlite":
            await session.flush()  # only what has changed something has a number
            transaction = await session.scalar(postgres.TRANSACTION)
        try:
            await session.commit()
        except (DBAPIError, OSError) as error:
            lost = isinstance(error, OSError) or error.connection_invalidated
            if transaction is None or not (lost or postgres.is_outage(error)):
                raise
            try:
                if await postgres.is_committed(self._engine, transaction):
                    return
            except TimeoutError:
                raise DatabaseUnavailable(
                    "The database does not answer, and whether the change was made is not known. Look at"
                    " what is there before you send it again."
                ) from error
            raise

    def _answered(self, connection: Connection, *_: Any) -> None:
        if connection.get_execution_options().get("loraplex_writes", False):
            self._turns.headway()

    @asynccontextmanager
    async def _its_turn(self) -> AsyncIterator[None]:
        """Raises StorageBusy, for PostgreSQL DatabaseUnavailable, where the writes before it do not end."""
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(self._turns.mine())
            except QueueStuck as error:
                sqlite = self.url.get_backend_name() == "sqlite"
                raise (_busy() if sqlite else _unavailable()) from error
            except QueueTooLong as error:
                raise StorageBusy(
                    "So many changes wait for the database that this one was not begun. Try again in some"
                    " seconds, with fewer at once."
                ) from error
            yield

    def _refuse_another_file(self) -> None:
        """Raises StorageFailed where SQLite's file was removed or replaced.

        What is written to the one that is open would be gone with this process.
        """
        if self._file is not None and _identity(Path(str(self.url.database))) != self._file:
            raise StorageFailed(
                "The database's file was removed or replaced under the server, and nothing is written any"
                " more. The operator has to put it back and start the server again."
            )

    async def watch(self) -> None:
        """Never returns: empties the read caches when another process has written. Outages are waited out."""
        while True:
            try:
                async with self._engine.connect() as connection:
                    try:
                        await self._watch(await connection.get_raw_connection())
                    except Exception:
                        await connection.invalidate()  # the pool does not see what fails past SQLAlchemy
                        raise
            except Exception as error:  # a driver's own, since the looks go past SQLAlchemy
                logger.debug("the database cannot be watched: %s", error)
            await asyncio.sleep(WATCH_EVERY)

    async def _watch(self, connection: PoolProxiedConnection) -> None:
        """By the bare driver, outside of any transaction: a look by a session costs twenty times as much."""
        driver: Any = connection.driver_connection
        sqlite = self.url.get_backend_name() == "sqlite"
        log = Path(f"{self.url.database}-wal")
        seen: float | None = None  # when the log was written last, as it was at a look since
        while True:
            written = _written(log) if sqlite else None
            if written is None or written != seen:
                seen = written
                if sqlite:
                    rows = await uninterruptible(driver.execute_fetchall(_LOOK))
                else:
                    rows = await uninterruptible(driver.fetch(_LOOK))
                found = rows[0][0] if rows else None
                if found != self._last_write:
                    self._last_write = found
                    self.generation += 1
            await asyncio.sleep(WATCH_EVERY)


async def _close(session: AsyncSession) -> None:
    """Whatever was read or written is; where its connection was lost since, that is nobody's error."""
    try:
        await uninterruptible(session.close())
    except (DBAPIError, OSError, TimeoutError) as error:
        logger.debug("a connection was lost as it was given back: %s", error)


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        # Extended codes hold the primary one in their lowest byte.
        match getattr(error.orig, "sqlite_errorcode", 0) & 0xFF:
            case sqlite3.SQLITE_FULL:
                raise StorageFull(
                    "There is no room for the database. Ask the operator to free space where it lies."
                ) from error
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                raise _busy() from error
            case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN:
                raise StorageFailed(
                    "The database cannot be written, and nothing was changed. Try again later; the operator"
                    " finds the reason in the log."
                ) from error
            case sqlite3.SQLITE_IOERR:
                raise StorageFailed(
                    "The disk failed, and nothing was changed. Try again; the operator finds the reason in"
                    " the log."
                ) from error
        if error.connection_invalidated or postgres.is_outage(error.orig):
            raise _unavailable() from error
        raise
    # It listens no more, says nothing, or all connections wait for it.
    except (ConnectionError, TimeoutError, NoConnectionFree) as error:
        raise _unavailable() from error


def _unavailable() -> DatabaseUnavailable:
    return DatabaseUnavailable(
        "The database does not answer, and nothing was changed. Try again in some seconds, and ask the"
        " operator if it stays so."
    )


def _busy() -> StorageBusy:
    return StorageBusy(
        "Something holds the database, and nothing was changed. Try again in some seconds, and ask the"
        " operator if it stays so."
    )


def _engine(
    url: URL,
    *,
    foreign_keys: bool = True,
    busy_timeout_ms: int = sqlite.BUSY_TIMEOUT_MS,
    connect_timeout: float = ANSWER_TIMEOUT_S,
    statement_timeout: float | None = ANSWER_TIMEOUT_S,
) -> AsyncEngine:
    if url.get_backend_name() != "sqlite":
        return postgres.engine(url, connect_timeout, statement_timeout)
    return sqlite.engine(url, foreign_keys=foreign_keys, busy_timeout_ms=busy_timeout_ms)


def _written(log: Path) -> float | None:
    """When SQLite's write-ahead log was written last; None where it is not there, or was written just now.

    Every commit writes to it, and a look at its time costs a hundredth of a query. Times are as coarse as the
    kernel's clock: after a write of this moment another one may come with the same time.
    """
    try:
        written = log.stat().st_mtime
    except FileNotFoundError:
        return None
    return written if time.time() - written > 1 else None


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _create_private(path: Path) -> None:
    """Key digests and cache salts are for the owner's eyes; SQLite gives its other files the same mode."""
    ordinary(path)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.touch(mode=0o600, exist_ok=False)


def _upgrade(connection: Connection) -> None:
    """Brings the schema to this program's revision within the transaction of ``connection``."""
    sqlite = connection.dialect.name == "sqlite"
    if not sqlite:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": UPGRADE_LOCK})
    if check_revision(connection) != newest_revision():
        config = _config(MIGRATIONS)
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    if sqlite and (broken := connection.exec_driver_sql("PRAGMA foreign_key_check").all()):
        raise RuntimeError(f"after the upgrade {len(broken)} rows refer to nothing; it was rolled back")


def check_revision(connection: Connection) -> str | None:
    """The schema's revision, None where there is none yet; SchemaTooNew if this program does not know it."""
    scripts = _scripts(MIGRATIONS)
    found = None
    for found in MigrationContext.configure(connection).get_current_heads():
        try:
            scripts.get_revision(found)
        except CommandError:
            raise SchemaTooNew(
                f"The database {connection.engine.url.render_as_string()} was last used by a newer version"
                f" (its schema is {found}, this program knows up to {scripts.get_current_head()})."
                " Start that version, or restore a backup; if it is another program's, set"
                " LORAPLEX_DATABASE_URL to one that is Loraplex's own."
            ) from None
    return found


def newest_revision() -> str:
    """The schema's revision after ``Database.open``."""
    return str(_scripts(MIGRATIONS).get_current_head())


@functools.cache
def _scripts(location: str) -> ScriptDirectory:
    """The migrations, whose files are read once."""
    return ScriptDirectory.from_config(_config(location))


def _config(location: str) -> Config:
    config = Config()
    config.set_main_option("script_location", location)
    return config
