"""All customers' adapters, a page at a time and without their reports: for people who look for one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, and_, func, or_, select, tuple_

from adapters.database.database import Database
from adapters.database.rows import AdapterRow, VersionRow, containing
from adapters.model import Tier, Version

Has = Literal["warning", "quarantine", "split"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which adapters; None is any. ``q`` is a part of ``tenant/adapter``, ``after`` the last one of the page
    before, in that form too. ``tier`` is that of the live version."""

    q: str | None = None
    tenant: str | None = None
    tier: Tier | None = None
    has: Has | None = None
    after: str | None = None


async def adapters(
    database: Database, wanted: Wanted, most: int, resident: Mapping[Version, Tier]
) -> list[dict[str, Any]]:
    """As JSON, by tenant and name. ``resident`` are the versions in memory, and where.

    ``warnings`` counts those of the live version, which ``rank``, ``size_bytes`` and ``digest`` are of too.
    """
    live = and_(
        AdapterRow.tenant == VersionRow.tenant,
        AdapterRow.name == VersionRow.adapter,
        AdapterRow.live == VersionRow.number,
    )
    versions = (
        select(func.count())
        .where(VersionRow.tenant == AdapterRow.tenant, VersionRow.adapter == AdapterRow.name)
        .correlate(AdapterRow)
    ).scalar_subquery()
    columns = (VersionRow.digest, VersionRow.rank, VersionRow.size_bytes, VersionRow.created_at)
    query = select(
        AdapterRow, *columns, VersionRow.quarantine, _warnings().label("warnings"), versions.label("versions")
    ).join(VersionRow, live, isouter=True)
    # The row of an adapter outlives its versions.
    query = query.where(versions > 0, *_conditions(wanted, resident))
    query = query.order_by(AdapterRow.tenant, AdapterRow.name).limit(most)
    where = {(v.tenant, v.adapter, v.digest): tier for v, tier in resident.items()}
    async with database.read() as session:
        found = (await session.execute(query)).all()
    return [
        {
            "tenant": row.AdapterRow.tenant,
            "name": row.AdapterRow.name,
            "live": row.AdapterRow.live,
            "default": row.AdapterRow.is_default,
            "pinned": row.AdapterRow.pinned,
            "split": row.AdapterRow.split,
            "tier": where.get((row.AdapterRow.tenant, row.AdapterRow.name, row.digest), Tier.DISK),
            "versions": row.versions,
            "digest": row.digest,
            "rank": row.rank,
            "size_bytes": row.size_bytes,
            "warnings": row.warnings or 0,
            "quarantine": row.quarantine,
            "created_at": row.AdapterRow.created_at.isoformat(),
            "updated_at": row.created_at and row.created_at.isoformat(),
        }
        for row in found
    ]


def _conditions(wanted: Wanted, resident: Mapping[Version, Tier]) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    if wanted.q:
        found.append(containing(AdapterRow.tenant + "/" + AdapterRow.name, wanted.q))
    if wanted.tenant is not None:
        found.append(AdapterRow.tenant == wanted.tenant)
    if wanted.after is not None:
        tenant, _, name = wanted.after.partition("/")
        same = and_(AdapterRow.tenant == tenant, AdapterRow.name > name)
        found.append(or_(AdapterRow.tenant > tenant, same))
    if wanted.tier is Tier.DISK:
        found.append(or_(VersionRow.digest.is_(None), ~_among(resident)))
    elif wanted.tier is not None:
        found.append(_among([version for version, tier in resident.items() if tier is wanted.tier]))
    match wanted.has:
        case "warning":
            found.append(_warnings() > 0)
        case "quarantine":
            found.append(VersionRow.quarantine.is_not(None))
        case "split":
            found.append(AdapterRow.split.is_not(None))
    return found


def _warnings() -> ColumnElement[int]:
    return func.json_array_length(VersionRow.report["warnings"])


def _among(versions: Collection[Version]) -> ColumnElement[bool]:
    names = tuple_(VersionRow.tenant, VersionRow.adapter, VersionRow.digest)
    return names.in_([(version.tenant, version.adapter, version.digest) for version in versions])
