"""What uploads were answered, for a client that repeats one because it never saw the answer.

The client gives each upload a key of its own (``Idempotency-Key``). A success is kept for a day, in the same
transaction as its version, so that there is never one without the other; a refusal may be tried again. Once
that version is deleted its answer is true no more, and the upload is a new one.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from weakref import WeakValueDictionary

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from adapters.database.database import Database
from adapters.database.rows import UploadRow, VersionRow, steady_now
from adapters.errors import AdapterConflict
from adapters.model import is_tenant_id

IDEMPOTENCY_TTL = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class Receipt:
    """An upload that has an ``Idempotency-Key``. ``answer`` is None until there is a version of it.

    ``outlived`` is when an upload succeeded with this key whose version is gone.
    """

    tenant: str
    key: str
    fingerprint: str
    answer: Mapping[str, Any] | None = None
    outlived: datetime | None = None

    async def keep(self, session: AsyncSession, answer: Mapping[str, Any]) -> None:
        """Stores ``answer`` in the transaction of ``session``, and deletes answers past IDEMPOTENCY_TTL.

        Of two processes that both found the one before outlived, the second fails.
        """
        await session.execute(delete(UploadRow).where(UploadRow.created_at < steady_now() - IDEMPOTENCY_TTL))
        if self.outlived is not None:
            mine = (UploadRow.tenant == self.tenant, UploadRow.key == self.key)
            await session.execute(delete(UploadRow).where(*mine, UploadRow.created_at == self.outlived))
        session.add(
            UploadRow(
                tenant=self.tenant,
                key=self.key,
                fingerprint=self.fingerprint,
                answer=dict(answer),
                created_at=steady_now(),
            )
        )


class Receipts:
    """The answers of uploads that had a key, and one lock a key while an upload runs."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._under_way: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def once(
        self, tenant: str, key: str | None, *asked: object, note: str | None = None, make_live: bool = True
    ) -> AsyncIterator[Receipt | None]:
        """Yields the receipt of the upload that these describe; None without a key.

        Earlier releases kept ``asked`` alone: such a receipt holds where the version has that ``note``, and
        went live or not as asked now.

        Two uploads of one key take turns. Raises AdapterConflict
        (``idempotency_conflict``) if something else was asked with this key.
        """
        if key is None:
            yield None
            return
        more = () if note is None else (("note", note),)
        fingerprint = _fingerprint(*asked, *more, *(() if make_live else ("rollout",)))
        async with self._under_way.setdefault((tenant, key), asyncio.Lock()):
            known, linked, noted = await self._find(tenant, key)
            is_same = known is None or known.fingerprint == fingerprint
            if known is not None and not is_same and known.fingerprint == _fingerprint(*asked):
                is_same = noted == note and (known.answer["live"] == known.answer["version"]) == make_live
            if not is_same:
                raise AdapterConflict(
                    "Another upload has this Idempotency-Key: its name, files or options differ. Take a new"
                    " key for a new upload.",
                    code="idempotency_conflict",
                    param="Idempotency-Key",
                )
            if known is None:
                yield Receipt(tenant, key, fingerprint)
            elif linked:
                yield Receipt(tenant, key, fingerprint, known.answer)
            else:
                yield Receipt(tenant, key, fingerprint, outlived=known.created_at)

    async def has(self, tenant: str, key: str | None) -> bool:
        """Whether an upload with this key has been answered, and its version is still there."""
        return key is not None and (await self._find(tenant, key))[1]

    async def _find(self, tenant: str, key: str) -> tuple[UploadRow | None, bool, str | None]:
        """What is kept under ``key``; whether the version that it tells of is still there; and its note."""
        if not is_tenant_id(tenant):
            return None, False, None
        async with self._database.read() as session:
            row = await session.get(UploadRow, (tenant, key))
            if row is None or row.created_at < steady_now() - IDEMPOTENCY_TTL:
                return None, False, None
            said = row.answer
            version = (VersionRow.adapter == said["adapter"], VersionRow.number == said["version"])
            query = select(VersionRow.digest, VersionRow.note).where(VersionRow.tenant == tenant, *version)
            found = (await session.execute(query)).one_or_none()
        if found is None or found.digest != said["digest"]:
            return row, False, None
        return row, True, found.note


def _fingerprint(*asked: object) -> str:
    return hashlib.sha256(repr(asked).encode()).hexdigest()
