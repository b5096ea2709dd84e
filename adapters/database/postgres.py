"""PostgreSQL by asyncpg: how long it may take, and which errors mean that it is away."""

from __future__ import annotations

from sqlalchemy import URL, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

# SQLSTATE of a server that starts, stops or has no connection left, and of a connection that is gone.
_OUTAGES = ("08", "53", "57P")
# The driver's words, in errors that have no SQLSTATE: of a connection that is gone, or was in mid-operation.
_WORDS = ("connection is closed", "connection was closed", "another operation", "connection was released")


def engine(url: URL, connect_timeout: float, statement_timeout: float | None) -> AsyncEngine:
    """Times in seconds. A server that was stopped, or a network that swallows, ends no connection: only a
    clock notices."""
    timeouts = {"timeout": connect_timeout, "command_timeout": statement_timeout}
    made = create_async_engine(url, pool_pre_ping=True, pool_timeout=connect_timeout, connect_args=timeouts)

    # SQLAlchemy asks the driver whether the connection is closed, which it may learn a moment later; and a
    # TimeoutError is none of the driver's errors. Either way it would keep the connection for the next.
    @event.listens_for(made.sync_engine, "handle_error")
    def failed(context: ExceptionContext) -> None:
        if isinstance(context.original_exception, TimeoutError) or is_outage(context.original_exception):
            context.is_disconnect = True

    return made


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
