"""``/v1/adapters``: a customer's own adapters, with a key that has the scope ``adapters:write``.

Bodies and answers are those of the admin API, by the same code; the tenant is always the key's.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from adapters.model import Quota
from server.accounts.tenants import Tenant
from server.errors import Forbidden
from server.http import admin
from server.http.admin import AdapterChange, AdapterChangeBody, PublishingOf, TenantsOf, UploadOptionsOf
from server.http.middleware import tenant_of

router = APIRouter(prefix="/v1/adapters", tags=["self-service"])


async def _owner(request: Request) -> Tenant:
    return await tenant_of(request, "adapters:write")


Owner = Annotated[Tenant, Depends(_owner)]


@router.get("")
async def list_adapters(owner: Owner, tenants: TenantsOf, publishing: PublishingOf) -> dict[str, Any]:
    return await admin.list_adapters(owner.id, tenants, publishing)


@router.get("/{name}")
async def get_adapter(
    owner: Owner, name: str, tenants: TenantsOf, publishing: PublishingOf
) -> dict[str, Any]:
    return await admin.get_adapter(owner.id, name, tenants, publishing)


@router.post("/{name}/versions", status_code=201, summary="Upload; 403 `quota_exceeded` beyond the quota")
async def create_version(
    owner: Owner, name: str, request: Request, publishing: PublishingOf, options: UploadOptionsOf
) -> JSONResponse:
    limits = owner.limits
    quota = Quota(limits.max_adapters, limits.max_storage_bytes) if limits else None
    # Nothing is imported by URL: what the operator lets the server read may be another customer's.
    return await admin.receive_version(owner.id, name, request, publishing, options, quota=quota)


@router.patch("/{name}", openapi_extra=admin.documented(AdapterChange))
async def update_adapter(
    owner: Owner, name: str, body: AdapterChangeBody, tenants: TenantsOf, publishing: PublishingOf
) -> dict[str, Any]:
    if body.pinned is not None:
        raise Forbidden("Only the operator can pin an adapter.", param="pinned")
    return await admin.update_adapter(owner.id, name, body, tenants, publishing)


@router.delete("/{name}", status_code=204)
async def delete_adapter(
    owner: Owner, name: str, request: Request, tenants: TenantsOf, publishing: PublishingOf
) -> Response:
    return await admin.delete_adapter(owner.id, name, request, tenants, publishing)


@router.delete("/{name}/versions/{version}", status_code=204)
async def delete_version(
    owner: Owner, name: str, version: int, request: Request, tenants: TenantsOf, publishing: PublishingOf
) -> Response:
    return await admin.delete_version(owner.id, name, version, request, tenants, publishing)
