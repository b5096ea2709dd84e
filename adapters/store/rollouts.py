"""Rollouts as rows: which new version gets which part of an adapter's requests, and why.

What a rollout is made of (its document) and what was seen of it (its evidence) are JSON to this module, which
keeps them, and what answers to the adapter, in one transaction: a process may be killed at any point, and the
next one finds either the state before or the one after. ``revision`` grows with every change, so of two that
decide at the same time the second one changes nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any, Literal, get_args

from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import undefer

from adapters.database.audit import note
from adapters.database.cache import ReadCache
from adapters.database.database import Database
from adapters.database.rows import (
    AdapterRow,
    Q,
    RolloutPromptRow,
    RolloutRow,
    TenantRow,
    UsageRow,
    VersionRow,
    now,
)
from adapters.errors import AdapterConflict, AdapterNotFound, AdapterQuarantined
from adapters.model import is_tenant_id, well_formed
from adapters.store.pages import by_time
from adapters.store.versions import version_row

State = Literal["running", "held", "completed", "rolled_back"]
STATES: tuple[State, ...] = get_args(State)
ACTIVE: tuple[State, ...] = ("running", "held")
# Requests read at once.
PAGE = 2000
REMEMBERED = 256  # adapters under rollout, as they were at the last look


@dataclass(frozen=True, slots=True)
class Answering:
    """What is to answer to the adapter's name."""

    live: int | None
    split: Mapping[int, int] | None = None

    @classmethod
    def of(cls, row: AdapterRow) -> Answering:
        return cls.from_json({"live": row.live, "split": row.split})

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Answering:
        """What ``as_json`` gave."""
        split = {int(number): share for number, share in said["split"].items()} if said["split"] else None
        return cls(said["live"], split)

    def as_json(self) -> dict[str, Any]:
        split = {str(number): share for number, share in sorted(self.split.items())} if self.split else None
        return {"live": self.live, "split": split}


@dataclass(frozen=True, slots=True)
class Stored:
    """A rollout's row. ``seen`` is the last row of ``usage`` that its evidence has."""

    id: str
    tenant: str
    adapter: str
    version: int
    state: str
    answering: Answering
    document: Mapping[str, Any]
    evidence: Mapping[str, Any] | None
    seen: int
    revision: int
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class Adapted:
    """An adapter and two of its versions, as they are now; a version that is gone is None."""

    answering: Answering
    quarantined: Mapping[int, str | None]
    reports: Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class RolloutSearch:
    """Which of all customers'; ``after`` is the id of the last one of the page before."""

    tenant: str | None = None
    states: tuple[State, ...] = STATES
    after: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """What of a row of ``usage`` a rollout looks at; not whole rows, of which there may be many a second."""

    id: int
    version: int | None
    outcome: str
    queue_seconds: float
    first_token_seconds: float
    seconds: float
    output_tokens: int
    finish: str | None
    code: str | None = None


_RECORD = [getattr(UsageRow, name) for name in Record.__slots__]


class Rollouts:
    """The rows of all rollouts."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._adapted: ReadCache[tuple[str, int], Adapted | None] = ReadCache(database, REMEMBERED)

    async def start(
        self, tenant: str, adapter: str, version: int, make: Callable[[int], Mapping[str, Any]]
    ) -> Stored:
        """Begins one; ``make`` gives its document, told which version is live.

        AdapterNotFound; AdapterConflict where one is under way (``rollout_running``), the version is live,
        nothing is, or the requests are split by hand. AdapterQuarantined.
        """
        try:
            async with self._database.append() as session:
                row = await _locked(session, tenant, adapter)
                new = await version_row(session, tenant, adapter, version, param="version")
                if await _active(session, tenant, adapter) is not None:
                    raise _running(adapter)
                _check(row, new)
                assert row.live is not None
                at = now()
                made = RolloutRow(
                    id=uuid.uuid4().hex,
                    tenant=tenant,
                    adapter=adapter,
                    version=version,
                    state="running",
                    answering=Answering(row.live).as_json(),
                    document=dict(make(row.live)),
                    evidence=None,
                    seen=await session.scalar(select(func.max(UsageRow.id))) or 0,
                    revision=1,
                    created_at=at,
                    updated_at=at,
                )
                session.add(made)
                note(session, "rollout.create", tenant, f"{adapter}@{version}", after={"rollout": made.id})
                await session.flush()
                return _stored(made)
        except IntegrityError as exc:  # another process was first
            raise _running(adapter) from exc

    async def save(
        self,
        before: Stored,
        *,
        state: str,
        answering: Answering,
        document: Mapping[str, Any],
        evidence: Mapping[str, Any] | None,
        seen: int,
        action: str | None = None,
        replays: Sequence[int] = (),
    ) -> Stored | None:
        """What has become of ``before``, and what answers to the adapter from now on, at once.

        None, with nothing changed, where somebody else has changed the rollout or what answers since.
        ``action`` is what the audit calls it. What only the evidence has gained empties no read cache.
        ``replays`` are rows of ``adapters.store.prompts`` that ``evidence`` has; at its end all go.
        """
        changes = answering != before.answering or state != before.state
        async with (self._database.write if changes else self._database.append)() as session:
            if changes:
                row = await _adapter(session, before.tenant, before.adapter)
                if state in ACTIVE or answering != before.answering:
                    if row is None or Answering.of(row) != before.answering:
                        self._adapted.forget()
                        return None
                    row.live, row.split = answering.live, answering.as_json()["split"]
            values: dict[str, Any] = {
                "state": state,
                "answering": answering.as_json(),
                "document": dict(document),
                "evidence": evidence,
                "seen": seen,
                "revision": before.revision + 1,
                "updated_at": now(),
            }
            mine = (RolloutRow.id == before.id, RolloutRow.revision == before.revision)
            done = await session.execute(update(RolloutRow).where(*mine).values(values))
            if not done.rowcount:  # type: ignore[attr-defined]
                await session.rollback()
                self._adapted.forget()
                return None
            prompts = delete(RolloutPromptRow).where(RolloutPromptRow.rollout == before.id)
            if state not in ACTIVE:
                await session.execute(prompts)
            elif replays:
                await session.execute(prompts.where(RolloutPromptRow.id.in_(replays)))
            if action is not None:
                target = f"{before.adapter}@{before.version}"
                was = before.answering.as_json()
                is_ = answering.as_json()
                note(session, f"rollout.{action}", before.tenant, target, before=was, after=is_)
        made = {
            name: values[name] for name in ("state", "document", "evidence", "seen", "revision", "updated_at")
        }
        return replace(before, answering=answering, **made)

    async def get(self, tenant: str, adapter: str, id_: str) -> Stored:
        """AdapterNotFound (``adapter_not_found``, ``rollout_not_found``)."""
        async with self._database.read() as session:
            row = await _whole(session, id_)
            if row is None or (row.tenant, row.adapter) != (tenant, adapter):
                await _known(session, tenant, adapter)
        if row is None or (row.tenant, row.adapter) != (tenant, adapter):
            raise AdapterNotFound("There is no such rollout.", code="rollout_not_found")
        return _stored(row)

    async def of_adapter(self, tenant: str, adapter: str, most: int) -> list[Stored]:
        """Newest first; without their evidence. AdapterNotFound where the adapter never was."""
        async with self._database.read() as session:
            await _known(session, tenant, adapter)
            query = select(RolloutRow).where(RolloutRow.tenant == tenant, RolloutRow.adapter == adapter)
            newest = query.order_by(RolloutRow.created_at.desc(), RolloutRow.id).limit(most)
            return [_stored(row, whole=False) for row in await session.scalars(newest)]

    async def search(self, search: RolloutSearch, most: int) -> list[Stored]:
        """Of all adapters, newest first; without their evidence. AdapterNotFound (``rollout_not_found``) for
        an ``after`` that no page can have given."""
        query, last = select(RolloutRow).where(RolloutRow.state.in_(search.states)), None
        if search.tenant is not None:
            if not is_tenant_id(search.tenant):
                return []
            query = query.where(RolloutRow.tenant == search.tenant)
        async with self._database.read() as session:
            if search.after is not None:
                last = await session.get(RolloutRow, search.after[:32].replace("\0", ""))
                if last is None or search.tenant not in (None, last.tenant):
                    raise AdapterNotFound(
                        "There is no such rollout.", code="rollout_not_found", param="after"
                    )
            page = by_time(query, RolloutRow, last).limit(most)
            return [_stored(row, whole=False) for row in await session.scalars(page)]

    async def of_version(self, tenant: str, adapter: str, version: int) -> Stored | None:
        """The newest rollout of this version, if there was any."""
        mine = (
            RolloutRow.tenant == tenant,
            RolloutRow.adapter == adapter,
            RolloutRow.version == version,
        )
        query = select(RolloutRow).where(*mine).order_by(RolloutRow.created_at.desc()).limit(1)
        async with self._database.read() as session:
            row = await session.scalar(query)
        return _stored(row, whole=False) if row is not None else None

    async def active(self, tenant: str | None = None, adapter: str | None = None) -> list[Stored]:
        """The rollouts that have not ended, oldest first; of one adapter, or of all."""
        query = select(RolloutRow).where(RolloutRow.state.in_(ACTIVE)).options(undefer(RolloutRow.evidence))
        if tenant is not None:
            query = query.where(RolloutRow.tenant == tenant, RolloutRow.adapter == adapter)
        async with self._database.read() as session:
            rows = await session.scalars(query.order_by(RolloutRow.created_at))
            return [_stored(row) for row in rows]

    async def counts(self) -> dict[str, int]:
        """How many there are in each state."""
        query = select(RolloutRow.state, func.count()).group_by(RolloutRow.state)
        async with self._database.read() as session:
            return {str(state): int(count) for state, count in (await session.execute(query)).all()}

    async def adapted(self, stored: Stored, live: int) -> Adapted | None:
        """The adapter now, with the new version and the one that was live; None where it is gone.

        Remembered until something is written to this database, or ``save`` has found it changed.
        """
        return await self._adapted.get((stored.id, live), partial(self.adapted_now, stored, live))

    async def adapted_now(self, stored: Stored, live: int) -> Adapted | None:
        """As ``adapted``, with what another process has written at this moment."""
        async with self._database.read() as session:
            row = await session.get(AdapterRow, (stored.tenant, stored.adapter))
            if row is None or row.live is None:
                return None
            query = select(VersionRow).where(
                VersionRow.tenant == stored.tenant,
                VersionRow.adapter == stored.adapter,
                VersionRow.number.in_((stored.version, live)),
            )
            found = list(await session.scalars(query))
        reasons = {v.number: v.quarantine["reason"] if v.quarantine else None for v in found}
        return Adapted(Answering.of(row), reasons, {v.number: v.report for v in found})

    async def samples(self, tenant: str) -> bool:
        """Whether the tenant agrees that prompts are kept."""
        async with self._database.read() as session:
            row = await session.get(TenantRow, tenant)
            return row is not None and row.sample_prompts

    @property
    def late(self) -> bool:
        """Whether a row of usage may appear after one of a higher number."""
        return self._database.url.get_backend_name() != "sqlite"

    async def requests(self, stored: Stored, versions: Sequence[int], beyond: int) -> list[Record]:
        """Single requests to the adapter's bare name beyond that row of usage, in order; at most ``PAGE``."""
        query = _compared(select(*_RECORD), stored, versions).where(UsageRow.id > beyond)
        async with self._database.read() as session:
            return [Record(*row) for row in await session.execute(query.order_by(UsageRow.id).limit(PAGE))]

    async def late_requests(
        self, stored: Stored, versions: Sequence[int], floor: int, newest: int, known: Collection[int]
    ) -> list[Record]:
        """Those after ``floor`` up to ``newest`` that are not ``known``: they were committed later."""
        query = _compared(select(UsageRow.id), stored, versions)
        query = query.where(UsageRow.id > floor, UsageRow.id <= newest)
        async with self._database.read() as session:
            missing = [id_ for id_ in await session.scalars(query) if id_ not in known][:PAGE]
            if not missing:
                return []
            rows = select(*_RECORD).where(UsageRow.id.in_(missing)).order_by(UsageRow.id)
            return [Record(*row) for row in await session.execute(rows)]


def _compared(query: Q, stored: Stored, versions: Sequence[int]) -> Q:
    """``query`` for requests of usage that a rollout compares."""
    return query.where(
        UsageRow.tenant == stored.tenant,
        UsageRow.adapter == stored.adapter,
        UsageRow.version.in_(versions),
        UsageRow.request_id.is_not(None),
        UsageRow.numbered.is_(False),
    )


def _check(row: AdapterRow, new: VersionRow) -> None:
    name = f"Version {new.number} of `{new.adapter}`"
    if new.quarantine is not None:
        raise AdapterQuarantined(f"{name} is out of service: {new.quarantine['reason']}.")
    if row.live is None:
        raise AdapterConflict(f"`{new.adapter}` has no live version to compare with. Set one live first.")
    if row.live == new.number:
        raise AdapterConflict(
            f"{name} is live already. Set the version before it live, or upload with `?rollout=standard`.",
            param="version",
        )
    if row.split:
        raise AdapterConflict(f"The requests of `{new.adapter}` are split by hand. End the split first.")


def _running(adapter: str) -> AdapterConflict:
    return AdapterConflict(
        f"A rollout of `{adapter}` is under way. Wait for its end, or roll it back.", code="rollout_running"
    )


async def _whole(session: AsyncSession, id_: str) -> RolloutRow | None:
    query = select(RolloutRow).where(RolloutRow.id == id_[:32].replace("\0", ""))
    found: RolloutRow | None = await session.scalar(query.options(undefer(RolloutRow.evidence)))
    return found


async def _adapter(session: AsyncSession, tenant: str, name: str) -> AdapterRow | None:
    """The adapter's row, locked as by every write to the tenant's adapters."""
    await session.get(TenantRow, tenant, with_for_update=True)
    row: AdapterRow | None = await session.get(AdapterRow, (tenant, name))
    return row


async def _locked(session: AsyncSession, tenant: str, name: str) -> AdapterRow:
    row = await _adapter(session, tenant, name) if well_formed(tenant, name) else None
    if row is None:
        raise _no_adapter(name)
    return row


async def _known(session: AsyncSession, tenant: str, name: str) -> None:
    """AdapterNotFound where the tenant never had an adapter of this name."""
    if not well_formed(tenant, name) or await session.get(AdapterRow, (tenant, name)) is None:
        raise _no_adapter(name)


def _no_adapter(name: str) -> AdapterNotFound:
    return AdapterNotFound(f"There is no adapter `{name[:128]}`.")


async def _active(session: AsyncSession, tenant: str, adapter: str) -> str | None:
    mine = (RolloutRow.tenant == tenant, RolloutRow.adapter == adapter, RolloutRow.state.in_(ACTIVE))
    found: str | None = await session.scalar(select(RolloutRow.id).where(*mine).limit(1))
    return found


def _stored(row: RolloutRow, *, whole: bool = True) -> Stored:
    return Stored(
        id=row.id,
        tenant=row.tenant,
        adapter=row.adapter,
        version=row.version,
        state=row.state,
        answering=Answering.from_json(row.answering),
        document=row.document,
        evidence=row.evidence if whole else None,
        seen=row.seen,
        revision=row.revision,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )
