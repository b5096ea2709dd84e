"""Uploads that are answered later, and uploads that were refused, with the reason: rows that people look at.

    receiving -> inspecting -> probing -> linking -> done
                     \\___________\\__________\\______-> refused

A row that is not ended is kept alive by whoever works on it; one that nobody keeps alive was interrupted.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, get_args

from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from adapters.database.audit import ACTOR
from adapters.database.database import Database
from adapters.database.rows import UploadJobRow, now
from adapters.errors import AdapterNotFound
from adapters.store.pages import by_time

State = Literal["receiving", "inspecting", "probing", "linking", "done", "refused"]
STATES: tuple[State, ...] = get_args(State)
ENDED: tuple[State, ...] = ("done", "refused")
# Ended rows that are kept of each tenant.
KEPT = 100
ALIVE = timedelta(seconds=60)
INTERRUPTED = "upload_interrupted"


@dataclass(frozen=True, slots=True)
class JobSearch:
    """None is any; ``after`` is the id of the last one of the page before."""

    tenant: str | None = None
    adapter: str | None = None
    state: State | None = None
    after: str | None = None


class UploadJobs:
    """The rows. Writing one empties no read cache."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # This process's own, which it need not judge by when it last said so: it may have stood still.
        self._here: set[str] = set()

    @contextmanager
    def worked_on(self, id_: str) -> Iterator[None]:
        """The job is this process's while the block runs."""
        self._here.add(id_)
        try:
            yield
        finally:
            self._here.discard(id_)

    async def begin(self, tenant: str, adapter: str) -> str:
        """Makes a job in the state ``receiving``; returns its id."""
        row = _row(tenant, adapter, "receiving")
        async with self._database.append() as session:
            session.add(row)
        return row.id

    async def keep_alive(self, id_: str, **changes: Any) -> None:
        """It is still worked on; ``changes`` are columns."""
        values = changes | {"updated_at": now()}
        query = update(UploadJobRow).where(UploadJobRow.id == id_, UploadJobRow.state.not_in(ENDED))
        async with self._database.append() as session:
            await session.execute(query.values(**values))

    async def refused(
        self, tenant: str, adapter: str, code: str, message: str, id_: str | None = None
    ) -> None:
        """Ends ``id_``, or keeps an upload that had no row."""
        async with self._database.append() as session:
            row = await session.get(UploadJobRow, id_) if id_ is not None else None
            if row is None:
                row = _row(tenant, adapter, "refused")
                session.add(row)
            row.state, row.code, row.message, row.updated_at = "refused", code, _plain(message, 1000), now()
            await session.flush()
            await _forget(session, tenant)

    async def done(self, id_: str, answer: dict[str, Any]) -> None:
        """Ends the job with the body that the upload would have been answered with."""
        async with self._database.append() as session:
            row = await session.get(UploadJobRow, id_)
            if row is not None:
                row.state, row.answer, row.updated_at = "done", answer, now()
                await session.flush()
                await _forget(session, row.tenant)

    async def get(self, tenant: str, adapter: str, id_: str) -> dict[str, Any]:
        """One as JSON. AdapterNotFound (``upload_not_found``)."""
        async with self._database.read() as session:
            row = await session.get(UploadJobRow, _plain(id_, 32))
        if row is None or (row.tenant, row.adapter) != (tenant, adapter):
            raise AdapterNotFound("There is no such upload.", code="upload_not_found")
        return _shown(row, self._here)

    async def search(self, search: JobSearch, most: int) -> list[dict[str, Any]]:
        """As JSON, newest first. AdapterNotFound (``upload_not_found``) for an ``after`` that it has not."""
        query, last = select(UploadJobRow), None
        for name in ("tenant", "adapter", "state"):
            if (value := getattr(search, name)) is not None:
                query = query.where(getattr(UploadJobRow, name) == _plain(value, 128))
        async with self._database.read() as session:
            if search.after is not None:
                last = await session.get(UploadJobRow, _plain(search.after, 32))
                if last is None or not _is_among(last, search):
                    raise AdapterNotFound("There is no such upload.", code="upload_not_found", param="after")
            page = by_time(query, UploadJobRow, last).limit(most)
            return [_shown(row, self._here) for row in await session.scalars(page)]


def _is_among(row: UploadJobRow, search: JobSearch) -> bool:
    """Whether a page of ``search`` can have ended with ``row``, whatever became of it since."""
    return search.tenant in (None, row.tenant) and search.adapter in (None, row.adapter)


async def _forget(session: AsyncSession, tenant: str) -> None:
    """Removes ended rows beyond the newest ``KEPT``."""
    mine = (UploadJobRow.tenant == tenant, UploadJobRow.state.in_(ENDED))
    oldest = select(UploadJobRow.created_at).where(*mine).order_by(UploadJobRow.created_at.desc())
    before = await session.scalar(oldest.offset(KEPT).limit(1))
    if before is not None:
        await session.execute(delete(UploadJobRow).where(*mine, UploadJobRow.created_at <= before))


def _row(tenant: str, adapter: str, state: State) -> UploadJobRow:
    actor, at = ACTOR.get(), now()
    return UploadJobRow(
        id=uuid.uuid4().hex,
        tenant=tenant,
        adapter=_plain(adapter, 128),
        state=state,
        received_bytes=0,
        actor=actor.name,
        request_id=actor.request_id,
        created_at=at,
        updated_at=at,
    )


def _plain(text: str, most: int) -> str:
    """``text`` as every database takes it."""
    return text.replace("\0", "")[:most].encode("utf-8", "replace").decode()


def _shown(row: UploadJobRow, here: Collection[str]) -> dict[str, Any]:
    state, code, message = row.state, row.code, row.message
    if state not in ENDED and row.id not in here and row.updated_at < now() - ALIVE:
        state, code, message = "refused", INTERRUPTED, "The server stopped during the upload. Send it again."
    return {
        "id": row.id,
        "tenant": row.tenant,
        "adapter": row.adapter,
        "state": state,
        "received_bytes": row.received_bytes,
        "by": row.actor,
        "request_id": row.request_id,
        "created_at": row.created_at.isoformat(),
        "updated_at": row.updated_at.isoformat(),
        "result": row.answer,
        "error": {"code": code, "message": message} if code else None,
    }
