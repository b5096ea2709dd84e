"""``/admin/v1``: what operators call. Thin: authenticate, parse, hand over, show."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.model import Adapter, Tier, Version
from server.dispatcher import Dispatcher
from server.errors import Unprocessable
from server.http import limited_body, parse_object
from server.publish import Publishing, move_pin, publish, unpublish
from server.settings import Settings
from server.sources import files_of
from server.tenants import Tenant, Tenants


async def _admin(request: Request) -> None:
    tenants: Tenants = request.app.state.tenants
    await tenants.require_admin(request.headers.get("authorization"))


router = APIRouter(prefix="/admin/v1", tags=["admin"], dependencies=[Depends(_admin)])


class _Body(BaseModel):
    """``empty`` is what an empty body stands for."""

    model_config = ConfigDict(extra="forbid", strict=True)
    empty: ClassVar[bytes] = b""


class NewTenant(_Body):
    id: str
    name: str | None = None
    weight: float = Field(1.0, gt=0, le=1000, allow_inf_nan=False)
    base_allowed: bool = True
    max_queued: int | None = Field(None, ge=1)
    max_running: int | None = Field(None, ge=1)


class TenantChange(_Body):
    name: str | None = None
    weight: float | None = Field(None, gt=0, le=1000, allow_inf_nan=False)
    base_allowed: bool | None = None
    max_queued: int | None = Field(None, ge=1)
    max_running: int | None = Field(None, ge=1)


class NewKey(_Body):
    empty = b"{}"
    name: str | None = None


class AdapterChange(_Body):
    live: int | None = Field(None, ge=1)
    default: bool | None = None
    pinned: bool | None = None


def _json(model: type[_Body]) -> Any:
    """The body as ``model``: read after the key was checked, and no more of it than is allowed.

    FastAPI would read all of it first, whoever sent it.
    """

    async def read(request: Request) -> _Body:
        limit = request.app.state.settings.max_body_bytes
        raw = b"".join([chunk async for chunk in limited_body(request, limit)])
        try:
            return model.model_validate(parse_object(raw or model.empty))
        except ValidationError as exc:
            raise RequestValidationError(exc.errors()) from exc

    return Depends(read)


def _documented(model: type[_Body]) -> dict[str, Any]:
    schema = {"schema": model.model_json_schema()}
    return {"requestBody": {"content": {"application/json": schema}, "required": not model.empty}}


def _tenants(request: Request) -> Tenants:
    tenants: Tenants = request.app.state.tenants
    return tenants


def _publishing(request: Request) -> Publishing:
    publishing: Publishing = request.app.state.publishing
    return publishing


TenantsOf = Annotated[Tenants, Depends(_tenants)]
PublishingOf = Annotated[Publishing, Depends(_publishing)]


@router.post("/tenants", status_code=201, openapi_extra=_documented(NewTenant))
async def create_tenant(body: Annotated[NewTenant, _json(NewTenant)], tenants: TenantsOf) -> dict[str, Any]:
    return _tenant_json(await tenants.create(**body.model_dump()))


@router.get("/tenants")
async def list_tenants(tenants: TenantsOf) -> dict[str, Any]:
    return {"object": "list", "data": [_tenant_json(t) for t in await tenants.list()]}


@router.get("/tenants/{tenant}")
async def get_tenant(tenant: str, tenants: TenantsOf) -> dict[str, Any]:
    return _tenant_json(await tenants.get(tenant))


@router.patch("/tenants/{tenant}", openapi_extra=_documented(TenantChange))
async def update_tenant(
    tenant: str, body: Annotated[TenantChange, _json(TenantChange)], tenants: TenantsOf
) -> dict[str, Any]:
    return _tenant_json(await tenants.update(tenant, **body.model_dump(exclude_unset=True)))


@router.delete("/tenants/{tenant}", status_code=204)
async def delete_tenant(
    tenant: str, request: Request, tenants: TenantsOf, publishing: PublishingOf
) -> Response:
    await tenants.get(tenant)
    versions = _versions(await publishing.catalog.adapters(tenant))
    await tenants.delete(tenant)
    _free(request, publishing, versions)
    return Response(status_code=204)


@router.post("/tenants/{tenant}/keys", status_code=201, openapi_extra=_documented(NewKey))
async def create_key(
    tenant: str, body: Annotated[NewKey, _json(NewKey)], tenants: TenantsOf
) -> dict[str, Any]:
    issued = await tenants.issue_key(tenant, body.name)
    return {"id": issued.id, "key": issued.key, "name": issued.name}


@router.get("/tenants/{tenant}/keys")
async def list_keys(tenant: str, tenants: TenantsOf) -> dict[str, Any]:
    return {"object": "list", "data": [asdict(key) for key in await tenants.keys(tenant)]}


@router.delete("/tenants/{tenant}/keys/{key_id}", status_code=204)
async def revoke_key(tenant: str, key_id: str, tenants: TenantsOf) -> Response:
    await tenants.revoke(tenant, key_id)
    return Response(status_code=204)


@router.post("/tenants/{tenant}/adapters/{name}/versions", status_code=201)
async def create_version(
    tenant: str, name: str, request: Request, tenants: TenantsOf, publishing: PublishingOf
) -> JSONResponse:
    await tenants.get(tenant)
    settings: Settings = request.app.state.settings
    files = files_of(
        request,
        publishing.blobs.quarantine,
        max_bytes=settings.max_upload_bytes,
        prefixes=settings.import_prefixes,
    )
    published = await publish(publishing, tenant, name, files)
    return JSONResponse(
        {
            "adapter": published.adapter.name,
            "version": published.version.number,
            "digest": published.version.digest,
            "live": published.adapter.live,
            "report": published.manifest.report(),
        },
        status_code=201,
    )


@router.get("/tenants/{tenant}/adapters")
async def list_adapters(tenant: str, tenants: TenantsOf, publishing: PublishingOf) -> dict[str, Any]:
    await tenants.get(tenant)
    adapters = await publishing.catalog.adapters(tenant)
    return {"object": "list", "data": [_adapter_json(a, publishing.dispatcher) for a in adapters]}


@router.get("/tenants/{tenant}/adapters/{name}")
async def get_adapter(tenant: str, name: str, tenants: TenantsOf, publishing: PublishingOf) -> dict[str, Any]:
    await tenants.get(tenant)
    return _adapter_json(await publishing.catalog.adapter(tenant, name), publishing.dispatcher)


@router.patch("/tenants/{tenant}/adapters/{name}", openapi_extra=_documented(AdapterChange))
async def update_adapter(
    tenant: str,
    name: str,
    body: Annotated[AdapterChange, _json(AdapterChange)],
    tenants: TenantsOf,
    publishing: PublishingOf,
) -> dict[str, Any]:
    await tenants.get(tenant)
    if not body.model_fields_set:
        raise Unprocessable("Name at least one of live, default and pinned.")
    adapter = await publishing.catalog.update(tenant, name, **body.model_dump(exclude_unset=True))
    move_pin(publishing.dispatcher, adapter)
    return _adapter_json(adapter, publishing.dispatcher)


@router.delete("/tenants/{tenant}/adapters/{name}", status_code=204)
async def delete_adapter(
    tenant: str, name: str, request: Request, tenants: TenantsOf, publishing: PublishingOf
) -> Response:
    await tenants.get(tenant)
    _free(request, publishing, await publishing.catalog.delete_adapter(tenant, name))
    return Response(status_code=204)


@router.delete("/tenants/{tenant}/adapters/{name}/versions/{version}", status_code=204)
async def delete_version(
    tenant: str, name: str, version: int, request: Request, tenants: TenantsOf, publishing: PublishingOf
) -> Response:
    await tenants.get(tenant)
    _free(request, publishing, [await publishing.catalog.delete_version(tenant, name, version)])
    return Response(status_code=204)


@router.get("/residency")
async def residency(publishing: PublishingOf) -> dict[str, Any]:
    return asdict(publishing.dispatcher.snapshot())


def _free(request: Request, publishing: Publishing, versions: list[Version]) -> None:
    """In the background: the rows are gone, and the last request may go on for minutes."""
    tasks: set[asyncio.Task[None]] = request.app.state.tasks
    task = asyncio.create_task(unpublish(publishing, versions))
    tasks.add(task)
    task.add_done_callback(tasks.discard)


def _versions(adapters: list[Adapter]) -> list[Version]:
    return [info.version for adapter in adapters for info in adapter.versions]


def _tenant_json(tenant: Tenant) -> dict[str, Any]:
    return {
        "id": tenant.id,
        "name": tenant.name,
        "weight": tenant.weight,
        "base_allowed": tenant.base_allowed,
        "max_queued": tenant.max_queued,
        "max_running": tenant.max_running,
        "created_at": tenant.created_at.isoformat(),
    }


def _adapter_json(adapter: Adapter, dispatcher: Dispatcher) -> dict[str, Any]:
    live = adapter.live_version
    return {
        "name": adapter.name,
        "tenant": adapter.tenant,
        "live": adapter.live,
        "default": adapter.default,
        "pinned": adapter.pinned,
        "tier": dispatcher.tier_of(live) if live else Tier.DISK,
        "created_at": adapter.created_at.isoformat(),
        "versions": [
            {
                "version": info.version.number,
                "digest": info.version.digest,
                "tier": dispatcher.tier_of(info.version),
                "created_at": info.created_at.isoformat(),
                "report": dict(info.report),
            }
            for info in adapter.versions
        ],
    }
