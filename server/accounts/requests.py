"""Single requests, newest first: what became of each, how long it waited for what, and what it used."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import or_, select

from adapters.database.database import Database
from adapters.database.rows import UsageRow, matching
from server.accounts.terms import COST_UNIT
from server.metrics import Outcome

PLAIN = (
    "id", "request_id", "client_request_id", "tenant", "key", "adapter", "version", "endpoint", "outcome",
    "code", "prompt_tokens", "cached_tokens", "output_tokens",
)  # fmt: skip
SECONDS = ("queue_seconds", "load_seconds", "first_token_seconds", "seconds")


@dataclass(frozen=True, slots=True)
class RequestSearch:
    """Requests that ended at ``start`` <= at < ``end``; None is any.

    ``request_id`` is the server's id or the client's. ``slower_than`` is in seconds, over the whole request.
    ``after`` is the ``id`` of the last one of the page before.
    """

    tenant: str | None = None
    adapter: str | None = None
    version: int | None = None
    key: str | None = None
    outcome: Outcome | None = None
    request_id: str | None = None
    slower_than: float | None = None
    start: datetime | None = None
    end: datetime | None = None
    after: int | None = None


async def requests(database: Database, search: RequestSearch, most: int) -> list[dict[str, Any]]:
    """As JSON, newest first; those of days that were added up are no longer there."""
    query = select(UsageRow).where(UsageRow.request_id.is_not(None))
    query = matching(query, UsageRow, search, "tenant", "adapter", "version", "key", "outcome")
    if search.request_id is not None:
        ids = (UsageRow.request_id, UsageRow.client_request_id)
        query = query.where(or_(*(id_ == search.request_id for id_ in ids)))
    if search.slower_than is not None:
        query = query.where(UsageRow.seconds > search.slower_than)
    if search.after is not None:
        query = query.where(UsageRow.id < search.after)
    async with database.read() as session:
        rows = await session.scalars(query.order_by(UsageRow.id.desc()).limit(most))
        return [_shown(row) for row in rows]


def _shown(row: UsageRow) -> dict[str, Any]:
    """``first_token_seconds`` is null where there was no token; ``cold`` says that it waited for a load."""
    shown = {name: getattr(row, name) for name in PLAIN}
    shown |= {name: round(getattr(row, name), 4) for name in SECONDS}
    if not row.output_tokens:
        shown["first_token_seconds"] = None
    return shown | {
        "at": row.at.isoformat(),
        "cold": row.load_seconds > 0,
        "cost": row.cost / COST_UNIT,
    }
