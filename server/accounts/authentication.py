"""Who is asking: keys and customer tags to tenants.

    Authorization: Bearer <tenant key>                                   that key's tenant
    Authorization: Bearer <service key>   X-Customer-ID: <tenant>        the tenant that a gateway names
    Authorization: Bearer <admin key>                                    the admin API, and only that; the
                                                                         settings' key, or a person's
    Authorization: Bearer <metrics key>                                  /metrics, and only that

No message repeats a key or says whether one nearly matched; digests are compared in constant time.
"""

from __future__ import annotations

import hmac
import re
import secrets
from dataclasses import replace
from itertools import combinations

from sqlalchemy import select

from adapters.database.cache import ReadCache
from adapters.database.database import Database
from adapters.database.rows import KeyRow, MetaRow, TenantRow
from server.accounts.keys import DEFAULT_SCOPES, EndedKey, KeyInfo, KeyScope, digest_of, key_info
from server.accounts.people import SETTINGS_KEY, People, Person, Role
from server.accounts.sign_ins import SignIns
from server.accounts.tenants import Tenant, Tenants, tenant_of
from server.errors import BadRequest, Forbidden, NotFound, Unauthorized

# The database's row that has the digest of the admin key that was made here.
ADMIN_KEY_ROW = "admin_key_sha256"
# Characters of keys from the settings.
MIN_KEY_LENGTH = 16
MAX_KEY_LENGTH = 512
# Keys and customers of which the tenant is kept in memory.
CACHED_TENANTS = 16_384

BEARER = re.compile(rf"bearer +([\x21-\x7e]{{1,{MAX_KEY_LENGTH}}})", re.ASCII | re.IGNORECASE)
TENANT_KEY = re.compile(r"lp-[A-Za-z0-9_-]{43}", re.ASCII)

NO_KEY = (
    "You didn't provide an API key. You need to provide your API key in an Authorization header"
    " using Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
)
WRONG_KEY = "Incorrect API key provided."


class WrongKey(Unauthorized):
    """A key was given, and it is nobody's."""


class Authentication:
    """Tells from a request's headers who makes it. ``open`` before anything else.

    The keys are the settings'; without ``admin_key`` the one in the database counts.
    ValueError for keys that are too short, cannot be sent in a header, or are the same.
    """

    def __init__(
        self,
        database: Database,
        *,
        admin_key: str | None,
        service_key: str | None,
        metrics_key: str | None = None,
    ) -> None:
        _check_all(admin_key=admin_key, service_key=service_key, metrics_key=metrics_key)
        self._database = database
        self._tenants = Tenants(database)
        self._people = People(database)
        self.sign_ins = SignIns()
        self._configured = admin_key is not None
        self._admin = digest_of(admin_key) if admin_key is not None else None
        self._service = digest_of(service_key) if service_key is not None else None
        self._metrics = digest_of(metrics_key) if metrics_key is not None else None
        self._by_key: ReadCache[str, Tenant] = ReadCache(database, CACHED_TENANTS)
        self._by_id: ReadCache[str, Tenant] = ReadCache(database, CACHED_TENANTS)
        self._by_key_id: ReadCache[str, KeyInfo] = ReadCache(database, CACHED_TENANTS)

    def rekey(self, *, admin_key: str | None, service_key: str | None, metrics_key: str | None) -> None:
        """Other keys from the settings count from now on; without ``admin_key`` the one that counts stays.

        ValueError as for new ones; then nothing changes.
        """
        _check_all(admin_key=admin_key, service_key=service_key, metrics_key=metrics_key)
        if admin_key is not None:
            self._admin, self._configured = digest_of(admin_key), True
        self._service = digest_of(service_key) if service_key is not None else None
        self._metrics = digest_of(metrics_key) if metrics_key is not None else None

    async def open(self) -> str | None:
        """Makes the admin key where none is configured or stored, and returns it: the only time it is
        shown. ValueError if the stored one is the service key."""
        if self._configured:
            return None
        async with self._database.read() as session:
            stored = await session.get(MetaRow, ADMIN_KEY_ROW)
        made = None
        if stored is None:
            made = f"lp-admin-{secrets.token_urlsafe(32)}"
            stored = MetaRow(key=ADMIN_KEY_ROW, value=digest_of(made))
            async with self._database.write() as session:
                session.add(stored)
        if self._is(stored.value, self._service):
            raise ValueError("service_key is the admin key of this database; choose another")
        if self._is(stored.value, self._metrics):
            raise ValueError("metrics_key is the admin key of this database; choose another")
        self._admin = stored.value
        return made

    async def authenticate(
        self, authorization: str | None, customer: str | None, *scopes: KeyScope
    ) -> Tenant:
        """Who makes this request, from ``Authorization`` and ``X-Customer-ID``, and may: has one of
        ``scopes``, which are ``inference`` alone if none are named.

        Unauthorized without a known key; BadRequest (``customer_required``) for the service key alone;
        Forbidden for the admin key, for an unknown customer (``unknown_customer``), for a tenant key
        beside another customer (``customer_mismatch``) and for a key that is for something else
        (``scope_missing``): the service key is for inference only. Forbidden (``tenant_suspended``).
        """
        scopes = scopes or DEFAULT_SCOPES
        key = _bearer(authorization)
        digest = digest_of(key)
        if self._is(digest, self._admin) or await self._operator(key) is not None:
            raise Forbidden("Admin keys cannot run inference. Use a key of a tenant.")
        if self._is(digest, self._service):
            if "inference" not in scopes:
                raise Forbidden(f"A service key does not have the scope `{scopes[0]}`.", code="scope_missing")
            vouched = await self._customer(customer)
            vouched.check()
            return vouched
        tenant = await self._holder(key)
        if customer and customer != tenant.id:
            raise Forbidden(
                "X-Customer-ID names another customer than the one this key belongs to.",
                code="customer_mismatch",
                param="X-Customer-ID",
            )
        assert tenant.key is not None
        try:
            tenant.key.check(*scopes)
        except EndedKey as exc:
            exc.tenant = tenant.id
            raise
        tenant.check()
        return tenant

    async def acting(self, tenant: str, key: str | None) -> Tenant:
        """``tenant`` for work that goes on without a request: with the key of this id that asked for it.

        NotFound without the tenant; Unauthorized where the key is gone or has expired; Forbidden as for
        ``authenticate``.
        """
        found = await self._by_id.get(tenant, lambda: self._tenants.get(tenant))
        if key is not None:
            held = await self._by_key_id.get(key, lambda: self._key(tenant, key))
            held.check(*DEFAULT_SCOPES)
            found = replace(found, key=held)
        found.check()
        return found

    async def require_admin(self, authorization: str | None, role: Role = "admin") -> Person:
        """Who operates, with at least ``role``.

        Unauthorized without a known key, Forbidden for one that is no admin key, or has less than ``role``.
        """
        key = _bearer(authorization)
        digest = digest_of(key)
        if self._is(digest, self._admin):
            return SETTINGS_KEY
        if (person := await self._operator(key)) is not None:
            person.check(role)
            return person
        if not self._is(digest, self._service):
            await self._holder(key)
        raise Forbidden("This key cannot administer. Use the admin key.")

    def vouches(self, key: str) -> bool:
        """Whether ``key`` is the one of a gateway, which names the customer beside it."""
        return self._is(digest_of(key), self._service)

    async def require_metrics(self, authorization: str | None) -> None:
        """Unauthorized without the metrics key, where there is one."""
        if self._metrics is not None and not self._is(digest_of(_bearer(authorization)), self._metrics):
            raise WrongKey(WRONG_KEY)

    @staticmethod
    def _is(digest: str, known: str | None) -> bool:
        return known is not None and hmac.compare_digest(digest, known)

    async def _customer(self, customer: str | None) -> Tenant:
        if not customer:
            raise BadRequest(
                "A service key needs the header X-Customer-ID with the customer's tenant id.",
                code="customer_required",
                param="X-Customer-ID",
            )
        try:
            return await self._by_id.get(customer, lambda: self._tenants.get(customer))
        except NotFound:
            raise Forbidden(
                "The customer in X-Customer-ID is not known here.",
                code="unknown_customer",
                param="X-Customer-ID",
            ) from None

    async def _operator(self, key: str) -> Person | None:
        """Who operates with ``key``, beside the settings' own; None if nobody."""
        signed_in = self.sign_ins.find(key)
        return signed_in.person if signed_in else await self._people.holder(key)

    async def _holder(self, key: str) -> Tenant:
        """The tenant that ``key`` was issued to; Unauthorized."""
        signed_in = self.sign_ins.find(key)
        if signed_in is not None and signed_in.key is not None:
            return replace(await self._tenant_of(signed_in.tenant), key=signed_in.key)
        if not TENANT_KEY.fullmatch(key):
            raise WrongKey(WRONG_KEY)
        digest = digest_of(key)
        return await self._by_key.get(digest, lambda: self._look_up(digest))

    async def _tenant_of(self, tenant: str) -> Tenant:
        """The tenant of somebody who is signed in; Unauthorized where it is gone."""
        try:
            return await self._by_id.get(tenant, lambda: self._tenants.get(tenant))
        except NotFound:
            raise Unauthorized("The customer that your account belongs to is not known here.") from None

    async def _key(self, tenant: str, key: str) -> KeyInfo:
        async with self._database.read() as session:
            row = await session.get(KeyRow, key)
        if row is None or row.tenant != tenant:
            raise Unauthorized("The API key that asked for this has been revoked.")
        return key_info(row)

    async def _look_up(self, digest: str) -> Tenant:
        query = select(TenantRow, KeyRow).join(KeyRow, KeyRow.tenant == TenantRow.id)
        async with self._database.read() as session:
            found = (await session.execute(query.where(KeyRow.digest == digest))).one_or_none()
        if found is None or not self._is(digest, found[1].digest):
            raise WrongKey(WRONG_KEY)
        return replace(tenant_of(found[0]), key=key_info(found[1]))


def _bearer(authorization: str | None) -> str:
    """The key in an ``Authorization`` header; Unauthorized."""
    if not authorization:
        raise Unauthorized(NO_KEY)
    # The length is looked at first: the header comes from anybody.
    found = BEARER.fullmatch(authorization) if len(authorization) <= 2 * MAX_KEY_LENGTH else None
    if found is None:
        raise WrongKey(WRONG_KEY)
    return found[1]


def _check_all(**configured: str | None) -> None:
    given = {name: key for name, key in configured.items() if key is not None}
    for name, key in given.items():
        _check_configured(name, key)
    for (name, key), (other, same) in combinations(given.items(), 2):
        if key == same:
            raise ValueError(f"{name} and {other} must differ: one may not do what the other may")


def _check_configured(name: str, key: str) -> None:
    if len(key) < MIN_KEY_LENGTH:
        raise ValueError(f"{name} must have at least {MIN_KEY_LENGTH} characters")
    if not BEARER.fullmatch(f"Bearer {key}"):
        raise ValueError(f"{name} must be at most {MAX_KEY_LENGTH} printable ASCII characters without spaces")
