"""Who operates the server: people with keys and roles of their own, so that the audit can name them.

viewer     looks at everything that operators see, and changes nothing
operator   also changes customers, keys and adapters
admin      also people; the key of the settings is one
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, get_args

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from adapters.database.audit import note
from adapters.database.cache import ReadCache
from adapters.database.database import Database
from adapters.database.rows import AdminKeyRow, now
from server.accounts.keys import check_expiry, digest_of
from server.errors import Conflict, Forbidden, NotFound, Unauthorized, Unprocessable

Role = Literal["viewer", "operator", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
NAME = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,49}"
PERSON_KEY = re.compile(r"lp-admin-[A-Za-z0-9_-]{43}", re.ASCII)
CACHED = 1024


@dataclass(frozen=True, slots=True)
class Person:
    """``id`` is None for the key of the settings. Times as for a customer's key.

    ``signed_in`` has who was let in by a provider of identities, without a key of their own.
    """

    id: str | None
    name: str
    role: Role
    created_at: datetime | None = None
    expires_at: datetime | None = None
    last_used_at: datetime | None = None
    signed_in: bool = False

    @property
    def actor(self) -> str:
        """As the audit names it."""
        kind = "person" if self.signed_in else "admin"
        return "admin" if self.id is None else f"{kind} {self.name}"

    def check(self, role: Role) -> None:
        """Unauthorized (``expired_api_key``), or Forbidden (``role_missing``) for less than ``role``."""
        if self.expires_at is not None and self.expires_at <= now():
            raise Unauthorized("This key has expired.", code="expired_api_key")
        if ROLES.index(self.role) < ROLES.index(role):
            raise Forbidden(f"This needs the role {role}; yours is {self.role}.", code="role_missing")

    def as_json(self) -> dict[str, Any]:
        """As JSON, without the key."""
        times = {name: getattr(self, name) for name in ("created_at", "expires_at", "last_used_at")}
        shown = {name: time and time.isoformat() for name, time in times.items()}
        return {"id": self.id, "name": self.name, "role": self.role, **shown}


SETTINGS_KEY = Person(None, "admin", "admin")


class People:
    """Named keys, as rows of ``database``."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: ReadCache[str, Person | None] = ReadCache(database, CACHED)

    async def create(self, name: str, role: Role, expires_at: datetime | None = None) -> tuple[Person, str]:
        """The person and the key, which is shown this once. Conflict if the name is taken; Unprocessable."""
        if not re.fullmatch(NAME, name, re.ASCII):
            raise Unprocessable(f"A name has the form {NAME}.", param="name")
        check_expiry(expires_at)
        key = f"lp-admin-{secrets.token_urlsafe(32)}"
        row = AdminKeyRow(
            id=secrets.token_hex(8),
            name=name,
            role=role,
            digest=digest_of(key),
            created_at=now(),
            expires_at=expires_at,
        )
        async with self._database.write() as session:
            session.add(row)
            try:
                await session.flush()
            except IntegrityError:
                raise Conflict(f"There is somebody named `{name}` already.", param="name") from None
            note(session, "person.create", None, name, after=_person(row).as_json())
        return _person(row), key

    async def all(self) -> list[Person]:
        """By name."""
        async with self._database.read() as session:
            found = await session.scalars(select(AdminKeyRow).order_by(AdminKeyRow.name))
            return [_person(row) for row in found]

    async def remove(self, id_: str) -> None:
        """The key is refused from the moment this returns. NotFound."""
        async with self._database.write() as session:
            known = re.fullmatch("[0-9a-f]{16}", id_, re.ASCII)
            row = await session.get(AdminKeyRow, id_) if known else None
            if row is None:
                raise NotFound("There is no such person.")
            note(session, "person.remove", None, row.name, before=_person(row).as_json())
            await session.delete(row)

    async def holder(self, key: str) -> Person | None:
        """Whose key it is; None if nobody's."""
        if not PERSON_KEY.fullmatch(key):
            return None
        digest = digest_of(key)
        return await self._known.get(digest, lambda: self._look_up(digest))

    async def _look_up(self, digest: str) -> Person | None:
        async with self._database.read() as session:
            row = await session.scalar(select(AdminKeyRow).where(AdminKeyRow.digest == digest))
        return _person(row) if row is not None and secrets.compare_digest(row.digest, digest) else None


def _person(row: AdminKeyRow) -> Person:
    role = next(role for role in ROLES if role == row.role)
    return Person(row.id, row.name, role, row.created_at, row.expires_at, row.last_used_at)
