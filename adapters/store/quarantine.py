"""Versions out of service: which, why and since when.

A version that made NaN, or that was running whenever the engine died, is refused until an operator releases
it. It goes by the files: every version of the tenant with the same digest is quarantined with it, and the
same files are not linked again, or another upload would undo it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import defer

from adapters.database.audit import note
from adapters.database.database import Database
from adapters.database.rows import VersionRow, now
from adapters.errors import AdapterError, AdapterQuarantined, AdapterUnfit
from adapters.model import Version
from adapters.store.versions import version_row

Shares = tuple[tuple[Version, int], ...]


class Quarantine:
    """The rows that say so. Every change is in the audit."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put(self, version: Version, reason: str) -> bool:
        """Takes the files of ``version`` out of service for its tenant; False where they were already.

        The first reason is kept: what follows may be its consequence.
        """
        async with self._database.write() as session:
            rows = await _rows_of(session, version.tenant, version.digest)
            fresh = [row for row in rows if row.quarantine is None]
            for row in fresh:
                row.quarantine = {"reason": reason[:500], "at": now().isoformat()}
                target = f"{row.adapter}@{row.number}"
                note(session, "version.quarantine", row.tenant, target, after=row.quarantine)
        return bool(fresh)

    async def check(self, tenant: str, digest: str) -> None:
        """Raises AdapterQuarantined where the tenant has a quarantined version of these files."""
        async with self._database.read() as session:
            await refuse_quarantined_files(session, tenant, digest)

    async def release(self, tenant: str, name: str, number: int) -> None:
        """Puts the files of a version back into service; nothing to do where they are. AdapterNotFound."""
        async with self._database.write() as session:
            await release(session, tenant, name, number)

    async def count(self) -> int:
        """How many versions of all tenants are out of service."""
        query = select(func.count()).select_from(VersionRow).where(VersionRow.quarantine.is_not(None))
        async with self._database.read() as session:
            return await session.scalar(query) or 0


async def release(session: AsyncSession, tenant: str, name: str, number: int) -> None:
    """``Quarantine.release`` as a part of another change."""
    found = await version_row(session, tenant, name, number)
    for row in await _rows_of(session, tenant, found.digest):
        if row.quarantine is not None:
            target = f"{row.adapter}@{row.number}"
            note(session, "version.release", tenant, target, before=row.quarantine)
            row.quarantine = None


def in_service(
    shares: Sequence[tuple[Version, int]],
    problem: Callable[[Version], AdapterError | None] = lambda _: None,
) -> Shares:
    """Those of ``shares`` that may answer. Where none may: AdapterQuarantined, or what ``problem`` says.

    In a split the others take over: the operator has said of each of them that it may answer to the name, and
    a canary that fails must not take a part of the customer's requests with it. No version outside of the
    split takes the place of a quarantined one: nobody has said that it may answer.
    """
    released = [(version, share) for version, share in shares if version.quarantine is None]
    if shares and not released:
        first = shares[0][0]
        raise _quarantined(first.adapter, first.number, str(first.quarantine))
    well = tuple((version, share) for version, share in released if problem(version) is None)
    if not well and released and (why := problem(released[0][0])) is not None:
        if isinstance(why, AdapterUnfit):
            why.version = released[0][0].adapter, released[0][0].number
        raise why
    return well


async def refuse_quarantined_files(session: AsyncSession, tenant: str, digest: str) -> None:
    """Raises AdapterQuarantined where the tenant has a quarantined version of the same files."""
    query = _of(tenant, digest).where(VersionRow.quarantine.is_not(None)).limit(1)
    if (row := await session.scalar(query)) is not None and row.quarantine is not None:
        raise _quarantined(row.adapter, row.number, row.quarantine["reason"])


async def _rows_of(session: AsyncSession, tenant: str, digest: str) -> Sequence[VersionRow]:
    return (await session.scalars(_of(tenant, digest))).all()


def _of(tenant: str, digest: str) -> Select[VersionRow]:
    query = select(VersionRow).where(VersionRow.tenant == tenant, VersionRow.digest == digest)
    return query.options(defer(VersionRow.report, raiseload=True))


def _quarantined(adapter: str, number: int, reason: str) -> AdapterQuarantined:
    error = AdapterQuarantined(
        f"Version {number} of `{adapter}` is out of service: {reason}. Upload another version, or ask the"
        " operator to release it."
    )
    error.version = adapter, number
    return error
