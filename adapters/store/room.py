"""How much a tenant has already, and whether there may be more."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from adapters.database.rows import AdapterRow, VersionRow
from adapters.errors import AdapterConflict, QuotaExceeded
from adapters.model import Quota
from adapters.store.versions import bytes_of


async def check_quota(
    session: AsyncSession, tenant: str, adapter: str, quota: Quota, size_bytes: int
) -> None:
    """QuotaExceeded if a version of ``size_bytes`` would be more than the tenant may have.

    AdapterConflict (``too_many_versions``) if the adapter may have no more, and its oldest do not give way.
    """
    distinct = select(func.count(VersionRow.adapter.distinct())).where(VersionRow.tenant == tenant)
    names, used = await session.scalar(distinct) or 0, await bytes_of(session, tenant)
    there = await has_versions(session, tenant, adapter)
    if quota.adapters is not None and names >= quota.adapters and not there:
        raise QuotaExceeded(
            f"You have {names} adapters, and may have {quota.adapters}. Delete one, or ask for more."
        )
    if quota.size_bytes is not None and used + size_bytes > quota.size_bytes:
        raise QuotaExceeded(
            f"What you store takes {used} bytes, this version {size_bytes}, and you may have"
            f" {quota.size_bytes}. Delete versions that you do not need, or ask for more."
        )
    if quota.versions is not None and there:
        await _check_versions(session, tenant, adapter, quota.versions, quota.keep)


async def _check_versions(session: AsyncSession, tenant: str, adapter: str, most: int, keep: int) -> None:
    query = select(func.count()).where(VersionRow.tenant == tenant, VersionRow.adapter == adapter)
    count = await session.scalar(query) or 0
    if count < most:
        return
    own = await session.scalar(
        select(AdapterRow.keep_versions).where(AdapterRow.tenant == tenant, AdapterRow.name == adapter)
    )
    if 0 < (keep if own is None else own) <= most:
        return
    raise AdapterConflict(
        f"`{adapter}` has {count} versions, and may have {most}. Delete versions that you do not need, or set"
        ' `{"keep_versions": 10}` with a PATCH of the adapter, so that each upload removes the oldest.',
        code="too_many_versions",
    )


async def names_within(session: AsyncSession, tenant: str, after: str, most: int) -> tuple[list[str], bool]:
    """The adapters behind ``after`` that have ``most`` versions together, at least one, and whether there are
    more."""
    query = (
        select(VersionRow.adapter, func.count())
        .where(VersionRow.tenant == tenant, VersionRow.adapter > after)
        .group_by(VersionRow.adapter)
        .order_by(VersionRow.adapter)
        .limit(most + 1)
    )
    names: list[str] = []
    versions = 0
    for name, count in (await session.execute(query)).all():
        versions += count
        if names and versions > most:
            return names, True
        names.append(name)
    return names, False


async def has_versions(session: AsyncSession, tenant: str, adapter: str | None = None) -> bool:
    """Whether the tenant, or this adapter of it, has a version."""
    query = select(VersionRow.number).where(VersionRow.tenant == tenant).limit(1)
    if adapter is not None:
        query = query.where(VersionRow.adapter == adapter)
    return await session.scalar(query) is not None
