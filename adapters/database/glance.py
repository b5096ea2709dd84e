"""A database looked at before anything in it is touched: whose it is, how far it has come, which schema."""

from __future__ import annotations

import asyncio
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import URL, Connection, create_engine, func, inspect, select
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import NullPool

from adapters.database import postgres
from adapters.database.database import (
    OPEN_BUSY_TIMEOUT_MS,
    OPEN_CONNECT_TIMEOUT_S,
    check_revision,
    newest_revision,
)
from adapters.database.rows import AuditRow, MetaRow, VersionRow
from adapters.database.unusable import ordinary, usable


@dataclass(frozen=True, slots=True)
class Glance:
    """``revision`` is the schema's, None where there is none yet; ``installation`` the id in ``meta``.

    ``audit`` is the audit's last entry, 0 without one; ``linked`` are the files that versions have.
    """

    revision: str | None = None
    installation: str | None = None
    audit: int = 0
    linked: frozenset[str] = frozenset()

    @property
    def is_current(self) -> bool:
        """Whether the schema is this program's."""
        return self.revision == newest_revision()


async def glance(url: URL, installation_key: str) -> Glance:
    """What the database at ``url`` holds; a SQLite file that is not there is not made.

    Raises SchemaTooNew where the schema is beyond this program, ValueError where the file is no database or
    another program's, and DatabaseUnusable where nothing answers.
    """
    with usable(url):
        if url.get_backend_name() == "sqlite":
            return await asyncio.to_thread(_file, Path(str(url.database)), installation_key)
        engine = postgres.once(url, OPEN_CONNECT_TIMEOUT_S)
        try:
            async with engine.connect() as connection:
                return await connection.run_sync(_look, installation_key)
        finally:
            await engine.dispose()


def _file(path: Path, installation_key: str) -> Glance:
    ordinary(path)
    if not path.exists() or not path.stat().st_size:
        return Glance()
    uri = f"file:{quote(str(path.absolute()))}?mode=ro"
    patience = OPEN_BUSY_TIMEOUT_MS / 1000
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        creator=lambda: sqlite3.connect(uri, uri=True, timeout=patience),
        poolclass=NullPool,
    )
    try:
        with engine.connect() as connection:
            return _look(connection, installation_key)
    except DatabaseError as error:
        if "not a database" in str(error):
            raise ValueError(f"{path} is not a SQLite database") from error
        raise
    finally:
        engine.dispose()


def _look(connection: Connection, installation_key: str) -> Glance:
    revision = check_revision(connection)
    tables = set(inspect(connection).get_table_names())
    if revision is None:
        _refuse_foreign(connection, tables)
    installation, audit, linked = None, 0, frozenset[str]()
    if MetaRow.__tablename__ in tables:
        query = select(MetaRow.value).where(MetaRow.key == installation_key)
        installation = connection.scalar(query)
    if AuditRow.__tablename__ in tables:
        audit = connection.scalar(select(func.max(AuditRow.id))) or 0
    if VersionRow.__tablename__ in tables:
        linked = frozenset(connection.scalars(select(VersionRow.digest).distinct()))
    return Glance(revision, installation, audit, linked)


def _refuse_foreign(connection: Connection, tables: set[str]) -> None:
    """ValueError where the tables are another program's: any of a file, and of PostgreSQL, which several
    programs may share, such as have the names of ours."""
    foreign = tables - {"alembic_version"}
    if connection.dialect.name != "sqlite":
        foreign &= set(MetaRow.metadata.tables)
    if foreign:
        raise ValueError(
            f"The database {connection.engine.url.render_as_string()} holds another program's tables"
            f" ({', '.join(sorted(foreign)[:3])}). Nothing was touched. Set LORAPLEX_DATABASE_URL to one"
            " that is Loraplex's own."
        )
