"""Whose adapters there are, their versions, and which version answers. Rows only; the bytes are in ``blobs``.

Rules held here, each within one transaction:
  - version numbers of a name go 1, 2, 3 … and are never used twice, not even after deletes;
  - an adapter has at least one version; the live one and those of a split cannot be deleted;
  - a split ends when a version is made live, as by an upload;
  - a tenant has at most one default adapter: the first one it links, until that is changed. Deleting
    the default leaves none: no customer is answered by another adapter than the one they meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, TypedDict, Unpack

from sqlalchemy import Select, delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from adapters.database.audit import ACTOR, note
from adapters.database.cache import ReadCache
from adapters.database.database import Database
from adapters.database.rows import MAX_INTEGER, AdapterRow, TenantRow, VersionRow, now
from adapters.errors import AdapterConflict, AdapterError, AdapterNotFound, fault, printable
from adapters.inspection.golden import Golden
from adapters.model import (
    DEFAULT_MODEL,
    Adapter,
    Manifest,
    Quota,
    Version,
    is_adapter_name,
    is_tenant_id,
    well_formed,
)
from adapters.split import WHOLE, choose
from adapters.store.idempotency import Receipt
from adapters.store.quarantine import in_service, refuse_quarantined_files, release
from adapters.store.room import check_quota, has_versions, names_within
from adapters.store.verdicts import VERDICTS, has_verdict, with_verdict
from adapters.store.versions import (
    REPORT,
    answering,
    info_of,
    linked_digests,
    no_version,
    rows_of,
    slices,
    version_of,
    version_row,
)

NUMBERED = re.compile(r"([^@]+)@([1-9][0-9]{0,8})", re.ASCII)
RESOLVED = 65_536

# Versions that answer to a name, with their shares in percent.
Shares = tuple[tuple[Version, int], ...]


class AdapterChanges(TypedDict, total=False):
    """What ``update`` may change. ``live``, ``default`` and ``pinned`` stay as they are where None.

    ``split`` (version -> percent, 100 in all) is ended by None, ``keep_versions`` given back to the server;
    ``defaults`` are what requests that say nothing get, over those that a version came with. ``released``
    puts the version that is live then back into service.
    """

    live: int | None
    default: bool | None
    pinned: bool | None
    split: Mapping[int, int] | None
    keep_versions: int | None
    defaults: Mapping[str, Any] | None
    released: bool


class Catalog:
    """``path_of`` turns a digest into the folder of its files; ``reserved`` are names no adapter may take.
    ``problem`` says why a version cannot be served now, if it cannot.

    What a ``tenant`` argument names need not exist: such a tenant has no adapters.
    """

    def __init__(
        self,
        database: Database,
        path_of: Callable[[str], Path],
        *,
        reserved: Collection[str] = (),
        problem: Callable[[Version], AdapterError | None] = lambda _: None,
    ) -> None:
        self._database = database
        self._path_of = path_of
        self._reserved = frozenset(reserved) | {DEFAULT_MODEL}
        self._problem = problem
        self._resolved: ReadCache[tuple[str, str], Shares] = ReadCache(database, RESOLVED)

    async def resolve(self, tenant: str, model: str | None, unit: str = "") -> Version:
        """The version that answers: ``name`` its live one, ``name@3`` the third, None or ``default`` the
        live one of the tenant's default adapter. In a split ``unit`` chooses, see ``adapters.split``.

        Never older than the last write that has returned. AdapterNotFound (``model_not_found``) reads the
        same for a name nobody has and for one that another tenant has. AdapterQuarantined, AdapterUnfit.
        """
        wanted = DEFAULT_MODEL if model is None else model
        shares = await self._resolved.get((tenant, wanted), lambda: self._find(tenant, wanted))
        shares = in_service(shares, self._problem)
        return choose(shares, f"{tenant}/{shares[0][0].adapter}", unit)

    def check_name(self, name: str) -> None:
        """AdapterRejected (``name_invalid``) unless an adapter may be called so."""
        if not is_adapter_name(name):
            raise fault("name_invalid", f"`{printable(name)}` is not an adapter name.", param="name")
        if name in self._reserved:
            raise fault("name_invalid", f"The name `{name}` is reserved.", param="name")

    async def check_quota(self, tenant: str, adapter: str, quota: Quota) -> None:
        """QuotaExceeded or AdapterConflict if a version of ``adapter``, however small, would be too much."""
        async with self._database.read() as session:
            await check_quota(session, tenant, adapter, quota, 1)

    async def link(
        self,
        tenant: str,
        adapter: str,
        *,
        digest: str,
        manifest: Manifest,
        make_live: bool = True,
        golden: Golden | None = None,
        receipt: Receipt | None = None,
        quota: Quota | None = None,
        annotation: str | None = None,
    ) -> tuple[Adapter, Version]:
        """Makes the files under ``digest`` the next version of ``adapter``, which is created if need be.

        ``golden`` and ``annotation``, a note for people, are kept; ``receipt`` keeps what is answered.
        AdapterRejected (``name_invalid``), AdapterNotFound (``tenant_not_found``), QuotaExceeded.
        """
        self.check_name(adapter)
        async with self._database.write() as session:
            if not await _lock(session, tenant):
                raise AdapterNotFound(f"There is no tenant `{printable(tenant)}`.", code="tenant_not_found")
            await refuse_quarantined_files(session, tenant, digest)
            if quota is not None:
                await check_quota(session, tenant, adapter, quota, manifest.size_bytes)
            row = await session.get(AdapterRow, (tenant, adapter))
            if row is None or not await has_versions(session, tenant, adapter):
                first = not await has_versions(session, tenant)
                row = await session.merge(
                    AdapterRow(
                        tenant=tenant,
                        name=adapter,
                        next_version=row.next_version if row else 1,
                        live=None,
                        is_default=first,
                        pinned=False,
                        split=None,
                        keep_versions=None,
                        defaults=None,
                        created_at=now(),
                    )
                )
                await session.flush()
            number, report = row.next_version, manifest.as_json()
            version = VersionRow(
                tenant=tenant,
                adapter=adapter,
                number=number,
                digest=digest,
                rank=manifest.rank,
                size_bytes=manifest.size_bytes,
                report=report,
                golden=golden.model_dump() if golden is not None else None,
                note=annotation,
                uploader=ACTOR.get().name,
                created_at=now(),
            )
            row.next_version += 1
            if make_live:
                row.live, row.split = number, None
            session.add(version)
            await session.flush()
            note(
                session,
                "version.create",
                tenant,
                f"{adapter}@{number}",
                after={"digest": digest, "live": row.live, "size_bytes": manifest.size_bytes}
                | manifest.waived,
            )
            linked = await self._one(session, tenant, adapter)
            if receipt is not None:
                await receipt.keep(session, linked.upload_as_json(number, report))
            return linked, linked.versions[-1].version

    async def adapters(self, tenant: str) -> list[Adapter]:
        """All of the tenant's, by name, each with its versions by number; without their reports."""
        async with self._database.read() as session:
            found = await self._load(session, rows_of(tenant)) if is_tenant_id(tenant) else []
        return sorted(found, key=lambda adapter: adapter.name)

    async def answering(self, tenant: str) -> list[Adapter]:
        """As ``adapters``, of those without a split the live version alone."""
        async with self._database.read() as session:
            query = answering().where(AdapterRow.tenant == tenant)
            found = await self._load(session, query) if is_tenant_id(tenant) else []
        return sorted(found, key=lambda adapter: adapter.name)

    async def page(self, tenant: str, after: str = "", most: int = 1000) -> tuple[list[Adapter], str | None]:
        """Adapters behind ``after``, with their reports: ``most`` versions at most, unless the first one has
        more. Beside them the last one's name where there are more, as the next ``after``."""
        if not is_tenant_id(tenant) or (after and not is_adapter_name(after)):
            return [], None
        async with self._database.read() as session:
            names, more = await names_within(session, tenant, after, most)
            query = rows_of(tenant, REPORT).where(AdapterRow.name.in_(names))
            found = await self._load(session, query)
        return found, names[-1] if more else None

    async def adapter(self, tenant: str, name: str, *, reports: bool = False) -> Adapter:
        """AdapterNotFound if the tenant has none of that name."""
        async with self._database.read() as session:
            return await self._one(session, tenant, name, *([REPORT] if reports else []))

    async def version(
        self,
        tenant: str,
        name: str,
        number: int | None = None,
        *,
        param: str | None = None,
        quarantined: bool = False,
    ) -> Version:
        """One of the adapter's, the live one if None. AdapterNotFound, which names ``param``.

        AdapterQuarantined, AdapterUnfit, unless also one that is ``quarantined`` will do.
        """
        async with self._database.read() as session:
            row = await self._there(session, tenant, name)
            wanted = row.live if number is None else number
            one = rows_of(tenant).where(AdapterRow.name == name, VersionRow.number == wanted)
            found = await self._load(session, one) if 1 <= (wanted or 0) <= MAX_INTEGER else []
        if not found:
            raise no_version(name, wanted, param)
        (info,) = found[0].versions
        return info.version if quarantined else in_service([(info.version, WHOLE)], self._problem)[0][0]

    async def of_files(self, tenant: str, digests: Collection[str]) -> list[Version]:
        """Every version of the tenant that has one of these files; those with the same ones by number."""
        found: list[Adapter] = []
        async with self._database.read() as session:
            for some in slices(digests) if is_tenant_id(tenant) else ():
                found += await self._load(session, rows_of(tenant).where(VersionRow.digest.in_(some)))
        return [info.version for adapter in found for info in adapter.versions]

    async def update(self, tenant: str, name: str, **changes: Unpack[AdapterChanges]) -> Adapter:
        """Changes what is given, all of it or nothing; ``default=True`` takes it from the one that had it.

        AdapterNotFound if the adapter, or a version that is to answer, is not there.
        """
        live, default, pinned = changes.get("live"), changes.get("default"), changes.get("pinned")
        async with self._database.write() as session:
            row = await self._locked(session, tenant, name)
            before = _state(row)
            if live is not None:
                row.live = (await version_row(session, tenant, name, live, param="live")).number
                row.split = None
            if "split" in changes:
                row.split = await self._split(session, tenant, name, changes["split"])
            if "keep_versions" in changes:
                row.keep_versions = changes["keep_versions"]
            if "defaults" in changes:
                row.defaults = dict(changes["defaults"]) if changes["defaults"] else None
            if changes.get("released") and row.live is not None:
                await release(session, tenant, name, row.live)
            if pinned is not None:
                row.pinned = pinned
            if default:
                had = update(AdapterRow).where(AdapterRow.tenant == tenant, AdapterRow.is_default)
                await session.execute(had.values(is_default=False))
            if default is not None:
                row.is_default = default
            await session.flush()
            note(session, "adapter.update", tenant, name, before=before, after=_state(row))
            return await self._one(session, tenant, name)

    async def delete_adapter(self, tenant: str, name: str) -> list[Version]:
        """Returns the versions that went away; their files may still be linked under other names."""
        async with self._database.write() as session:
            row = await self._locked(session, tenant, name)
            gone = (await self._one(session, tenant, name)).versions
            digests = {str(info.version.number): info.version.digest for info in gone}
            note(session, "adapter.delete", tenant, name, before=_state(row) | {"versions": digests})
            await session.execute(
                delete(VersionRow).where(VersionRow.tenant == tenant, VersionRow.adapter == name)
            )
            row.pinned = row.is_default = False
            row.live = row.split = row.keep_versions = row.defaults = None
        return [info.version for info in gone]

    async def delete_version(self, tenant: str, name: str, number: int) -> Version:
        """AdapterConflict for a version that answers, and for the only one: that is ``delete_adapter``."""
        async with self._database.write() as session:
            row = await self._locked(session, tenant, name)
            version = await version_row(session, tenant, name, number)
            infos = (await self._one(session, tenant, name)).versions
            if len(infos) == 1:
                raise AdapterConflict(
                    f"Version {number} is the only version of `{name}`. Delete the adapter instead."
                )
            if row.live == number:
                raise AdapterConflict(
                    f"Version {number} of `{name}` is live. Set another version live first."
                )
            if row.split and str(number) in row.split:
                raise AdapterConflict(
                    f"Version {number} of `{name}` has a share of its requests. End the split first."
                )
            note(session, "version.delete", tenant, f"{name}@{number}", before={"digest": version.digest})
            await session.delete(version)
        return next(info.version for info in infos if info.version.number == number)

    async def keep_newest(self, tenant: str, name: str, keep: int) -> list[Version]:
        """Removes all but the ``keep`` newest versions and those that answer; returns what went."""
        async with self._database.write() as session:
            await _lock(session, tenant)
            query = rows_of(tenant).where(AdapterRow.name == name)
            gone = []
            for adapter in await self._load(session, query):
                answering = {version.number for version, _ in adapter.shares} | {adapter.live}
                older = [info.version for info in adapter.versions[:-keep]]
                gone = [version for version in older if version.number not in answering]
                for version in gone:
                    target = f"{name}@{version.number}"
                    note(session, "version.delete", tenant, target, before={"digest": version.digest})
                await session.execute(
                    delete(VersionRow).where(
                        VersionRow.tenant == tenant,
                        VersionRow.adapter == name,
                        VersionRow.number.in_([version.number for version in gone]),
                    )
                )
        return gone

    async def linked_digests(self) -> set[str]:
        return await linked_digests(self._database)

    async def is_linked(self, digest: str) -> bool:
        """Whether any version of any tenant has these files."""
        async with self._database.read() as session:
            query = select(VersionRow.number).where(VersionRow.digest == digest).limit(1)
            return await session.scalar(query) is not None

    async def probe_of(self, digest: str) -> Mapping[str, Any] | None:
        """What the engine showed of these files when they were last linked, if it was asked."""
        query = select(VersionRow.report["probe"]).where(VersionRow.digest == digest)
        async with self._database.read() as session:
            found: Mapping[str, Any] | None = await session.scalar(
                query.order_by(VersionRow.created_at.desc()).limit(1)
            )
        return found

    async def golden(self, version: Version) -> Golden:
        """The golden probes that a version came with; AdapterNotFound (``probes_not_found``) without any."""
        query = select(VersionRow.golden).where(
            VersionRow.tenant == version.tenant,
            VersionRow.adapter == version.adapter,
            VersionRow.number == version.number,
        )
        async with self._database.read() as session:
            found = await session.scalar(query)
        if found is None:
            raise AdapterNotFound(
                f"Version {version.number} of `{version.adapter}` came without probes.json, so there is"
                " nothing to verify it against. Upload it again with that file.",
                code="probes_not_found",
            )
        return Golden.model_validate(found)

    async def unverified(self, here: Mapping[str, Any]) -> list[Version]:
        """Of the versions that answer, those whose golden probes were not checked ``here``."""
        found = [VersionRow.report[name].label(name) for name in VERDICTS]
        query = answering(*found).where(VersionRow.golden.is_not(None))
        async with self._database.read() as session:
            rows = (await session.execute(query)).all()
        missing = [row for row in rows if not has_verdict(row._mapping, here)]
        return [version_of(row, self._path_of, row.AdapterRow.defaults) for row in missing]

    async def verified(self, version: Version) -> Mapping[str, Any] | None:
        """What the report of a version says of its golden probes."""
        async with self._database.read() as session:
            row = await session.get(VersionRow, (version.tenant, version.adapter, version.number))
        return None if row is None else row.report.get("golden")

    async def keep_verified(self, version: Version, golden: Mapping[str, Any]) -> None:
        """What the report of a version, if it is still there, says of its golden probes, as found last."""
        async with self._database.write() as session:
            row = await session.get(VersionRow, (version.tenant, version.adapter, version.number))
            if row is not None and row.digest == version.digest:
                row.report = with_verdict(row.report, golden)

    async def pinned(self) -> list[Version]:
        """The versions that answer to the names of pinned adapters, by tenant, name and number."""
        async with self._database.read() as session:
            found = await self._load(session, answering().where(AdapterRow.pinned))
        return [version for adapter in found for version, _ in adapter.shares]

    async def count_versions(self) -> int:
        """How many versions there are, of all tenants."""
        async with self._database.read() as session:
            return await session.scalar(select(func.count()).select_from(VersionRow)) or 0

    async def _find(self, tenant: str, model: str) -> Shares:
        numbered = NUMBERED.fullmatch(model)
        name = numbered[1] if numbered else model
        absent = f"The model `{printable(model)}` does not exist."
        query = answering().where(VersionRow.tenant == tenant)
        if model == DEFAULT_MODEL:
            absent = "The tenant has no default adapter with a live version. Name an adapter in `model`."
            query = query.where(AdapterRow.is_default)
        elif numbered:
            query = rows_of(tenant).where(AdapterRow.name == name, VersionRow.number == int(numbered[2]))
        else:
            query = query.where(VersionRow.adapter == name)
        if well_formed(tenant, name):
            async with self._database.read() as session:
                for adapter in await self._load(session, query):
                    if numbered:
                        return tuple((info.version, WHOLE) for info in adapter.versions)
                    if adapter.shares:
                        return adapter.shares
        raise AdapterNotFound(absent, code="model_not_found", param="model")

    async def _one(self, session: AsyncSession, tenant: str, name: str, *more: Any) -> Adapter:
        if well_formed(tenant, name):
            for adapter in await self._load(session, rows_of(tenant, *more).where(AdapterRow.name == name)):
                return adapter
        raise AdapterNotFound(f"There is no adapter `{printable(name)}`.")

    async def _load(self, session: AsyncSession, query: Select[Any]) -> list[Adapter]:
        rows = (await session.execute(query)).all()
        return [
            Adapter(
                tenant=adapter.tenant,
                name=adapter.name,
                live=adapter.live,
                default=adapter.is_default,
                pinned=adapter.pinned,
                created_at=adapter.created_at,
                versions=tuple(info_of(row, self._path_of, adapter.defaults) for row in group),
                split={int(n): share for n, share in adapter.split.items()} if adapter.split else None,
                keep_versions=adapter.keep_versions,
                defaults=adapter.defaults,
            )
            for adapter, group in groupby(rows, key=lambda row: row.AdapterRow)
        ]

    async def _locked(self, session: AsyncSession, tenant: str, name: str) -> AdapterRow:
        """The row of an adapter that has versions; AdapterNotFound."""
        await _lock(session, tenant)
        return await self._there(session, tenant, name)

    async def _there(self, session: AsyncSession, tenant: str, name: str) -> AdapterRow:
        if well_formed(tenant, name) and await has_versions(session, tenant, name):
            return await session.get_one(AdapterRow, (tenant, name))
        raise AdapterNotFound(f"There is no adapter `{printable(name)}`.")

    async def _split(
        self, session: AsyncSession, tenant: str, name: str, split: Mapping[int, int] | None
    ) -> dict[str, int] | None:
        if split is None:
            return None
        if sum(split.values()) != WHOLE or min(split.values()) < 1:
            raise ValueError(f"shares are positive and add up to {WHOLE}, unlike {split}")
        for number in split:
            await version_row(session, tenant, name, number, param="split")
        return {str(number): share for number, share in sorted(split.items())}


def _state(row: AdapterRow) -> dict[str, Any]:
    """What the audit shows of an adapter."""
    return {
        "live": row.live,
        "split": row.split,
        "keep_versions": row.keep_versions,
        "defaults": row.defaults,
        "default": row.is_default,
        "pinned": row.pinned,
    }


async def _lock(session: AsyncSession, tenant: str) -> bool:
    """Whether the tenant exists. Every write to its adapters starts here: on PostgreSQL the lock on its
    row keeps another process (a restart that overlaps, the command line) from counting along."""
    return is_tenant_id(tenant) and bool(await session.get(TenantRow, tenant, with_for_update=True))
