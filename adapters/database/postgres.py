"""PostgreSQL by asyncpg: how long it may take, and which errors mean that it is away."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from sqlalchemy import URL, event, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnectionFree
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from adapters.awake import AwakeTimeout

# How long a commit whose answer was lost is asked for, in seconds.
SETTLE_S = 5.0
# The number of a transaction that has changed something, else NULL.
TRANSACTION = text("SELECT txid_current_if_assigned()")
_STATUS = text("SELECT txid_status(:transaction)")
_NOT_YET = "22023"  # SQLSTATE for a transaction of the future: the standby that took over never had it

# SQLSTATE of a server that starts, stops or has no connection left, of a connection that is gone, and of a
# standby: after a failover the server at the old address may be one, or take no changes until it is ended.
_OUTAGES = ("08", "53", "57P", "25006")
# The driver's words, in errors that have no SQLSTATE: of a connection that is gone, or was in mid-operation.
_WORDS = (
    "connection is closed",
    "connection was closed",
    "another operation",
    "connection was released",
    "match the target attribute",  # none of the hosts takes changes
)


def engine(url: URL, connect_timeout: float, statement_timeout: float | None) -> AsyncEngine:
    """Times in seconds. A server that was stopped, or a network that swallows, ends no connection: only a
    clock notices."""
    arguments = {"timeout": connect_timeout, "command_timeout": statement_timeout}
    made = create_async_engine(
        url,
        pool_pre_ping=True,
        pool_timeout=connect_timeout,
        connect_args={**arguments, "async_creator_fn": _Hosts().connect},
    )

    # SQLAlchemy asks the driver whether the connection is closed, which it may learn a moment later; and a
    # TimeoutError is none of the driver's errors. Either way it would keep the connection for the next.
    @event.listens_for(made.sync_engine, "handle_error")
    def failed(context: ExceptionContext) -> None:
        if isinstance(context.original_exception, TimeoutError) or is_outage(context.original_exception):
            context.is_disconnect = True

    return made


def once(url: URL, connect_timeout: float) -> AsyncEngine:
    """For a few statements that may take as long as they need, on a connection each. Time in seconds."""
    arguments = {"timeout": connect_timeout, "async_creator_fn": _Hosts().connect}
    return create_async_engine(url, poolclass=NullPool, connect_args=arguments)


class _Hosts:
    """Connects to that of a URL's hosts which takes changes, first to where it found one last.

    The driver would wait its whole time for the first host, and never ask the second, where the first one's
    machine is gone or stopped; and it would take a standby, which refuses every change.
    """

    def __init__(self) -> None:
        self._last = 0

    async def connect(self, *, host: Any = None, port: Any = None, timeout: float, **options: Any) -> Any:
        """As ``asyncpg.connect``; ``timeout`` in seconds is of all hosts together, in equal shares."""
        import asyncpg  # loaded only where there is a PostgreSQL

        if not isinstance(host, list):
            return await asyncpg.connect(host=host, port=port, timeout=timeout, **options)
        options.setdefault("target_session_attrs", "read-write")
        order = sorted(range(len(host)), key=lambda number: number != self._last)
        deadline = time.monotonic() + timeout
        for left, number in zip(range(len(host), 0, -1), order, strict=True):
            share = max(0.0, deadline - time.monotonic()) / left
            where = {"host": host[number], "port": int(port[number])}
            try:
                connection = await asyncpg.connect(**where, timeout=share, **options)
            except Exception as error:
                if left == 1 or not (isinstance(error, OSError) or is_outage(error)):
                    raise
            else:
                self._last = number
                return connection
        raise ValueError("the database's URL names no host")


async def is_committed(engine: AsyncEngine, transaction: int) -> bool:
    """Whether ``transaction`` (of ``TRANSACTION``) was committed, whose commit got no answer.

    TimeoutError where the database does not say so within ``SETTLE_S`` seconds.
    """
    async with AwakeTimeout(SETTLE_S):
        while True:
            try:
                async with engine.connect() as connection:
                    status = await connection.scalar(_STATUS, {"transaction": transaction})
            except (DBAPIError, OSError) as error:
                cause = error.orig if isinstance(error, DBAPIError) else error
                if getattr(cause, "sqlstate", None) == _NOT_YET:
                    return False
                if not isinstance(error, OSError) and not is_outage(error):
                    raise
            except NoConnectionFree:
                pass  # all of them may wait for a server that says nothing
            else:
                if status != "in progress":  # its process has not noticed yet that nobody waits for it
                    return bool(status == "committed")
            await asyncio.sleep(0.1)


def is_outage(error: BaseException | None) -> bool:
    """Whether the connection or the server is gone; ``error`` is the driver's, or SQLAlchemy's around it."""
    while error is not None:
        if str(getattr(error, "sqlstate", None) or "").startswith(_OUTAGES) or _says_so(error):
            return True
        error = error.__cause__
    return False


def _says_so(error: BaseException) -> bool:
    """By the class's name, since the driver is loaded only where there is a PostgreSQL."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"InterfaceError", "InternalClientError"}) and any(w in str(error) for w in _WORDS)
