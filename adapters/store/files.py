"""Customers' files, as OpenAI's ``/v1/files`` has them: requests of batches, and what batches wrote.

Their bytes are rows, not files of the data folder: the gateways of a fleet share no folder, a backup has them
as of the same moment as the batches that read them, and a tenant that is removed takes them along.

    file_pieces     what was uploaded, in pieces of ``PIECE`` bytes
    batch_results   what a batch wrote, a row a line; its files are these rows, in the order of the lines
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, case, delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from adapters.database.database import Database
from adapters.database.rows import BatchResultRow, BatchRow, FilePieceRow, FileRow, now
from adapters.errors import FileInUse, FileNotFound, QuotaExceeded
from adapters.store.pages import by_time

PIECE = 64 << 10
# Pieces of one transaction, and lines of one look.
_TOGETHER, _PAGE = 16, 200
# Of one tenant.
MAX_FILES = 10_000
# A file whose bytes stopped coming is removed when it is so old.
_ABANDONED = timedelta(days=1)
# States in which a batch still reads its input.
UNFINISHED = ("validating", "in_progress", "cancelling")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """``size_bytes`` is that of its content. ``purpose`` is ``batch`` or ``batch_output``."""

    id: str
    tenant: str
    filename: str
    purpose: str
    size_bytes: int
    created_at: datetime
    expires_at: datetime | None
    batch: str | None
    failures: bool


class Files:
    """The rows. Writing one empties no read cache."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def receive(self, tenant: str, content: AsyncIterator[bytes]) -> StoredFile:
        """Keeps ``content``; nobody finds it before ``publish``. Raises QuotaExceeded for too many files.

        What reading raises comes through, and nothing is left.
        """
        row = FileRow(
            id=f"file-{uuid.uuid4().hex}",
            tenant=tenant,
            filename="",
            purpose="",
            size_bytes=0,
            ready=False,
            failures=False,
            created_at=now(),
        )
        async with self._database.append() as session:
            mine = select(func.count()).where(FileRow.tenant == tenant)
            if (await session.scalar(mine) or 0) >= MAX_FILES:
                raise QuotaExceeded(f"You have {MAX_FILES} files. Delete those that you do not need.")
            session.add(row)
        try:
            size = 0
            async for first, pieces in _numbered(content):
                size += sum(map(len, pieces))
                await self._keep(row.id, first, pieces)
        except BaseException:
            await self._remove(row.id)
            raise
        row.size_bytes = size
        return _file_of(row)

    async def publish(self, file: StoredFile, purpose: str, filename: str, keep: timedelta) -> StoredFile:
        """Lets a received file be found, until ``keep`` from now."""
        values = {
            "purpose": purpose,
            "filename": plain(filename)[:255],
            "size_bytes": file.size_bytes,
            "ready": True,
            "expires_at": now() + keep,
        }
        async with self._database.append() as session:
            await session.execute(update(FileRow).where(FileRow.id == file.id).values(values))
        return await self.get(file.tenant, file.id)

    async def discard(self, file: StoredFile) -> None:
        """Removes a received file that is not to be found."""
        await self._remove(file.id)

    async def _keep(self, id_: str, first: int, pieces: list[bytes]) -> None:
        async with self._database.append() as session:
            session.add_all(FilePieceRow(file=id_, number=first + i, data=p) for i, p in enumerate(pieces))

    async def _remove(self, id_: str) -> None:
        async with self._database.append() as session:
            await session.execute(delete(FileRow).where(FileRow.id == id_))

    async def get(self, tenant: str, id_: str) -> StoredFile:
        """FileNotFound where the tenant has no such file, or it has expired."""
        async with self._database.read() as session:
            return _file_of(await _found(session, tenant, id_))

    async def read_by_batch(self, id_: str) -> StoredFile:
        """The input of a batch that has not ended, expired or not. FileNotFound."""
        async with self._database.read() as session:
            row = await session.get(FileRow, id_)
        if row is None:
            raise FileNotFound("There is no such file.")
        return _file_of(row)

    async def search(
        self, tenant: str, *, purpose: str | None, after: str | None, most: int, oldest: bool
    ) -> list[StoredFile]:
        """Newest first, or ``oldest``. FileNotFound for an ``after`` that is none of the tenant's."""
        query = select(FileRow).where(FileRow.tenant == tenant, FileRow.ready, _lives())
        if purpose is not None:
            query = query.where(FileRow.purpose == plain(purpose))
        async with self._database.read() as session:
            last = None if after is None else await _found(session, tenant, after)
            page = by_time(query, FileRow, last, oldest=oldest).limit(most)
            return [_file_of(row) for row in await session.scalars(page)]

    async def content(self, file: StoredFile) -> AsyncIterator[bytes]:
        """Its bytes, some at a time. What is removed meanwhile is missing at the end."""
        if file.batch is not None:
            async for lines in self._lines(file.batch, file.failures):
                yield "".join(f"{line}\n" for line in lines).encode()
            return
        first = 0
        while True:
            query = select(FilePieceRow.data).where(FilePieceRow.file == file.id)
            query = query.where(FilePieceRow.number >= first, FilePieceRow.number < first + _TOGETHER)
            async with self._database.read() as session:
                pieces = list(await session.scalars(query.order_by(FilePieceRow.number)))
            if not pieces:
                return
            yield b"".join(pieces)
            first += _TOGETHER

    async def _lines(self, batch: str, failures: bool) -> AsyncIterator[list[str]]:
        number = 0
        while True:
            query = select(BatchResultRow.number, BatchResultRow.document)
            query = query.where(BatchResultRow.batch == batch, BatchResultRow.failed == failures)
            query = query.where(BatchResultRow.number > number).order_by(BatchResultRow.number).limit(_PAGE)
            async with self._database.read() as session:
                rows = (await session.execute(query)).all()
            if not rows:
                return
            yield [row.document for row in rows]
            number = rows[-1].number

    async def delete(self, tenant: str, id_: str) -> None:
        """FileNotFound; FileInUse while a batch reads it."""
        async with self._database.append() as session:
            row = await _found(session, tenant, id_)
            reads = select(BatchRow.id).where(BatchRow.input_file == row.id, BatchRow.state.in_(UNFINISHED))
            if (batch := await session.scalar(reads.limit(1))) is not None:
                raise FileInUse(f"The batch {batch} reads this file. Cancel it first, or wait for its end.")
            await _delete(session, [row])

    async def expire(self) -> int:
        """Removes what has expired or was abandoned, but for what a batch still reads; returns how many."""
        reading = select(BatchRow.input_file).where(BatchRow.state.in_(UNFINISHED))
        over = or_(FileRow.expires_at < now(), and_(~FileRow.ready, FileRow.created_at < now() - _ABANDONED))
        async with self._database.append() as session:
            query = select(FileRow).where(over, FileRow.id.not_in(reading)).limit(_PAGE)
            rows = list(await session.scalars(query))
            await _delete(session, rows)
        return len(rows)


@dataclass(frozen=True, slots=True)
class IncompleteFile:
    """``stored_bytes`` are on record, of the ``size_bytes`` that were acknowledged."""

    file: str
    tenant: str
    size_bytes: int
    stored_bytes: int


async def incomplete_files(database: Database) -> list[IncompleteFile]:
    """Customers' files whose bytes are not all there, or are too many; of one moment."""
    async with database.read() as session:
        return [IncompleteFile(*row) for row in (await session.execute(incomplete())).all()]


def incomplete() -> Select[str, str, int, Any]:
    """Asks for the fields of ``IncompleteFile``."""
    pieces = select(func.sum(func.length(FilePieceRow.data))).where(FilePieceRow.file == FileRow.id)
    lines = select(func.sum(BatchResultRow.size_bytes)).where(
        BatchResultRow.batch == FileRow.batch, BatchResultRow.failed == FileRow.failures
    )
    stored = func.coalesce(
        case((FileRow.batch.is_(None), pieces.scalar_subquery()), else_=lines.scalar_subquery()), 0
    )
    query = select(FileRow.id, FileRow.tenant, FileRow.size_bytes, stored)
    return query.where(FileRow.ready, stored != FileRow.size_bytes).order_by(FileRow.id)


async def _found(session: AsyncSession, tenant: str, id_: str) -> FileRow:
    query = select(FileRow).where(FileRow.id == plain(id_)[:64], FileRow.tenant == tenant)
    row = await session.scalar(query.where(FileRow.ready, _lives()))
    if row is None:
        raise FileNotFound("There is no such file.")
    return row


async def _delete(session: AsyncSession, rows: Iterable[FileRow]) -> None:
    for row in rows:
        await session.execute(delete(FileRow).where(FileRow.id == row.id))
        if row.batch is not None:
            results = delete(BatchResultRow).where(BatchResultRow.batch == row.batch)
            await session.execute(results.where(BatchResultRow.failed == row.failures))


def _lives() -> ColumnElement[bool]:
    return or_(FileRow.expires_at.is_(None), FileRow.expires_at > now())


async def _numbered(content: AsyncIterator[bytes]) -> AsyncIterator[tuple[int, list[bytes]]]:
    """(number of the first, pieces) of what one transaction keeps."""
    first, left = 0, bytearray()
    async for chunk in content:
        left += chunk
        while len(left) >= PIECE * _TOGETHER:
            whole = bytes(left[: PIECE * _TOGETHER])
            del left[: PIECE * _TOGETHER]
            yield first, _cut(whole)
            first += _TOGETHER
    if left:
        yield first, _cut(bytes(left))


def _cut(data: bytes) -> list[bytes]:
    return [data[at : at + PIECE] for at in range(0, len(data), PIECE)]


def plain(text: str) -> str:
    """``text`` as every database takes it."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def _file_of(row: FileRow) -> StoredFile:
    return StoredFile(
        id=row.id,
        tenant=row.tenant,
        filename=row.filename,
        purpose=row.purpose,
        size_bytes=row.size_bytes,
        created_at=row.created_at,
        expires_at=row.expires_at,
        batch=row.batch,
        failures=bool(row.failures),
    )
