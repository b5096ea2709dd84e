"""Batches of requests: rows that say how far each is, and one for every line that has been answered.

    validating -> in_progress -> completed        (OpenAI's `finalizing` is one transaction here)
        |  \\           |  \\----> expired
        |   -> failed  v
        -----------> cancelling -> cancelled

A line is done when its result is committed, and only then: whoever goes on with a batch after a restart asks
``done`` and answers the rest. Two processes that answer the same line keep the first one's result.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal, get_args

from sqlalchemy import case, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from adapters.database.database import Database
from adapters.database.rows import BatchResultRow, BatchRow, FileRow, now
from adapters.errors import BatchEnded, BatchNotFound, QuotaExceeded
from adapters.store.files import UNFINISHED, StoredFile, plain
from adapters.store.pages import by_time

State = Literal["validating", "failed", "in_progress", "completed", "expired", "cancelling", "cancelled"]
STATES: tuple[State, ...] = get_args(State)
WINDOW = timedelta(hours=24)
# Unfinished ones of one tenant.
MAX_UNFINISHED = 100
# Ended ones are forgotten when they are so old.
KEPT = timedelta(days=90)
_TOKENS = ("prompt_tokens", "cached_tokens", "output_tokens")
_COUNTS = ("completed", "failed", *_TOKENS)


@dataclass(frozen=True, slots=True)
class Batch:
    """``counts`` are lines ``completed`` and ``failed``, and tokens; ``times`` in seconds since 1970."""

    id: str
    tenant: str
    key: str | None
    endpoint: str
    input_file: str
    output_file: str | None
    error_file: str | None
    state: State
    total: int
    notes: dict[str, str] | None
    errors: list[dict[str, Any]] | None
    times: dict[str, int]
    created_at: datetime
    expires_at: datetime
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of line ``number``; ``document`` is JSON."""

    number: int
    failed: bool
    document: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    def as_row(self, batch: str) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("number", "failed", "document", *_TOKENS)}
        return {**plain, "batch": batch, "size_bytes": len(self.document.encode()) + 1}


@dataclass(frozen=True, slots=True)
class BatchSearch:
    """None is any; ``after`` is the id of the last one of the page before."""

    tenant: str | None = None
    state: State | None = None
    after: str | None = None


class Batches:
    """The rows. Writing one empties no read cache."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self,
        file: StoredFile,
        endpoint: str,
        *,
        key: str | None,
        notes: dict[str, str] | None,
        keep: timedelta,
    ) -> Batch:
        """A new one, which reads ``file``; ``keep`` is how long what it writes is kept.

        QuotaExceeded where the tenant has too many that have not ended.
        """
        at = now()
        row = BatchRow(
            id=f"batch_{uuid.uuid4().hex}",
            tenant=file.tenant,
            key=key,
            endpoint=endpoint,
            input_file=file.id,
            state="validating",
            total=0,
            notes=notes,
            times={},
            keep_seconds=int(keep.total_seconds()),
            created_at=at,
            expires_at=at + WINDOW,
        )
        async with self._database.append() as session:
            mine = select(func.count()).where(BatchRow.tenant == file.tenant, BatchRow.state.in_(UNFINISHED))
            if (await session.scalar(mine) or 0) >= MAX_UNFINISHED:
                raise QuotaExceeded(f"{MAX_UNFINISHED} of your batches have not ended. Wait for some to end.")
            session.add(row)
        return _batch_of(row)

    async def get(self, tenant: str, id_: str) -> Batch:
        """BatchNotFound where the tenant has no such batch."""
        async with self._database.read() as session:
            row = await _found(session, tenant, id_)
            return _batch_of(row, (await _counts(session, [row]))[row.id])

    async def search(self, search: BatchSearch, most: int) -> list[Batch]:
        """Newest first. BatchNotFound for an ``after`` that is not there."""
        query, last = select(BatchRow), None
        if search.tenant is not None:
            query = query.where(BatchRow.tenant == plain(search.tenant))
        if search.state is not None:
            query = query.where(BatchRow.state == search.state)
        async with self._database.read() as session:
            if search.after is not None:
                last = await _found(session, search.tenant, search.after)
            rows = list(await session.scalars(by_time(query, BatchRow, last).limit(most)))
            counts = await _counts(session, rows)
        return [_batch_of(row, counts[row.id]) for row in rows]

    async def cancel(self, tenant: str, id_: str) -> Batch:
        """BatchEnded where it has ended otherwise."""
        async with self._database.append() as session:
            row = await _found(session, tenant, id_)
            if row.state in ("validating", "in_progress"):
                _move(row, "cancelling")
            elif row.state not in ("cancelling", "cancelled"):
                raise BatchEnded(f"The batch has ended already: it is {row.state}.")
        return await self.get(tenant, id_)

    # --- for who runs them -----------------------------------------------------------------------

    async def unfinished(self) -> list[Batch]:
        """Of all tenants, the oldest first."""
        query = select(BatchRow).where(BatchRow.state.in_(UNFINISHED)).order_by(BatchRow.created_at)
        async with self._database.read() as session:
            return [_batch_of(row) for row in await session.scalars(query)]

    async def state(self, id_: str) -> State | None:
        """The batch's state; None where it was deleted with its tenant."""
        async with self._database.read() as session:
            found = await session.scalar(select(BatchRow.state).where(BatchRow.id == id_))
        return next((state for state in STATES if state == found), None)

    async def begin(self, id_: str, total: int) -> None:
        """Starts the batch, whose ``total`` lines have been read and are valid."""
        async with self._database.append() as session:
            row = await session.get(BatchRow, id_)
            if row is not None and row.state == "validating":
                row.total = total
                _move(row, "in_progress")

    async def fail(self, id_: str, errors: Sequence[dict[str, Any]]) -> None:
        """Ends the batch before anything of it ran, because of ``errors`` in its lines."""
        async with self._database.append() as session:
            row = await session.get(BatchRow, id_)
            if row is not None and row.state == "validating":
                row.errors = list(errors)
                row.counts = dict.fromkeys(_COUNTS, 0)
                _move(row, "failed")

    async def done(self, id_: str) -> set[int]:
        """The numbers of the lines that have a result."""
        async with self._database.read() as session:
            query = select(BatchResultRow.number).where(BatchResultRow.batch == id_)
            return set(await session.scalars(query))

    async def record(self, id_: str, results: Sequence[Result]) -> bool:
        """Commits them; False where the batch is gone. A line that has a result keeps it."""
        dialect = sqlite if self._database.url.get_backend_name() == "sqlite" else postgresql
        insert = dialect.insert(BatchResultRow).on_conflict_do_nothing()
        try:
            async with self._database.append() as session:
                await session.execute(insert, [result.as_row(id_) for result in results])
        except IntegrityError:
            return False
        return True

    async def end(self, id_: str, state: State) -> None:
        """All lines have their results: makes files of them."""
        async with self._database.append() as session:
            row = await session.get(BatchRow, id_)
            if row is None or row.state not in UNFINISHED:
                return
            row.counts = (await _counts(session, [row]))[row.id]
            ends = now() + timedelta(seconds=row.keep_seconds)
            for failures in (False, True):
                query = select(func.count(), func.sum(BatchResultRow.size_bytes))
                mine = (BatchResultRow.batch == id_, BatchResultRow.failed == failures)
                lines, size = (await session.execute(query.where(*mine))).one()
                if not lines:
                    continue
                kind = "error" if failures else "output"
                file = FileRow(
                    id=f"file-{uuid.uuid4().hex}",
                    tenant=row.tenant,
                    filename=f"{id_}_{kind}.jsonl",
                    purpose="batch_output",
                    size_bytes=size,
                    ready=True,
                    batch=id_,
                    failures=failures,
                    created_at=now(),
                    expires_at=ends,
                )
                session.add(file)
                setattr(row, f"{kind}_file", file.id)
            if state == "completed":
                row.times = row.times | {"finalizing": int(now().timestamp())}
            _move(row, state)

    async def forget(self) -> None:
        """Removes those that ended long ago, with what is left of their results."""
        async with self._database.append() as session:
            over = (BatchRow.created_at < now() - KEPT, BatchRow.state.not_in(UNFINISHED))
            await session.execute(delete(BatchRow).where(*over))
            files = select(BatchRow.id)
            orphans = (FileRow.batch.is_not(None), FileRow.batch.not_in(files))
            await session.execute(delete(FileRow).where(*orphans))


def _move(row: BatchRow, state: State) -> None:
    row.state = state
    row.times = row.times | {state: int(now().timestamp())}


async def _found(session: AsyncSession, tenant: str | None, id_: str) -> BatchRow:
    row = await session.get(BatchRow, plain(id_)[:64])
    if row is None or (tenant is not None and row.tenant != tenant):
        raise BatchNotFound("There is no such batch.")
    return row


async def _counts(session: AsyncSession, rows: Sequence[BatchRow]) -> dict[str, dict[str, int]]:
    """By batch: kept ones of those that have ended, those of the lines so far of all others."""
    found = {row.id: row.counts or dict.fromkeys(_COUNTS, 0) for row in rows}
    running = [row.id for row in rows if row.counts is None]
    if running:
        failed = func.sum(case((BatchResultRow.failed, 1), else_=0))
        sums = [func.sum(getattr(BatchResultRow, name)) for name in _TOKENS]
        query = select(BatchResultRow.batch, func.count() - failed, failed, *sums)
        query = query.where(BatchResultRow.batch.in_(running)).group_by(BatchResultRow.batch)
        for id_, *numbers in (await session.execute(query)).all():
            found[id_] = dict(zip(_COUNTS, map(int, numbers), strict=True))
    return found


def _batch_of(row: BatchRow, counts: dict[str, int] | None = None) -> Batch:
    return Batch(
        id=row.id,
        tenant=row.tenant,
        key=row.key,
        endpoint=row.endpoint,
        input_file=row.input_file,
        output_file=row.output_file,
        error_file=row.error_file,
        state=next(state for state in STATES if state == row.state),
        total=row.total,
        notes=row.notes,
        errors=row.errors,
        times=dict(row.times),
        created_at=row.created_at,
        expires_at=row.expires_at,
        counts=counts or dict.fromkeys(_COUNTS, 0),
    )
