"""Who makes a request: its headers against keys, as a tenant or as the operator."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from adapters.database.audit import ACTOR, Actor
from server.accounts.authentication import WrongKey
from server.accounts.keys import SCOPES, EndedKey, KeyScope
from server.accounts.people import Person, Role
from server.accounts.tenants import Tenant
from server.errors import BadRequest, TooManyRequests, Unauthorized
from server.http.middleware import matched_path
from server.http.services import ServicesOf, services_of
from server.http.shares import joined
from server.http.turns import turns_of
from server.inference.dialects.messages import speaks_anthropic
from server.limits.errors import adapter_not_allowed
from server.limits.permissions import may_manage

T = TypeVar("T")


# Headers that decide who asks for what: of two, a proxy and this server might each read another one.
SINGLE_HEADERS = ("Authorization", "X-Customer-ID", "X-API-Key", "Idempotency-Key", "Content-Type", "Host")

ALL_KEYS = (
    "As many of this server's connections have a request of your keys under way as one customer may have."
    " Send this one again when some of them are answered."
)


async def single_headers(request: Request) -> None:
    """BadRequest: ``duplicate_header`` if one of ``SINGLE_HEADERS`` comes twice; ``conflicting_keys`` where
    Anthropic's header and OpenAI's are both read and hold two keys."""
    for name in SINGLE_HEADERS:
        if len(request.headers.getlist(name)) > 1:
            raise BadRequest(f"The header {name} came more than once.", code="duplicate_header", param=name)
    if not speaks_anthropic(matched_path(request.scope)):
        return  # X-API-Key may be a proxy's own
    authorization, key = request.headers.get("authorization"), request.headers.get("x-api-key")
    if authorization is not None and key is not None and authorization.split()[-1:] != key.split():
        raise BadRequest(
            "Authorization and X-API-Key name different keys. Send one of the two headers.",
            code="conflicting_keys",
            param="X-API-Key",
        )


async def _slowed(request: Request, check: Awaitable[T]) -> T:
    """``check``; TooManyRequests (``too_many_wrong_keys``) instead of WrongKey for an address with many.

    Of who is not let in the access line has the address, as this server sees it, and the key where it is
    known: that of one which has expired.
    """
    try:
        return await check
    except Unauthorized as exc:
        address = request.client.host if request.client else ""
        request.state.log["client"] = address or None
        if isinstance(exc, EndedKey) and exc.tenant is not None:
            request.state.log |= {"tenant": exc.tenant, "key": exc.key}
        if not isinstance(exc, WrongKey):
            raise
        services = services_of(request)
        services.metrics.wrong_key()
        wait = services.wrong_keys.add(address, time.monotonic())
        if wait is None:
            raise
        raise TooManyRequests(
            "Too many requests with a wrong API key came from your address.",
            code="too_many_wrong_keys",
            retry_after=wait,
        ) from None


async def tenant_of(request: Request, *scopes: KeyScope) -> Tenant:
    """The tenant whose key, with one of ``scopes`` (``inference`` if none are named), the request has.

    Raises as ``Authentication.authenticate``, and TooManyRequests (``too_many_connections``) where requests
    of the tenant, with whatever keys, are under way on its share of the connections.
    """
    services = services_of(request)
    authorization, key = request.headers.get("authorization"), request.headers.get("x-api-key")
    if authorization is None and key is not None and speaks_anthropic(matched_path(request.scope)):
        authorization = f"Bearer {key}"
    customer = request.headers.get("x-customer-id")
    tenant = await _slowed(request, services.authentication.authenticate(authorization, customer, *scopes))
    request.state.log["tenant"] = tenant.id
    if not joined(request.scope, tenant.id):
        raise TooManyRequests(ALL_KEYS, code="too_many_connections", retry_after=1)
    turns_of(asyncio.get_running_loop()).let_in(request.scope)
    if tenant.key is not None:
        services.usage_writer.used(tenant.key.id)
        ACTOR.set(Actor(tenant.key.actor, request.state.request_id))
        if tenant.key.person is not None:
            request.state.log["person"] = tenant.key.person
    return tenant


async def require_admin(request: Request) -> Person:
    """Raises as ``Authentication.require_admin`` unless the request has the key of an operator, who may.

    Who only looks needs the role ``viewer``, who changes something ``operator``.
    """
    services, authorization = services_of(request), request.headers.get("authorization")
    role: Role = "viewer" if request.method in ("GET", "HEAD") else "operator"
    person = await _slowed(request, services.authentication.require_admin(authorization, role))
    if person.id is not None:
        services.usage_writer.used(person.id)
    request.state.log["person"] = person.name
    turns_of(asyncio.get_running_loop()).let_in(request.scope)
    ACTOR.set(Actor(person.actor, request.state.request_id))
    return person


async def _require_admin_role(person: Annotated[Person, Depends(require_admin)]) -> None:
    person.check("admin")


async def require_metrics(request: Request) -> None:
    """Unauthorized unless ``/metrics`` is open or the request has its key."""
    authorization = request.headers.get("authorization")
    await _slowed(request, services_of(request).authentication.require_metrics(authorization))


async def _named_tenant(tenant: str, services: ServicesOf) -> Tenant:
    return await services.tenants.get(tenant)


async def _adapter_owner(request: Request) -> Tenant:
    """Forbidden (``model_not_allowed``) for an adapter that the key's limits do not name."""
    tenant = await tenant_of(request, "adapters:write")
    name = request.path_params.get("name")
    if name is not None and not may_manage(tenant, name):
        raise adapter_not_allowed()
    return tenant


async def _usage_reader(request: Request) -> Tenant:
    return await tenant_of(request, "usage:read")


async def _member(request: Request) -> Tenant:
    return await tenant_of(request, *SCOPES)


async def _manager(request: Request) -> Tenant:
    return await tenant_of(request, "adapters:write", "usage:read", "keys:write")


async def _key_owner(request: Request) -> Tenant:
    return await tenant_of(request, "keys:write")


ADMIN = Depends(require_admin)
ADMIN_ROLE = Depends(_require_admin_role)
AskedBy = Annotated[Person, Depends(require_admin)]
METRICS = Depends(require_metrics)
SINGLE = Depends(single_headers)
# The tenant that the path names; NotFound where there is none.
NamedTenant = Annotated[Tenant, Depends(_named_tenant)]
# The tenant whose key this is, if the key may do that.
AdapterOwner = Annotated[Tenant, Depends(_adapter_owner)]
UsageReader = Annotated[Tenant, Depends(_usage_reader)]
KeyOwner = Annotated[Tenant, Depends(_key_owner)]
# With a key of any kind, and with one that is for more than inference.
Member = Annotated[Tenant, Depends(_member)]
Manager = Annotated[Tenant, Depends(_manager)]
