"""The database: its tables, its one way in, and the cache in front of it.

    tenants ──< keys
       ├─────< adapters ──< versions          meta: key -> value
       └─────< uploads
    usage, audit: what happened; they outlive whom it happened to

SQLite or PostgreSQL. What was committed survives a crash, and another process (the command line, a server
that is being replaced) sees it within ``WATCH_EVERY`` seconds.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Hashable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from cachetools import LRUCache
from sqlalchemy import (
    JSON,
    URL,
    BigInteger,
    Connection,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Select,
    String,
    Text,
    event,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.types import TypeDecorator

from adapters.errors import StorageFailed, StorageFull

logger = logging.getLogger(__name__)

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
Q = TypeVar("Q", bound=Select[Any])
F = TypeVar("F", bound=Callable[..., Coroutine[Any, Any, Any]])

DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}
MIGRATIONS = "adapters.database:migrations"
# How long a SQLite writer of another process (the command line) may hold us up.
BUSY_TIMEOUT_MS = 30_000
WAL_TRIES = 200
# Names the PostgreSQL advisory lock under which the schema is upgraded.
UPGRADE_LOCK = 0x6C6F7261
# The row of ``meta`` that every write changes, and how often other processes look at it, in seconds.
LAST_WRITE = "last_write"
WATCH_EVERY = 0.5
_LOOK = "SELECT value FROM meta WHERE key = 'last_write'"

MAX_INTEGER = 2**31 - 1

# SQLite counts up only what it calls INTEGER.
_RowId = BigInteger().with_variant(Integer(), "sqlite")
_Json = JSON(none_as_null=True)


class SchemaTooNew(RuntimeError):
    """The database was last used by a newer version of this program, whose tables are unknown here."""


class UtcDateTime(TypeDecorator[datetime]):
    """Timezone-aware UTC on both sides; SQLite keeps no zone, so it is put back on reading.

    A time that UTC has no year for, up to a day beyond the calendar's ends, is that end.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone cannot be stored")
        try:
            return value.astimezone(UTC)
        except OverflowError:
            end = datetime.min if value.year == 1 else datetime.max
            return end.replace(tzinfo=UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def now() -> datetime:
    return datetime.now(UTC)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class TenantRow(Base):
    __tablename__ = "tenants"

    id: Mapped[str] = mapped_column(String(63), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    weight: Mapped[float] = mapped_column(Double)
    base_allowed: Mapped[bool]
    max_queued: Mapped[int | None]
    max_running: Mapped[int | None]
    cache_salt: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    # Without a default of its own the INSERT would have to read the database's back.
    priority: Mapped[str] = mapped_column(String(16), default="standard", server_default="standard")
    limits: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    budgets: Mapped[dict[str, Any] | None] = mapped_column(_Json)


class KeyRow(Base):
    """``digest`` is the SHA-256 of the key, in hex; the key itself is nowhere."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"), index=True)
    name: Mapped[str | None] = mapped_column(String(200))
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    scopes: Mapped[list[str] | None] = mapped_column(_Json)
    limits: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    last_used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class AdapterRow(Base):
    """An adapter is there while it has versions.

    The row outlives them: it remembers ``next_version``, so that ``name@3`` never means other weights,
    not even after the adapter was deleted and uploaded anew. ``split`` maps versions to their shares.
    """

    __tablename__ = "adapters"
    __table_args__ = (
        Index(
            "ix_adapters_default",
            "tenant",
            unique=True,
            sqlite_where=text("is_default"),
            postgresql_where=text("is_default"),
        ),
    )

    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    next_version: Mapped[int]
    live: Mapped[int | None]
    is_default: Mapped[bool]
    pinned: Mapped[bool]
    split: Mapped[dict[str, int] | None] = mapped_column(_Json)
    keep_versions: Mapped[int | None]
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class VersionRow(Base):
    __tablename__ = "versions"
    __table_args__ = (
        ForeignKeyConstraint(["tenant", "adapter"], ["adapters.tenant", "adapters.name"], ondelete="CASCADE"),
    )

    tenant: Mapped[str] = mapped_column(String(63), primary_key=True)
    adapter: Mapped[str] = mapped_column(String(128), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), index=True)
    rank: Mapped[int]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    report: Mapped[dict[str, Any]] = mapped_column(JSON)
    golden: Mapped[dict[str, Any] | None] = mapped_column(_Json, deferred=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class UploadRow(Base):
    """What an upload with an ``Idempotency-Key`` was answered; see ``adapters.store.idempotency``."""

    __tablename__ = "uploads"

    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    answer: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


class UsageRow(Base):
    """What one request used or, once rolled up (``request_id`` is NULL), ``requests`` of one day.

    ``at`` is when it ended, ``hour`` the same in hours since 1970. Tokens, seconds and ``cost`` (in 1e-9 of
    the currency) are sums over the requests. It refers to no row, because it has to outlive them.
    """

    __tablename__ = "usage"
    __table_args__ = (Index("ix_usage_tenant_at", "tenant", "at"), Index("ix_usage_at", "at"))

    id: Mapped[int] = mapped_column(_RowId, primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    hour: Mapped[int]
    tenant: Mapped[str] = mapped_column(String(63))
    key: Mapped[str | None] = mapped_column(String(16))
    adapter: Mapped[str | None] = mapped_column(String(128))
    version: Mapped[int | None]
    endpoint: Mapped[str] = mapped_column(String(32))
    outcome: Mapped[str] = mapped_column(String(16))
    request_id: Mapped[str | None] = mapped_column(String(64))
    requests: Mapped[int]
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    cached_tokens: Mapped[int] = mapped_column(BigInteger)
    output_tokens: Mapped[int] = mapped_column(BigInteger)
    queue_seconds: Mapped[float] = mapped_column(Double)
    first_token_seconds: Mapped[float] = mapped_column(Double)
    seconds: Mapped[float] = mapped_column(Double)
    cost: Mapped[int] = mapped_column(BigInteger)


class AuditRow(Base):
    """One change: who made it, to what, and what it was before and after. Rows are only ever added."""

    __tablename__ = "audit"
    __table_args__ = (Index("ix_audit_tenant_at", "tenant", "at"),)

    id: Mapped[int] = mapped_column(_RowId, primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    actor: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(64))
    tenant: Mapped[str | None] = mapped_column(String(63))
    target: Mapped[str | None] = mapped_column(String(200))
    before: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    after: Mapped[dict[str, Any] | None] = mapped_column(_Json)
    request_id: Mapped[str | None] = mapped_column(String(64))


class MetaRow(Base):
    """Facts about the installation as a whole."""

    __tablename__ = "meta"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(Text)


async def to_the_end(step: Coroutine[Any, Any, T]) -> T:
    """Runs ``step`` to its end even if cancelled meanwhile; the cancellation is raised afterwards."""
    task = asyncio.create_task(step)
    interruption: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            interruption = error
    if interruption is not None:
        raise interruption from task.exception()
    return task.result()


def _whole(method: F) -> F:
    async def run(*args: Any, **options: Any) -> Any:
        return await to_the_end(method(*args, **options))

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
    one of another process while ``watch`` runs; it is what a ``ReadCache`` goes by. A ValueError says what
    is wrong with ``url``.
    """

    def __init__(self, url: str) -> None:
        self.url = _checked(url)
        self.generation = 0
        self._engine = _engine(self.url)
        self._reader = async_sessionmaker(self._engine, class_=_Session, expire_on_commit=False)
        writing = self._engine.execution_options(loraplex_writes=True)
        self._writer = async_sessionmaker(writing, class_=_Session, expire_on_commit=False)
        # Writers of this process wait here, in order, instead of in SQLite's busy handler, where they
        # would hold the connections that readers need, and the unlucky would time out.
        self._turn = asyncio.Lock()
        self._last_write: str | None = None

    def __repr__(self) -> str:
        return f"Database({self.url.render_as_string()!r}, generation={self.generation})"

    async def open(self) -> None:
        """Creates what is missing and upgrades the schema; SchemaTooNew if it is beyond this program."""
        if self.url.get_backend_name() == "sqlite":
            await asyncio.to_thread(_create_private, Path(str(self.url.database)))
        # SQLite alters a table by dropping and refilling it, and with foreign keys on that deletes
        # every row that refers to it.
        engine = _engine(self.url, foreign_keys=False)
        try:
            async with engine.execution_options(loraplex_writes=True).begin() as connection:
                await connection.run_sync(_upgrade)
        finally:
            await engine.dispose()

    async def close(self) -> None:
        async with self._turn:
            await self._engine.dispose()

    async def ping(self) -> None:
        """Reads one row's worth; SQLAlchemy's errors come through."""
        async with self.read() as session:
            await session.execute(select(MetaRow.key).limit(1))

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """One consistent look for a single statement; for several of them too on SQLite.

        Raises StorageFailed where SQLite's disk is the reason.
        """
        async with self._reader() as session:
            with _disk_errors():
                yield session

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        """One transaction: on disk when the block has ended, gone without trace if the block raises.

        Raises StorageFull or StorageFailed where SQLite's disk is the reason.
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
        async with self._turn:
            session = self._writer()
            try:
                with _disk_errors():
                    yield session
                    await to_the_end(session.commit())
            finally:
                try:
                    await to_the_end(session.close())
                finally:
                    self.generation += session.info.get("invalidates", False)

    async def watch(self) -> None:
        """Never returns: empties the read caches when another process has written. Outages are waited out."""
        while True:
            try:
                async with self._engine.connect() as connection:
                    await self._watch(await connection.get_raw_connection())
            except Exception as error:  # a driver's own, since the looks go past SQLAlchemy
                logger.debug("the database cannot be watched: %s", error)
            await asyncio.sleep(WATCH_EVERY)

    async def _watch(self, connection: PoolProxiedConnection) -> None:
        """By the bare driver, outside of any transaction: a look by a session costs twenty times as much."""
        driver: Any = connection.driver_connection
        while True:
            if self.url.get_backend_name() == "sqlite":
                rows = await to_the_end(driver.execute_fetchall(_LOOK))
            else:
                rows = await to_the_end(driver.fetch(_LOOK))
            found = rows[0][0] if rows else None
            if found != self._last_write:
                self._last_write = found
                self.generation += 1
            await asyncio.sleep(WATCH_EVERY)


def matching(query: Q, row: Any, wanted: Any, *columns: str) -> Q:
    """``query`` for rows of ``wanted.start`` <= at < ``wanted.end`` whose ``columns`` are as ``wanted`` has
    them; None is any."""
    for column in columns:
        if (value := getattr(wanted, column)) is not None:
            query = query.where(getattr(row, column) == value)
    if wanted.start is not None:
        query = query.where(row.at >= wanted.start)
    if wanted.end is not None:
        query = query.where(row.at < wanted.end)
    return query


class ReadCache(Generic[K, T]):
    """The ``size`` most recently used answers of ``database`` since its last write.

    Sound for this process's writes: an answer is kept only if no write ended while it was read. Writes of
    others are seen as soon as ``Database.watch`` sees them.
    """

    def __init__(self, database: Database, size: int) -> None:
        self._database = database
        self._generation = database.generation
        self._answers: LRUCache[K, T] = LRUCache(maxsize=size)

    def __len__(self) -> int:
        return len(self._answers)

    async def get(self, key: K, read: Callable[[], Awaitable[T]]) -> T:
        """The answer to ``key``, from ``read`` if it is not known. What ``read`` raises is not kept."""
        generation = self._database.generation
        if self._generation != generation:
            self._answers.clear()
            self._generation = generation
        if key in self._answers:
            return self._answers[key]
        answer = await read()
        if self._database.generation == generation:
            self._answers[key] = answer
        return answer


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
            case sqlite3.SQLITE_IOERR:
                raise StorageFailed(
                    "The disk failed, and nothing was changed. Try again; the operator finds the reason in"
                    " the log."
                ) from error
        raise


def _checked(text: str) -> URL:
    url = make_url(text)
    if url.drivername in DRIVERS:
        url = url.set(drivername=DRIVERS[url.drivername])
    if url.drivername not in DRIVERS.values():
        raise ValueError(
            f"the database must be sqlite+aiosqlite:///… or postgresql+asyncpg://…, not {url.drivername}"
        )
    in_memory = url.database in (None, "", ":memory:") or str(url.database).startswith("file:")
    if url.get_backend_name() == "sqlite" and in_memory:
        raise ValueError("the database must be a plain file: what it holds has to survive a restart")
    return url


def _engine(url: URL, *, foreign_keys: bool = True) -> AsyncEngine:
    if url.get_backend_name() != "sqlite":
        return create_async_engine(url, pool_pre_ping=True)
    engine = create_async_engine(url)

    # SQLAlchemy's recipe for transactions with the sqlite3 driver: the driver begins none, we begin all.
    @event.listens_for(engine.sync_engine, "connect")
    def connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        _use_wal(cursor)
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")
        cursor.close()

    # A transaction that reads first and writes later fails at once with "database is locked" when
    # another one wrote in between; one that takes the write lock at its beginning waits instead.
    @event.listens_for(engine.sync_engine, "begin")
    def began(connection: Connection) -> None:
        writes = connection.get_execution_options().get("loraplex_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _use_wal(cursor: Any) -> None:
    """A new file turns into a WAL database in a moment that SQLite's busy timeout does not wait for."""
    for left in reversed(range(WAL_TRIES)):
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if not left:
                raise
            time.sleep(0.01)


def _create_private(path: Path) -> None:
    """Key digests and cache salts are for the owner's eyes; SQLite gives its other files the same mode."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.touch(mode=0o600, exist_ok=False)


def _upgrade(connection: Connection) -> None:
    """Brings the schema to this program's revision within the transaction of ``connection``."""
    sqlite = connection.dialect.name == "sqlite"
    if not sqlite:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": UPGRADE_LOCK})
    config = Config()
    config.set_main_option("script_location", MIGRATIONS)
    config.attributes["connection"] = connection
    scripts = ScriptDirectory.from_config(config)
    for revision in MigrationContext.configure(connection).get_current_heads():
        try:
            scripts.get_revision(revision)
        except CommandError:
            raise SchemaTooNew(
                f"The database {connection.engine.url.render_as_string()} was last used by a newer version"
                f" (its schema is {revision}, this program knows up to {scripts.get_current_head()})."
                " Start that version, or restore a backup."
            ) from None
    command.upgrade(config, "head")
    if sqlite and (broken := connection.exec_driver_sql("PRAGMA foreign_key_check").all()):
        raise RuntimeError(f"after the upgrade {len(broken)} rows refer to nothing; it was rolled back")
