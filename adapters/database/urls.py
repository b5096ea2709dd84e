"""The URL of a database: which are taken, and what is wrong with the others."""

from __future__ import annotations

import inspect

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}
# What SQLAlchemy takes out of a URL before the driver sees it.
_SQLALCHEMYS = frozenset({"prepared_statement_cache_size", "host", "port"})


def checked_url(text: str) -> URL:
    """``text`` with the driver that is used here; ValueError where it names another database.

    No message has ``text`` itself, which may hold a password.
    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ValueError(
            "the database's URL (LORAPLEX_DATABASE_URL) cannot be read: it must be sqlite:///PATH or"
            " postgresql://USER:PASSWORD@HOST:PORT/NAME, with %XX for special characters of the password"
        ) from None
    if url.drivername in DRIVERS:
        url = url.set(drivername=DRIVERS[url.drivername])
    if url.drivername not in DRIVERS.values():
        raise ValueError(
            f"the database must be sqlite+aiosqlite:///… or postgresql+asyncpg://…, not {url.drivername}"
        )
    if url.get_backend_name() != "sqlite":
        return _for_asyncpg(url)
    if url.database in (None, "", ":memory:") or str(url.database).startswith("file:"):
        raise ValueError("the database must be a plain file: what it holds has to survive a restart")
    return url


def _for_asyncpg(url: URL) -> URL:
    """With ``sslmode``, as most vendors write it, in the driver's word."""
    import asyncpg  # loaded only where there is a PostgreSQL

    options = dict(url.query)
    if "sslmode" in options:
        options.setdefault("ssl", options.pop("sslmode"))
    if unknown := sorted(options.keys() - inspect.signature(asyncpg.connect).parameters - _SQLALCHEMYS):
        raise ValueError(
            f"the database's URL (LORAPLEX_DATABASE_URL) has {', '.join(unknown)} behind the question mark,"
            " which the driver asyncpg does not know"
        )
    return url.set(query=options)
