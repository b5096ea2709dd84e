"""Rows of versions: one by its number, and all of all tenants for a start or a check.

A report has kilobytes, and an adapter up to a thousand versions: reports are read only where they are shown,
and then as text.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import Row, Select, Text, and_, cast, func, or_, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from adapters.database.database import Database
from adapters.database.rows import MAX_INTEGER, AdapterRow, FileRow, VersionRow
from adapters.errors import AdapterNotFound
from adapters.model import Version, VersionInfo, is_adapter_name

_PAGE = 500

# What ``version_of`` and ``info_of`` need.
COLUMNS = (
    VersionRow.tenant, VersionRow.adapter, VersionRow.number, VersionRow.digest, VersionRow.rank,
    VersionRow.size_bytes, VersionRow.quarantine, VersionRow.note, VersionRow.uploader, VersionRow.created_at,
    VersionRow.report["chat"].label("chat"), VersionRow.report["probe"]["base"].as_string().label("base"),
    VersionRow.report["labels"].as_integer().label("labels"),
)  # fmt: skip
REPORT = cast(VersionRow.report, Text).label("report")


def answering(*more: Any) -> Select[Any]:
    """Of adapters without a split the live version alone, of the others all: see ``Adapter.shares``."""
    return _pairs(*more).where(or_(AdapterRow.live == VersionRow.number, AdapterRow.split.is_not(None)))


def rows_of(tenant: str, *more: Any) -> Select[Any]:
    return _pairs(*more).where(AdapterRow.tenant == tenant)


def _pairs(*more: Any) -> Select[Any]:
    belongs = and_(AdapterRow.tenant == VersionRow.tenant, AdapterRow.name == VersionRow.adapter)
    query = select(AdapterRow, *COLUMNS, *more).join(VersionRow, belongs)
    return query.order_by(AdapterRow.tenant, AdapterRow.name, VersionRow.number)


def version_of(
    row: Row[Any], path_of: Callable[[str], Path], defaults: Mapping[str, Any] | None = None
) -> Version:
    """The version that ``COLUMNS`` of a row describe; ``defaults`` are those of its adapter."""
    chat = row.chat or {}
    said = {name: value for name, value in (defaults or {}).items() if value is not None}
    return Version(
        tenant=row.tenant,
        adapter=row.adapter,
        number=row.number,
        digest=row.digest,
        path=path_of(row.digest),
        rank=row.rank,
        size_bytes=row.size_bytes,
        quarantine=row.quarantine["reason"] if row.quarantine else None,
        base=row.base,
        chat={**chat, "defaults": {**(chat.get("defaults") or {}), **said}} if chat or said else {},
        labels=row.labels,
    )


def info_of(row: Row[Any], path_of: Callable[[str], Path], defaults: Mapping[str, Any] | None) -> VersionInfo:
    """The version as the admin API shows it; ``defaults`` are those of its adapter."""
    version = version_of(row, path_of, defaults)
    report = getattr(row, "report", None)
    return VersionInfo(version, row.created_at, report, row.quarantine, row.note, row.uploader)


async def version_row(
    session: AsyncSession, tenant: str, name: str, number: int, *, param: str | None = None
) -> VersionRow:
    """The row of a version. AdapterNotFound (``version_not_found``), also for what no database takes."""
    if is_adapter_name(name) and 1 <= number <= MAX_INTEGER:
        found = await session.get(VersionRow, (tenant, name, number))
        if found is not None:
            return found
    raise no_version(name, number, param)


def no_version(name: str, number: int | None, param: str | None = None) -> AdapterNotFound:
    """The error for a version that is not there."""
    message = f"The adapter `{name[:128]}` has no version {number}."
    return AdapterNotFound(message, code="version_not_found", param=param)


async def linked_digests(database: Database) -> set[str]:
    """The files that some version of some tenant has."""
    async with database.read() as session:
        return set(await session.scalars(select(VersionRow.digest).distinct()))


async def size_of(database: Database, tenant: str) -> int:
    """Bytes of all versions and all files of ``tenant``."""
    async with database.read() as session:
        return await bytes_of(session, tenant)


async def bytes_of(session: AsyncSession, tenant: str) -> int:
    """As ``size_of``."""
    return (await _bytes_by(session, [tenant]))[tenant]


async def sizes_of(database: Database, tenants: Collection[str]) -> dict[str, int]:
    """``size_of`` of each of ``tenants``."""
    found: dict[str, int] = {}
    async with database.read() as session:
        for some in slices(tenants):
            found |= await _bytes_by(session, some)
    return found


async def _bytes_by(session: AsyncSession, tenants: Collection[str]) -> dict[str, int]:
    """Of no more tenants than a statement takes."""
    found = dict.fromkeys(tenants, 0)
    for row in (VersionRow, FileRow):
        query = select(row.tenant, func.sum(row.size_bytes)).where(row.tenant.in_(tenants))
        for tenant, size in (await session.execute(query.group_by(row.tenant))).all():
            found[tenant] += int(size)
    return found


async def versions_of(database: Database, digests: Collection[str]) -> dict[str, list[str]]:
    """Digest -> the names ``tenant/adapter@number`` of the versions that have these files."""
    found: dict[str, list[str]] = {digest: [] for digest in digests}
    wanted = sorted(found)
    for some in slices(wanted):
        query = select(VersionRow.digest, VersionRow.tenant, VersionRow.adapter, VersionRow.number).where(
            VersionRow.digest.in_(some)
        )
        async with database.read() as session:
            for digest, tenant, adapter, number in (await session.execute(query)).all():
                found[digest].append(f"{tenant}/{adapter}@{number}")
    return found


def slices(wanted: Collection[str]) -> Iterator[list[str]]:
    """As many at once as a statement takes."""
    every = list(wanted)
    for start in range(0, len(every), _PAGE):
        yield every[start : start + _PAGE]


async def count_of(database: Database, digests: Collection[str], bases: Collection[str] = ()) -> int:
    """How many versions have these files, or were uploaded for another base model than ``bases``, if any."""
    with_files = await versions_of(database, digests) if digests else {}
    count = sum(map(len, with_files.values()))
    if not bases:
        return count
    base = VersionRow.report["probe"]["base"].as_string()
    others = select(VersionRow.digest).where(base.not_in(bases))
    async with database.read() as session:
        return count + sum(digest not in with_files for digest in await session.scalars(others))


async def count_differing(database: Database) -> int:
    """How many of the versions that answer differed from their golden probes when last held against them."""
    belongs = and_(AdapterRow.tenant == VersionRow.tenant, AdapterRow.name == VersionRow.adapter)
    answers = or_(AdapterRow.live == VersionRow.number, AdapterRow.split.is_not(None))
    matches = VersionRow.report["golden"]["matches"].as_boolean()
    query = select(func.count()).select_from(VersionRow).join(AdapterRow, belongs)
    async with database.read() as session:
        probed = VersionRow.golden.is_not(None)
        return await session.scalar(query.where(probed, answers, matches.is_(False))) or 0


async def every(database: Database, path_of: Callable[[str], Path]) -> AsyncIterator[Version]:
    """Every version, those that answer to a bare name first; in pages, so others have their turn.

    One that is linked or deleted meanwhile may be among them or not. Reports are not read, nor quarantine.
    """
    for answering in (True, False):
        last = ("", "", 0)
        while True:
            found = await _page(database, answering, last)
            for tenant, adapter, number, digest, rank, base in found:
                yield Version(tenant, adapter, number, digest, path_of(digest), rank, base=base)
                last = (tenant, adapter, number)
            if len(found) < _PAGE:
                break


async def _page(
    database: Database, answering: bool, last: tuple[str, str, int]
) -> list[tuple[str, str, int, str, int, str | None]]:
    live = AdapterRow.live == VersionRow.number
    where = live | AdapterRow.split.is_not(None)
    place = (VersionRow.tenant, VersionRow.adapter, VersionRow.number)
    query = (
        select(*place, VersionRow.digest, VersionRow.rank, VersionRow.report["probe"]["base"].as_string())
        .join(AdapterRow, (AdapterRow.tenant == VersionRow.tenant) & (AdapterRow.name == VersionRow.adapter))
        .where(func.coalesce(where, False).is_(answering))
        .where(tuple_(*place) > last)
        .order_by(*place)
        .limit(_PAGE)
    )
    async with database.read() as session:
        return [tuple(row) for row in (await session.execute(query)).all()]
