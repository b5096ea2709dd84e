"""Who makes a request: its headers against keys, as a tenant or as the operator."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from adapters.database.audit import ACTOR, Actor
from server.accounts.keys import KeyScope
from server.accounts.tenants import Tenant
from server.http.middleware import matched_path
from server.http.services import ServicesOf, services_of
from server.inference.dialects.messages import speaks_anthropic


async def tenant_of(request: Request, scope: KeyScope = "inference") -> Tenant:
    """The tenant whose key, with ``scope``, the request has. Raises as ``Authentication.authenticate``."""
    services = services_of(request)
    authorization, key = request.headers.get("authorization"), request.headers.get("x-api-key")
    if authorization is None and key is not None and speaks_anthropic(matched_path(request.scope)):
        authorization = f"Bearer {key}"
    customer = request.headers.get("x-customer-id")
    tenant = await services.authentication.authenticate(authorization, customer, scope)
    request.state.log["tenant"] = tenant.id
    if tenant.key is not None:
        services.usage_writer.used(tenant.key.id)
        ACTOR.set(Actor(f"key {tenant.key.id}", request.state.request_id))
    return tenant


async def require_admin(request: Request) -> None:
    """Raises as ``Authentication.require_admin`` unless the request has the operator's key."""
    await services_of(request).authentication.require_admin(request.headers.get("authorization"))
    ACTOR.set(Actor("admin", request.state.request_id))


async def _named_tenant(tenant: str, services: ServicesOf) -> Tenant:
    return await services.tenants.get(tenant)


async def _adapter_owner(request: Request) -> Tenant:
    return await tenant_of(request, "adapters:write")


async def _usage_reader(request: Request) -> Tenant:
    return await tenant_of(request, "usage:read")


ADMIN = Depends(require_admin)
# The tenant that the path names; NotFound where there is none.
NamedTenant = Annotated[Tenant, Depends(_named_tenant)]
# The tenant whose key this is, if the key may do that.
AdapterOwner = Annotated[Tenant, Depends(_adapter_owner)]
UsageReader = Annotated[Tenant, Depends(_usage_reader)]
