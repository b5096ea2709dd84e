"""What a tenant's key is and may do; of the key itself only the SHA-256 is kept."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, get_args

from adapters.database.rows import KeyRow, now
from server.accounts.terms import KeyLimits
from server.errors import Forbidden, Unauthorized, Unprocessable

KeyScope = Literal["inference", "adapters:write", "usage:read", "keys:write"]
SCOPES: tuple[KeyScope, ...] = get_args(KeyScope)
DEFAULT_SCOPES: tuple[KeyScope, ...] = ("inference",)


class EndedKey(Unauthorized):
    """The key was good until it expired. ``key`` is its id, ``tenant`` whose it is, where they are known."""

    code = "expired_api_key"
    key: str | None = None
    tenant: str | None = None


def digest_of(key: str) -> str:
    """What is kept of a key: its SHA-256, in hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A tenant's key, without the key itself. ``last_used_at`` may be a minute old.

    ``person`` has somebody of the tenant who signed in and has no key of their own.
    """

    id: str
    name: str | None
    created_at: datetime
    scopes: tuple[KeyScope, ...] = DEFAULT_SCOPES
    expires_at: datetime | None = None
    last_used_at: datetime | None = None
    limits: KeyLimits | None = None
    person: str | None = None

    @property
    def actor(self) -> str:
        """As the audit names it."""
        return f"key {self.id}" if self.person is None else f"member {self.person}"

    def check(self, *scopes: KeyScope) -> None:
        """Unauthorized (``expired_api_key``), or Forbidden (``scope_missing``) without any of ``scopes``."""
        if self.expires_at is not None and self.expires_at <= now():
            ended = EndedKey("This API key has expired.")
            ended.key = self.id
            raise ended
        if not set(scopes) & set(self.scopes):
            wanted = " or ".join(f"`{scope}`" for scope in scopes)
            raise Forbidden(f"This key does not have the scope {wanted}.", code="scope_missing")

    def as_json(self) -> dict[str, Any]:
        """As JSON for the operator."""
        times = {name: getattr(self, name) for name in ("created_at", "expires_at", "last_used_at")}
        return {
            "id": self.id,
            "name": self.name,
            "scopes": list(self.scopes),
            "limits": (self.limits.stored() if self.limits else None) or {},
            **{name: time and time.isoformat() for name, time in times.items()},
        }


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A new key, in clear for the only time."""

    id: str
    name: str | None
    created_at: datetime
    key: str = field(repr=False)


def key_info(row: KeyRow) -> KeyInfo:
    return KeyInfo(
        id=row.id,
        name=row.name,
        created_at=row.created_at,
        scopes=tuple(scope for scope in SCOPES if scope in (row.scopes or DEFAULT_SCOPES)),
        expires_at=row.expires_at,
        last_used_at=row.last_used_at,
        limits=KeyLimits(**row.limits) if row.limits else None,
    )


def check_expiry(expires_at: datetime | None) -> None:
    """Unprocessable unless it is None or to come."""
    if expires_at is not None and (expires_at.tzinfo is None or expires_at <= now()):
        raise Unprocessable("`expires_at` must be a time to come, with its zone.", param="expires_at")
