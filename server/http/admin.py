"""``/admin/v1``: what operators call. Thin: authenticate, parse, hand over, show."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from adapters.model import TENANT_PATTERN
from adapters.store.replicas import as_json as replica_as_json
from adapters.store.upload_jobs import JobSearch, State
from adapters.store.versions import sizes_of
from server.accounts.keys import DEFAULT_SCOPES, SCOPES, KeyScope
from server.accounts.tenants import Priority
from server.accounts.terms import Budgets, KeyLimits, Places, TenantLimits, Weight
from server.http import adapters, answers
from server.http import answers_operators as operators
from server.http.adapters import (
    AdapterChange,
    AdapterChangeBody,
    UploadOptionsOf,
    UploadsAfter,
    VersionChange,
    VersionChangeBody,
    Warm,
    WarmBody,
)
from server.http.auth import ADMIN, NamedTenant
from server.http.bodies import Body, body_as, documented
from server.http.reports import PAGE, Limit, page_of
from server.http.services import ServicesOf
from server.publishing.publish import verify

router = APIRouter(prefix="/admin/v1", tags=["admin"], dependencies=[ADMIN])


class NewTenant(Body):
    """A tenant to be made; what is not said has its default."""

    id: str
    name: str | None = None
    weight: Weight = 1.0
    priority: Priority = "standard"
    base_allowed: bool = True
    max_queued: Places = None
    max_running: Places = None
    limits: TenantLimits = TenantLimits()
    budgets: Budgets = Budgets()
    sample_prompts: bool = False


class TenantChange(Body):
    """What a PATCH of a tenant changes; what is not named stays as it is."""

    name: str | None = None
    weight: Weight | None = None
    priority: Priority | None = None
    base_allowed: bool | None = None
    max_queued: Places = None
    max_running: Places = None
    limits: TenantLimits = TenantLimits()
    budgets: Budgets = Budgets()
    suspended: bool | None = None
    sample_prompts: bool | None = None


class KeyChange(Body):
    """What a PATCH of a key changes; of ``limits`` only what is set in them."""

    name: str | None = None
    scopes: list[KeyScope] = Field(list(DEFAULT_SCOPES), min_length=1, max_length=len(SCOPES))
    expires_at: datetime | None = Field(None, strict=False)
    limits: KeyLimits = KeyLimits()


class NewKey(Body):
    """A key to be made."""

    empty = b"{}"
    name: str | None = None
    scopes: list[KeyScope] = Field(list(DEFAULT_SCOPES), min_length=1, max_length=len(SCOPES))
    expires_at: datetime | None = Field(None, strict=False)
    limits: KeyLimits | None = None


class Rotation(Body):
    """How long the old key goes on beside the new one."""

    empty = b"{}"
    overlap_seconds: int = Field(0, ge=0, le=366 * 86400)


@router.post("/tenants", status_code=201, response_model=answers.Tenant, openapi_extra=documented(NewTenant))
async def create_tenant(
    body: Annotated[NewTenant, body_as(NewTenant)], services: ServicesOf
) -> dict[str, Any]:
    return (await services.tenants.create(**dict(body))).as_json()


@router.get(
    "/tenants",
    response_model=answers.Tenants,
    response_model_exclude_unset=True,
    summary="Customers by id: all of them, or a page of `limit`",
)
async def list_tenants(
    services: ServicesOf,
    q: Annotated[str | None, Query(max_length=200, description="A part of the id or the name.")] = None,
    after: Annotated[
        str | None, Query(pattern=f"^{TENANT_PATTERN}$", description="`next` of the page before.")
    ] = None,
    limit: Annotated[int | None, Query(ge=1, le=PAGE)] = None,
    stored: Annotated[bool, Query(description="Also how many bytes each of them stores.")] = False,
) -> dict[str, Any]:
    most = None if limit is None else limit + 1
    found = [tenant.as_json() for tenant in await services.tenants.list(q=q, after=after, most=most)]
    page = page_of(found, limit or len(found), "id")
    if stored:
        sizes = await sizes_of(services.database, [tenant["id"] for tenant in page["data"]])
        page["data"] = [tenant | {"stored_bytes": sizes[tenant["id"]]} for tenant in page["data"]]
    return page


@router.get("/tenants/{tenant}", response_model=answers.Tenant)
async def get_tenant(owner: NamedTenant) -> dict[str, Any]:
    return owner.as_json()


@router.patch("/tenants/{tenant}", response_model=answers.Tenant, openapi_extra=documented(TenantChange))
async def update_tenant(
    tenant: str, body: Annotated[TenantChange, body_as(TenantChange)], services: ServicesOf
) -> dict[str, Any]:
    changes: Any = {name: getattr(body, name) for name in body.model_fields_set}
    return (await services.tenants.update(tenant, **changes)).as_json()


@router.delete("/tenants/{tenant}", status_code=204)
async def delete_tenant(owner: NamedTenant, services: ServicesOf) -> Response:
    await adapters.delete_tenant(services, owner)
    return Response(status_code=204)


@router.post(
    "/tenants/{tenant}/keys", status_code=201, response_model=answers.NewKey, openapi_extra=documented(NewKey)
)
async def create_key(
    tenant: str, body: Annotated[NewKey, body_as(NewKey)], services: ServicesOf
) -> dict[str, Any]:
    issued = await services.tenants.issue_key(tenant, **dict(body))
    return {"id": issued.id, "key": issued.key, "name": issued.name}


@router.post(
    "/tenants/{tenant}/keys/{key_id}/rotate",
    status_code=201,
    response_model=answers.RotatedKey,
    openapi_extra=documented(Rotation),
)
async def rotate_key(
    tenant: str, key_id: str, body: Annotated[Rotation, body_as(Rotation)], services: ServicesOf
) -> dict[str, Any]:
    issued, old = await services.tenants.rotate_key(tenant, key_id, timedelta(seconds=body.overlap_seconds))
    return {"id": issued.id, "key": issued.key, "name": issued.name, "replaces": old.as_json()}


@router.get("/tenants/{tenant}/keys", response_model=answers.Keys)
async def list_keys(tenant: str, services: ServicesOf) -> dict[str, Any]:
    return {"object": "list", "data": [key.as_json() for key in await services.tenants.keys(tenant)]}


@router.patch(
    "/tenants/{tenant}/keys/{key_id}", response_model=answers.Key, openapi_extra=documented(KeyChange)
)
async def update_key(
    tenant: str, key_id: str, body: Annotated[KeyChange, body_as(KeyChange)], services: ServicesOf
) -> dict[str, Any]:
    changes: Any = {name: getattr(body, name) for name in body.model_fields_set}
    return (await services.tenants.update_key(tenant, key_id, **changes)).as_json()


@router.delete("/tenants/{tenant}/keys/{key_id}", status_code=204)
async def revoke_key(tenant: str, key_id: str, services: ServicesOf) -> Response:
    await services.tenants.revoke(tenant, key_id)
    return Response(status_code=204)


@router.post("/tenants/{tenant}/adapters/{name}/versions", status_code=201, response_model=answers.NewVersion)
async def create_version(
    owner: NamedTenant, name: str, request: Request, services: ServicesOf, options: UploadOptionsOf
) -> JSONResponse:
    prefixes = services.settings.import_prefixes
    return await adapters.receive_version(request, owner, name, options, prefixes=prefixes)


@router.get("/uploads", response_model=operators.Uploads, summary="All customers' uploads, newest first")
async def all_uploads(
    services: ServicesOf,
    tenant: str | None = None,
    adapter: str | None = None,
    state: State | None = None,
    after: UploadsAfter = None,
    limit: Limit = 100,
) -> dict[str, Any]:
    """Those that are answered later, and of each customer the newest that were refused, with the reason."""
    return await adapters.uploads(services, JobSearch(tenant, adapter, state, after), limit)


@router.patch(
    "/tenants/{tenant}/adapters/{name}",
    response_model=answers.Adapter,
    openapi_extra=documented(AdapterChange),
)
async def update_adapter(
    owner: NamedTenant, name: str, body: AdapterChangeBody, services: ServicesOf
) -> Response:
    return await adapters.update(services, owner, name, body)


@router.post(
    "/tenants/{tenant}/adapters/{name}/warm", response_model=answers.Warmed, openapi_extra=documented(Warm)
)
async def warm_adapter(owner: NamedTenant, name: str, body: WarmBody, services: ServicesOf) -> dict[str, Any]:
    return await adapters.warm(services, owner, name, body)


@router.patch(
    "/tenants/{tenant}/adapters/{name}/versions/{version}",
    response_model=answers.Adapter,
    openapi_extra=documented(VersionChange),
)
async def update_version(
    owner: NamedTenant, name: str, version: int, body: VersionChangeBody, services: ServicesOf
) -> Response:
    return await adapters.update_version(services, owner, name, version, body)


@router.post(
    "/tenants/{tenant}/adapters/{name}/verify",
    response_model=answers.Verified,
    response_model_exclude_unset=True,
)
async def verify_adapter(
    owner: NamedTenant, name: str, services: ServicesOf, version: int | None = None
) -> dict[str, Any]:
    return await verify(services.publishing, owner.id, name, version)


@router.get("/replicas", response_model=answers.Replicas)
async def replicas(services: ServicesOf) -> dict[str, Any]:
    """The fleet's replicas as they last announced themselves; none where one process does everything."""
    rows = await services.replicas.all()
    names = await services.replicas.names(rows)
    return {"object": "list", "data": [replica_as_json(row, names) for row in rows]}
