"""Who changed what: an entry for every change, written in the change's own transaction.

An entry never holds a key, its digest or a cache salt: only what the API shows of a thing.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from adapters.database.database import Database
from adapters.database.rows import AuditRow, matching, now


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts, and the request it made: ``admin`` or ``admin <name>`` by an admin key, ``person <name>``
    who operates and signed in, ``key <id>`` or ``member <name>`` of a customer, ``system``."""

    name: str
    request_id: str | None = None


SYSTEM = Actor("system")
# Set where a request is authenticated; what happens without one is the system's doing.
ACTOR: ContextVar[Actor] = ContextVar("actor", default=SYSTEM)


def note(
    session: AsyncSession,
    action: str,
    tenant: str | None,
    target: str | None = None,
    *,
    before: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
) -> None:
    """An entry that is there if and only if ``session``'s transaction is.

    ``before`` is None for what is new, ``after`` for what is gone.
    """
    actor = ACTOR.get()
    session.add(
        AuditRow(
            at=now(),
            actor=actor.name,
            action=action,
            tenant=tenant,
            target=target,
            before=before,
            after=after,
            request_id=actor.request_id,
        )
    )


@dataclass(frozen=True, slots=True)
class Search:
    """Entries of ``start`` <= at < ``end``; None is any. ``after`` is the last id of the page before, 0 for
    the first page."""

    tenant: str | None = None
    actor: str | None = None
    action: str | None = None
    start: datetime | None = None
    end: datetime | None = None
    after: int = 0


async def entries(
    database: Database, search: Search, most: int, *, newest: bool = False
) -> list[dict[str, Any]]:
    """As JSON, oldest or newest first."""
    query = select(AuditRow).order_by(AuditRow.id.desc() if newest else AuditRow.id).limit(most)
    if search.after:
        query = query.where(AuditRow.id < search.after if newest else AuditRow.id > search.after)
    query = matching(query, AuditRow, search, "tenant", "actor", "action")
    names = ("id", "actor", "action", "tenant", "target", "before", "after", "request_id")
    async with database.read() as session:
        rows = await session.scalars(query)
        return [{name: getattr(row, name) for name in names} | {"at": row.at.isoformat()} for row in rows]
