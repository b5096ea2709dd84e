"""People whom a provider of identities vouches for: what their claims make them here, and who is signed in.

Somebody who signs in gets a key that lives in this process's memory alone, is shown to nobody, and does what
a named admin key, or a customer's key with all scopes, does. So pages and audit know people and keys alike.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from adapters.database.rows import now
from adapters.model import is_tenant_id
from server.accounts.keys import SCOPES, KeyInfo, digest_of
from server.accounts.people import ROLES, Person
from server.errors import Forbidden
from server.settings.sign_in import SignIn

SIGN_IN_KEY = re.compile(r"lp-session-[A-Za-z0-9_-]{43}", re.ASCII)
MAX_SIGNED_IN = 10_000
# Characters of a name that the audit's column holds, after its first word.
LONGEST_NAME = 50


@dataclass(frozen=True, slots=True)
class Identity:
    """Who somebody is. ``name`` is for audit and log; ``access`` is a role, or ``tenant:`` and an id."""

    id: str
    name: str
    access: str


def identity(claims: Mapping[str, Any], rules: SignIn) -> Identity:
    """What ``claims``, of a token that has been verified, make of somebody; Forbidden with the reason."""
    subject = str(claims["sub"])
    verified = claims.get("email_verified")
    address = str(claims.get("email") or "").lower() if verified is True or verified == "true" else ""
    if rules.oidc_domains and address.rpartition("@")[2] not in rules.oidc_domains:
        raise Forbidden("Your account has no verified e-mail address of a domain that may sign in here.")
    values = [*_values(claims, rules.oidc_claim), *filter(None, [address]), "*"]
    access = next((may for value, may in rules.oidc_access.items() if value in values), None)
    if access is None and rules.oidc_tenant_claim:
        tenants = _values(claims, rules.oidc_tenant_claim)
        access = f"tenant:{tenants[0]}" if len(tenants) == 1 and is_tenant_id(tenants[0]) else None
    if access is None:
        raise Forbidden("Your account may not sign in here: nothing that it belongs to has been let in.")
    named = _values(claims, rules.oidc_name_claim)[:1] if rules.oidc_name_claim else []
    name = (named or [address or subject])[0]
    id_ = hashlib.sha256(f"{rules.oidc_issuer} {subject}".encode()).hexdigest()[:16]
    return Identity(id_, _short(name), access)


def _values(claims: Mapping[str, Any], name: str) -> list[str]:
    """The values of a claim: itself, or a path of names with dots between; none where there is none."""
    found: Any = claims.get(name)
    if found is None:
        found = claims
        for part in name.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
    listed = found if isinstance(found, list) else [found]
    return [str(value) for value in listed if isinstance(value, str | int)]


def _short(name: str) -> str:
    """``name`` as one line that the audit can hold; a long one keeps its beginning and is told apart."""
    line = "".join(letter for letter in name if letter.isprintable())
    if len(line) <= LONGEST_NAME:
        return line
    return f"{line[: LONGEST_NAME - 11]}~{hashlib.sha256(name.encode()).hexdigest()[:10]}"


@dataclass(frozen=True, slots=True)
class SignedIn:
    """Either a ``person`` who operates, or somebody of ``tenant``, with ``key``."""

    person: Person | None = None
    tenant: str = ""
    key: KeyInfo | None = None


class SignIns:
    """The keys of those who are signed in, by digest."""

    def __init__(self, *, limit: int = MAX_SIGNED_IN) -> None:
        self._limit = limit
        self._known: OrderedDict[str, SignedIn] = OrderedDict()

    def admit(self, who: Identity, hours: float) -> str:
        """A key for ``who``, good for so long; beyond the limit, the oldest one ends."""
        made = now()
        until = made + timedelta(hours=hours)
        key = f"lp-session-{secrets.token_urlsafe(32)}"
        role = next((role for role in ROLES if role == who.access), None)
        if role is not None:
            signed_in = SignedIn(Person(who.id, who.name, role, made, until, signed_in=True))
        else:
            info = KeyInfo(who.id, who.name, made, SCOPES, until, person=who.name)
            signed_in = SignedIn(tenant=who.access.removeprefix("tenant:"), key=info)
        self._known[digest_of(key)] = signed_in
        while len(self._known) > self._limit:
            self._known.popitem(last=False)
        return key

    def find(self, key: str) -> SignedIn | None:
        """Whose key it is; None if nobody's."""
        return self._known.get(digest_of(key)) if SIGN_IN_KEY.fullmatch(key) else None

    def dismiss(self, key: str) -> None:
        """The key is refused from now on; nothing for any other key."""
        self._known.pop(digest_of(key), None)
