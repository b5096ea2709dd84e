"""Tenants and their keys, as they are stored. ``server.accounts.authentication`` tells who is asking.

A key is shown once, when it is issued; only its SHA-256 is kept.
"""

from __future__ import annotations

import builtins
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Literal, TypedDict, Unpack

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import delete, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from adapters.database.audit import note
from adapters.database.database import Database
from adapters.database.rows import (
    MAX_INTEGER,
    KeyRow,
    RolloutPromptRow,
    RolloutRow,
    TenantRow,
    VersionRow,
    containing,
    now,
)
from adapters.model import TENANT_PATTERN, is_tenant_id
from server.accounts.keys import (
    DEFAULT_SCOPES,
    IssuedKey,
    KeyInfo,
    KeyScope,
    check_expiry,
    digest_of,
    key_info,
)
from server.accounts.terms import (
    MAX_WEIGHT,
    MIN_WEIGHT,
    Budgets,
    KeyLimits,
    LimitSettings,
    Places,
    TenantLimits,
    Weight,
)
from server.errors import Conflict, Forbidden, NotFound, Unprocessable

Priority = Literal["interactive", "standard", "batch"]
# What a priority multiplies a weight by. Beside others that wait, batch is left one part in a hundred, so
# that it is never forgotten; alone it has everything.
PRIORITIES: dict[Priority, float] = {"interactive": 4.0, "standard": 1.0, "batch": 0.01}

# Ends the name of a queue of requests in the background; no tenant's id has a slash.
BACKGROUND = "/batch"
KEY_ID = re.compile(r"[0-9a-f]{16}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Tenant:
    """A customer. ``max_queued`` and ``max_running`` are None where the server's own limits hold.

    ``weight`` is its share relative to others of its priority. ``cache_salt`` keeps its prefix cache apart
    from everybody else's and is never shown. ``key`` is the one it came with, None where a gateway vouches.
    ``background`` where nobody waits for its request: see ``in_background``. ``sample_prompts`` if it agrees
    that rollouts keep some of its prompts for a while.
    """

    id: str
    name: str
    weight: float
    base_allowed: bool
    max_queued: int | None
    max_running: int | None
    created_at: datetime
    cache_salt: str = field(repr=False)
    priority: Priority = "standard"
    limits: TenantLimits | None = None
    budgets: Budgets | None = None
    suspended: bool = False
    sample_prompts: bool = False
    key: KeyInfo | None = field(default=None, compare=False)
    background: bool = False

    def check(self) -> None:
        """Forbidden (``tenant_suspended``) while it is suspended."""
        if self.suspended:
            raise Forbidden("This account is suspended. Ask the operator.", code="tenant_suspended")

    @property
    def share(self) -> float:
        """Its weight among all tenants, whatever their priority."""
        return self.weight * PRIORITIES[self.priority]

    @property
    def queue(self) -> str:
        """Where its requests wait: those in the background apart, so that they delay none of its others."""
        return f"{self.id}{BACKGROUND}" if self.background else self.id

    def in_background(self) -> Tenant:
        """The same, as of whom a request is that nobody waits for: with the priority ``batch``."""
        return replace(self, priority="batch", background=True)

    def as_json(self) -> dict[str, Any]:
        """As JSON for the operator."""
        plain = (
            "id", "name", "weight", "priority", "base_allowed", "max_queued", "max_running", "suspended",
            "sample_prompts",
        )  # fmt: skip
        return {name: getattr(self, name) for name in plain} | {
            "created_at": self.created_at.isoformat(),
            "limits": (self.limits.stored() if self.limits else None) or {},
            "budgets": (self.budgets.stored() if self.budgets else None) or {},
        }


class TenantChanges(TypedDict, total=False):
    """What ``update`` may change; None for a limit gives it back to the server.

    Of ``limits`` and ``budgets`` only what is set in them changes.
    """

    name: str
    weight: float
    priority: Priority
    base_allowed: bool
    max_queued: int | None
    max_running: int | None
    limits: TenantLimits
    budgets: Budgets
    suspended: bool
    sample_prompts: bool


class KeyChanges(TypedDict, total=False):
    """What ``update_key`` may change; of ``limits`` only what is set in them."""

    name: str | None
    scopes: Sequence[KeyScope]
    expires_at: datetime | None
    limits: KeyLimits


class Tenants:
    """Tenants and their keys, as rows of ``database``."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self,
        id: str,
        *,
        name: str | None = None,
        weight: float = 1.0,
        base_allowed: bool = True,
        max_queued: int | None = None,
        max_running: int | None = None,
        priority: Priority = "standard",
        limits: TenantLimits | None = None,
        budgets: Budgets | None = None,
        sample_prompts: bool = False,
    ) -> Tenant:
        """``name`` is the id if None. Conflict if the id is taken, Unprocessable for what cannot be."""
        if not is_tenant_id(id):
            raise Unprocessable(f"A tenant id has the form {TENANT_PATTERN}.", param="id")
        settings: TenantChanges = {
            "name": id if name is None else name,
            "weight": weight,
            "priority": priority,
            "base_allowed": base_allowed,
            "max_queued": max_queued,
            "max_running": max_running,
            "sample_prompts": sample_prompts,
        }
        _check(settings)
        row = TenantRow(
            id=id,
            cache_salt=secrets.token_urlsafe(32),
            created_at=now(),
            limits=limits.stored() if limits else None,
            budgets=budgets.stored() if budgets else None,
            **settings,
        )
        async with self._database.write() as session:
            session.add(row)
            try:
                await session.flush()
            except IntegrityError:
                raise Conflict(f"The tenant `{id}` exists already.", param="id") from None
            note(session, "tenant.create", id, after=tenant_of(row).as_json())
        return tenant_of(row)

    async def get(self, id: str) -> Tenant:
        async with self._database.read() as session:
            return tenant_of(await _row(session, id))

    async def update(self, id: str, /, **changes: Unpack[TenantChanges]) -> Tenant:
        """Changes what is given, all of it or nothing. NotFound, Unprocessable."""
        _check(changes)
        async with self._database.write() as session:
            row = await _row(session, id, lock=True)
            if changes.get("sample_prompts") is False:
                rollouts = select(RolloutRow.id).where(RolloutRow.tenant == id)
                await session.execute(delete(RolloutPromptRow).where(RolloutPromptRow.rollout.in_(rollouts)))
            before = tenant_of(row).as_json()
            for column, value in changes.items():
                if isinstance(value, LimitSettings):
                    value = type(value)(**(getattr(row, column) or {})).changed(value).stored()
                setattr(row, column, value)
            note(session, "tenant.update", id, before=before, after=tenant_of(row).as_json())
        return tenant_of(row)

    async def delete(self, id: str) -> set[str]:
        """Removes the tenant with its keys and adapters. NotFound.

        Returns the digests its versions had: another tenant may have the same files, so ask
        ``Catalog.is_linked`` before removing any.
        """
        async with self._database.write() as session:
            # Locked first, as in ``Catalog.link``: a version linked meanwhile would be missing in the answer.
            row = await _row(session, id, lock=True)
            note(session, "tenant.delete", id, before=tenant_of(row).as_json())
            digests = set(await session.scalars(select(VersionRow.digest).where(VersionRow.tenant == id)))
            await session.execute(delete(TenantRow).where(TenantRow.id == id))
        return digests

    async def issue_key(
        self,
        tenant: str,
        name: str | None = None,
        *,
        scopes: Sequence[KeyScope] = DEFAULT_SCOPES,
        expires_at: datetime | None = None,
        limits: KeyLimits | None = None,
    ) -> IssuedKey:
        """A key of 256 random bits. NotFound, Unprocessable."""
        if name is not None:
            _check({"name": name})
        check_expiry(expires_at)
        key, row = _new_key(tenant)
        row.name, row.scopes, row.expires_at = name, list(scopes), expires_at
        row.limits = limits.stored() if limits else None
        async with self._database.write() as session:
            await _row(session, tenant, lock=True)
            session.add(row)
            note(session, "key.create", tenant, row.id, after=key_info(row).as_json())
        return IssuedKey(id=row.id, name=name, created_at=row.created_at, key=key)

    async def rotate_key(self, tenant: str, key_id: str, overlap: timedelta) -> tuple[IssuedKey, KeyInfo]:
        """A new key with all that the old one has, and the old one, which expires after ``overlap``.

        NotFound; Conflict if the old one has expired already.
        """
        key, row = _new_key(tenant)
        async with self._database.write() as session:
            old = await self._key(session, tenant, key_id)
            if old.expires_at is not None and old.expires_at <= row.created_at:
                raise Conflict("This key has expired. Issue a new one.")
            row.name, row.scopes = old.name, old.scopes
            row.limits, row.expires_at = old.limits, old.expires_at
            session.add(row)
            before, ends = key_info(old).as_json(), row.created_at + overlap
            old.expires_at = ends if old.expires_at is None else min(ends, old.expires_at)
            note(session, "key.rotate", tenant, old.id, before=before, after=key_info(old).as_json())
            note(session, "key.create", tenant, row.id, after=key_info(row).as_json())
        return IssuedKey(id=row.id, name=row.name, created_at=row.created_at, key=key), key_info(old)

    async def update_key(self, tenant: str, key_id: str, /, **changes: Unpack[KeyChanges]) -> KeyInfo:
        """Changes what is given, all of it or nothing, from the next request on. NotFound, Unprocessable."""
        if (name := changes.get("name")) is not None:
            _check({"name": name})
        check_expiry(changes.get("expires_at"))
        async with self._database.write() as session:
            row = await self._key(session, tenant, key_id)
            before = key_info(row).as_json()
            for column, value in changes.items():
                if isinstance(value, KeyLimits):
                    value = KeyLimits(**(row.limits or {})).changed(value).stored()
                setattr(row, column, list(value) if column == "scopes" else value)  # type: ignore[call-overload]
            after = key_info(row)
            note(session, "key.update", tenant, key_id, before=before, after=after.as_json())
        return after

    async def keys(self, tenant: str) -> builtins.list[KeyInfo]:
        """The tenant's keys, oldest first. NotFound."""
        async with self._database.read() as session:
            await _row(session, tenant)
            query = select(KeyRow).where(KeyRow.tenant == tenant).order_by(KeyRow.created_at, KeyRow.id)
            return [key_info(row) for row in await session.scalars(query)]

    async def revoke(self, tenant: str, key_id: str) -> None:
        """The key is refused from the moment this returns. NotFound."""
        async with self._database.write() as session:
            row = await self._key(session, tenant, key_id)
            note(session, "key.revoke", tenant, key_id, before=key_info(row).as_json())
            await session.delete(row)

    @staticmethod
    async def _key(session: AsyncSession, tenant: str, key_id: str) -> KeyRow:
        """To be changed; NotFound."""
        await _row(session, tenant, lock=True)
        row = await session.get(KeyRow, key_id) if KEY_ID.fullmatch(key_id) else None
        if row is None or row.tenant != tenant:
            raise NotFound(f"The tenant `{tenant}` has no such key.")
        return row

    async def list(
        self, *, q: str | None = None, after: str | None = None, most: int | None = None
    ) -> builtins.list[Tenant]:
        """By id: all, or the first ``most`` after the id ``after``; ``q`` is a part of the id or the name."""
        query = select(TenantRow).order_by(TenantRow.id).limit(most)
        if q:
            query = query.where(or_(containing(TenantRow.id, q), containing(TenantRow.name, q)))
        if after is not None:
            query = query.where(TenantRow.id > after)
        async with self._database.read() as session:
            found = [tenant_of(row) for row in await session.scalars(query)]
        return found if most is not None else sorted(found, key=lambda tenant: tenant.id)


def _new_key(tenant: str) -> tuple[str, KeyRow]:
    key = f"lp-{secrets.token_urlsafe(32)}"
    return key, KeyRow(id=secrets.token_hex(8), tenant=tenant, digest=digest_of(key), created_at=now())


async def _row(session: AsyncSession, id: str, *, lock: bool = False) -> TenantRow:
    """NotFound. ``lock`` it to write: on PostgreSQL another process then waits for its turn."""
    # PostgreSQL refuses some text (NUL, lone surrogates), so the id is looked at before it is asked.
    row = await session.get(TenantRow, id, with_for_update=lock) if is_tenant_id(id) else None
    if row is None:
        raise NotFound(f"There is no tenant `{id}`." if is_tenant_id(id) else "There is no such tenant.")
    return row


def _check(changes: TenantChanges) -> None:
    """Unprocessable for the first value that cannot be."""
    for name, value in changes.items():
        if name not in RULES:
            raise Unprocessable(f"A tenant has no setting `{name}`.")
        allowed, form = RULES[name]
        if not allowed(value):
            raise Unprocessable(f"`{name}` must be {form}.", param=name)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= 200 and value.isprintable()


def _is(type_: Any) -> Callable[[Any], bool]:
    """Whether a value is one of ``type_``, with the bounds that its annotations give."""
    adapter: TypeAdapter[Any] = TypeAdapter(type_)

    def holds(value: Any) -> bool:
        try:
            adapter.validate_python(value, strict=True)
        except ValidationError:
            return False
        return True

    return holds


_BOOL = _is(bool), "true or false"
_PLACES = _is(Places), f"a whole number from 1 to {MAX_INTEGER}, or null for the server's own limit"
# The bounds are those of the types, which the API's bodies have too; here are the words for what is refused.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (_is_name, "1 to 200 printable characters"),
    "weight": (_is(Weight), f"a number from {MIN_WEIGHT} to {MAX_WEIGHT:g}"),
    "priority": (_is(Priority), f"one of {', '.join(PRIORITIES)}"),
    "suspended": _BOOL,
    "sample_prompts": _BOOL,
    "base_allowed": _BOOL,
    "max_queued": _PLACES,
    "limits": (_is(TenantLimits), "limits"),
    "budgets": (_is(Budgets), "budgets"),
    "max_running": _PLACES,
}


def tenant_of(row: TenantRow) -> Tenant:
    """The tenant that ``row`` stores, without a key."""
    return Tenant(
        id=row.id,
        name=row.name,
        weight=float(row.weight),
        base_allowed=row.base_allowed,
        max_queued=row.max_queued,
        max_running=row.max_running,
        created_at=row.created_at,
        cache_salt=row.cache_salt,
        priority=next(priority for priority in PRIORITIES if priority == row.priority),
        limits=TenantLimits(**row.limits) if row.limits else None,
        budgets=Budgets(**row.budgets) if row.budgets else None,
        suspended=bool(row.suspended),
        sample_prompts=bool(row.sample_prompts),
    )
