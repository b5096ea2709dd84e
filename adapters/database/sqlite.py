"""SQLite by aiosqlite: how a file is opened, and one turn of its thread for each statement.

A connection has a thread, and whatever SQLAlchemy asks of it, it hands over to that thread and waits for:
a cursor, then the statement, then its rows, then that the cursor be closed. Each of these costs two switches
between threads, more than most statements. Here a statement is handed over once, and so is all that opens a
connection.
"""

from __future__ import annotations

import sqlite3
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import aiosqlite
from sqlalchemy import URL, Connection, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

# How long a writer of another process (the command line, a backup) may hold up a write.
BUSY_TIMEOUT_MS = 3_000
WAL_TRIES = 200
# So many rows come with their statement; what is beyond them is read when it is asked for.
ROWS_AT_ONCE = 1_000


def engine(url: URL, *, foreign_keys: bool = True, busy_timeout_ms: int = BUSY_TIMEOUT_MS) -> AsyncEngine:
    """An engine on the file of ``url``, whose transactions begin as ``loraplex_writes`` says."""

    def prepare(connection: sqlite3.Connection) -> None:
        connection.execute(f"PRAGMA busy_timeout = {busy_timeout_ms}")
        _use_wal(connection)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")

    def connect(*where: Any, **options: Any) -> aiosqlite.Connection:
        return _connect(prepare, *where, **options)

    # SQLAlchemy's recipe for transactions with the sqlite3 driver: the driver begins none, we begin all.
    arguments = {"async_creator_fn": connect, "isolation_level": None}
    made = create_async_engine(url, connect_args=arguments)

    @event.listens_for(made.sync_engine, "handle_error")
    def failed(context: ExceptionContext) -> None:
        code = getattr(context.original_exception, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_READONLY:
            context.is_disconnect = True

    # A transaction that reads first and writes later fails at once with "database is locked" when
    # another one wrote in between; one that takes the write lock at its beginning waits instead.
    @event.listens_for(made.sync_engine, "begin")
    def began(connection: Connection) -> None:
        writes = connection.get_execution_options().get("loraplex_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return made


def _use_wal(connection: sqlite3.Connection) -> None:
    """A new file turns into a WAL database in a moment that SQLite's busy timeout does not wait for."""
    for left in reversed(range(WAL_TRIES)):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if not left:
                raise
            time.sleep(0.01)


def _connect(
    prepare: Callable[[sqlite3.Connection], None], *where: Any, **options: Any
) -> aiosqlite.Connection:
    """As ``aiosqlite.connect``, with ``prepare`` in the same turn of the thread."""

    def opened() -> sqlite3.Connection:
        connection: sqlite3.Connection = sqlite3.connect(*where, **options)
        try:
            prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    made = _Connection(opened, iter_chunk_size=ROWS_AT_ONCE)
    made._thread.daemon = True  # as SQLAlchemy makes it: a process ends without asking it
    return made


class _Connection(aiosqlite.Connection):
    _asked = _ended = 0  # turns of the thread

    def cursor(self) -> Any:
        return _Cursor(self)

    async def rollback(self) -> None:
        """No turn where no transaction is open, nor may be: SQLAlchemy asks for it after each commit, too."""
        if self._asked > self._ended or self.in_transaction:
            await super().rollback()

    async def _execute(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def run() -> Any:
            try:
                return fn(*args, **kwargs)
            finally:
                self._ended += 1

        self._asked += 1
        return await super()._execute(run)  # type: ignore[no-untyped-call]  # aiosqlite's own


class _Cursor:
    """What SQLAlchemy uses of ``aiosqlite.Cursor``; for one statement, as SQLAlchemy has it."""

    def __init__(self, connection: _Connection) -> None:
        self.arraysize = 1
        self.description: Any = None
        self.rowcount = -1
        self.lastrowid: int | None = None
        self._connection = connection
        self._rows: deque[Any] = deque()
        self._more: sqlite3.Cursor | None = None  # as long as there may be rows beyond those

    async def __aenter__(self) -> _Cursor:
        return self

    async def execute(self, statement: str, parameters: Iterable[Any] = ()) -> _Cursor:
        await self._connection._execute(self._run, "execute", statement, parameters)
        return self

    async def executemany(self, statement: str, parameters: Iterable[Iterable[Any]]) -> _Cursor:
        await self._connection._execute(self._run, "executemany", statement, parameters)
        return self

    def _run(self, how: str, statement: str, parameters: Iterable[Any]) -> None:
        """On the connection's thread."""
        cursor = self._connection._conn.cursor()
        try:
            getattr(cursor, how)(statement, parameters)
            self.description = cursor.description
            if self.description is not None:
                self._rows.extend(cursor.fetchmany(ROWS_AT_ONCE))
                if len(self._rows) == ROWS_AT_ONCE:
                    self._more = cursor
            self.rowcount, self.lastrowid = cursor.rowcount, cursor.lastrowid
        finally:
            if self._more is None:
                cursor.close()

    async def fetchone(self) -> Any:
        """None after the last row."""
        return next(iter(await self.fetchmany(1)), None)

    async def fetchmany(self, size: int | None = None) -> list[Any]:
        wanted = self.arraysize if size is None else size
        if len(self._rows) < wanted and self._more is not None:
            self._rows.extend(await self._connection._execute(self._more.fetchmany, wanted))
        return [self._rows.popleft() for _ in range(min(wanted, len(self._rows)))]

    async def fetchall(self) -> list[Any]:
        if self._more is not None:
            self._rows.extend(await self._connection._execute(self._more.fetchall))
        rows = list(self._rows)
        self._rows.clear()
        return rows

    async def __aiter__(self) -> AsyncIterator[Any]:
        while rows := await self.fetchmany(ROWS_AT_ONCE):
            for row in rows:
                yield row

    async def close(self) -> None:
        self._rows.clear()
        if (more := self._more) is not None:
            self._more = None
            await self._connection._execute(more.close)
