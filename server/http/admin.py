"""``/admin/v1``: what operators call. Thin: authenticate, parse, hand over, show."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from fastapi import APIRouter, Depends, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from adapters.database.audit import ACTOR, Actor
from adapters.database.rows import MAX_INTEGER
from adapters.model import Adapter, Quota, Tier, Version
from adapters.split import WHOLE
from server.accounts.keys import DEFAULT_SCOPES, SCOPES, KeyScope
from server.accounts.tenants import Priority, Tenants
from server.accounts.terms import Budgets, KeyLimits, TenantLimits
from server.errors import Unprocessable
from server.http.middleware import parse_object, whole_body
from server.http.services import services_of
from server.http.uploads import files_of
from server.publishing.publish import Publishing, move_pin, publish, unpublish, verify
from server.scheduling.dispatcher import Dispatcher


async def _admin(request: Request) -> None:
    await services_of(request).tenants.require_admin(request.headers.get("authorization"))
    ACTOR.set(Actor("admin", request.state.request_id))


router = APIRouter(prefix="/admin/v1", tags=["admin"], dependencies=[Depends(_admin)])


class _Body(BaseModel):
    """``empty`` is what an empty body stands for."""

    model_config = ConfigDict(extra="forbid", strict=True)
    empty: ClassVar[bytes] = b""


class NewTenant(_Body):
    id: str
    name: str | None = None
    weight: float = Field(1.0, gt=0, le=1000, allow_inf_nan=False)
    priority: Priority = "standard"
    base_allowed: bool = True
    max_queued: int | None = Field(None, ge=1)
    max_running: int | None = Field(None, ge=1)
    limits: TenantLimits = TenantLimits()
    budgets: Budgets = Budgets()


class TenantChange(_Body):
    name: str | None = None
    weight: float | None = Field(None, gt=0, le=1000, allow_inf_nan=False)
    priority: Priority | None = None
    base_allowed: bool | None = None
    max_queued: int | None = Field(None, ge=1)
    max_running: int | None = Field(None, ge=1)
    limits: TenantLimits = TenantLimits()
    budgets: Budgets = Budgets()


class NewKey(_Body):
    empty = b"{}"
    name: str | None = None
    scopes: list[KeyScope] = Field(list(DEFAULT_SCOPES), min_length=1, max_length=len(SCOPES))
    expires_at: datetime | None = Field(None, strict=False)
    limits: KeyLimits | None = None


class Rotation(_Body):
    empty = b"{}"
    overlap_seconds: int = Field(0, ge=0, le=366 * 86400)


class AdapterChange(_Body):
    live: int | None = Field(None, ge=1)
    default: bool | None = None
    pinned: bool | None = None
    split: dict[int, Annotated[int, Field(ge=1)]] | None = None
    keep_versions: int | None = Field(None, ge=0, le=MAX_INTEGER)

    @field_validator("split", mode="before")
    @classmethod
    def _numbers(cls, split: Any) -> Any:
        """JSON's keys are texts; whatever is no version's number stays one and is refused."""
        if not isinstance(split, dict):
            return split
        return {int(n) if re.fullmatch("[1-9][0-9]{0,8}", n, re.ASCII) else n: w for n, w in split.items()}

    @model_validator(mode="after")
    def _answers_once(self) -> Self:
        if self.split is not None and sum(self.split.values()) != WHOLE:
            raise PydanticCustomError("split", f"The shares of a split add up to {WHOLE}.")
        if self.split is not None and self.live is not None:
            raise PydanticCustomError("split", "Name live or a split: either says which version answers.")
        return self


class Warm(_Body):
    """Which version, the live one if None, and whether in a slot or just in host memory."""

    empty = b"{}"
    version: int | None = Field(None, ge=1)
    slot: bool = False


def _json(model: type[_Body]) -> Any:
    """The body as ``model``: read after the key was checked, and no more of it than is allowed.

    FastAPI would read all of it first, whoever sent it.
    """

    async def read(request: Request) -> _Body:
        raw = await whole_body(request)
        try:
            return model.model_validate(parse_object(raw or model.empty))
        except ValidationError as exc:
            raise RequestValidationError(exc.errors()) from exc

    return Depends(read)


def documented(model: type[_Body]) -> dict[str, Any]:
    schema = {"schema": model.model_json_schema(ref_template="#/components/schemas/{model}")}
    return {"requestBody": {"content": {"application/json": schema}, "required": not model.empty}}


def _tenants(request: Request) -> Tenants:
    return services_of(request).tenants


def _publishing(request: Request) -> Publishing:
    return services_of(request).publishing


AdapterChangeBody = Annotated[AdapterChange, _json(AdapterChange)]
TenantsOf = Annotated[Tenants, Depends(_tenants)]
PublishingOf = Annotated[Publishing, Depends(_publishing)]


@router.post("/tenants", status_code=201, openapi_extra=documented(NewTenant))
async def create_tenant(body: Annotated[NewTenant, _json(NewTenant)], tenants: TenantsOf) -> dict[str, Any]:
    return (await tenants.create(**dict(body))).shown()


@router.get("/tenants")
async def list_tenants(tenants: TenantsOf) -> dict[str, Any]:
    return {"object": "list", "data": [t.shown() for t in await tenants.list()]}


@router.get("/tenants/{tenant}")
async def get_tenant(tenant: str, tenants: TenantsOf) -> dict[str, Any]:
    return (await tenants.get(tenant)).shown()


@router.patch("/tenants/{tenant}", openapi_extra=documented(TenantChange))
async def update_tenant(
    tenant: str, body: Annotated[TenantChange, _json(TenantChange)], tenants: TenantsOf
) -> dict[str, Any]:
    changes: Any = {name: getattr(body, name) for name in body.model_fields_set}
    return (await tenants.update(tenant, **changes)).shown()


@router.delete("/tenants/{tenant}", status_code=204)
async def delete_tenant(
    tenant: str, request: Request, tenants: TenantsOf, publishing: PublishingOf
) -> Response:
    await tenants.get(tenant)
    versions = _versions(await publishing.catalog.adapters(tenant))
    await tenants.delete(tenant)
    _free(request, publishing, versions)
    return Response(status_code=204)


@router.post("/tenants/{tenant}/keys", status_code=201, openapi_extra=documented(NewKey))
async def create_key(
    tenant: str, body: Annotated[NewKey, _json(NewKey)], tenants: TenantsOf
) -> dict[str, Any]:
    issued = await tenants.issue_key(tenant, **dict(body))
    return {"id": issued.id, "key": issued.key, "name": issued.name}


@router.post("/tenants/{tenant}/keys/{key_id}/rotate", status_code=201, openapi_extra=documented(Rotation))
async def rotate_key(
    tenant: str, key_id: str, body: Annotated[Rotation, _json(Rotation)], tenants: TenantsOf
) -> dict[str, Any]:
    issued, old = await tenants.rotate_key(tenant, key_id, timedelta(seconds=body.overlap_seconds))
    return {"id": issued.id, "key": issued.key, "name": issued.name, "replaces": old.shown()}


@router.get("/tenants/{tenant}/keys")
async def list_keys(tenant: str, tenants: TenantsOf) -> dict[str, Any]:
    return {"object": "list", "data": [key.shown() for key in await tenants.keys(tenant)]}


@router.delete("/tenants/{tenant}/keys/{key_id}", status_code=204)
async def revoke_key(tenant: str, key_id: str, tenants: TenantsOf) -> Response:
    await tenants.revoke(tenant, key_id)
    return Response(status_code=204)


class UploadOptions(NamedTuple):
    allow_no_effect: bool = False
    key: str | None = None


def _upload_options(
    allow_no_effect: bool = False,
    idempotency_key: Annotated[str | None, Header(pattern=r"^[\x21-\x7e]{1,255}$")] = None,
) -> UploadOptions:
    return UploadOptions(allow_no_effect, idempotency_key)


UploadOptionsOf = Annotated[UploadOptions, Depends(_upload_options)]


@router.post("/tenants/{tenant}/adapters/{name}/versions", status_code=201)
async def create_version(
    tenant: str,
    name: str,
    request: Request,
    tenants: TenantsOf,
    publishing: PublishingOf,
    options: UploadOptionsOf,
) -> JSONResponse:
    await tenants.get(tenant)
    settings = services_of(request).settings
    return await receive_version(tenant, name, request, publishing, options, settings.import_prefixes)


async def receive_version(
    tenant: str,
    name: str,
    request: Request,
    publishing: Publishing,
    options: UploadOptions,
    prefixes: Sequence[str] = (),
    quota: Quota | None = None,
) -> JSONResponse:
    """``prefixes`` are the sources that may be fetched for whoever asks."""
    settings = services_of(request).settings
    files = files_of(
        request, publishing.blobs.quarantine, max_bytes=settings.max_upload_bytes, prefixes=prefixes
    )
    published = await publish(
        publishing,
        tenant,
        name,
        files,
        allow_no_effect=options.allow_no_effect,
        key=options.key,
        quota=quota,
    )
    if published.gone:
        _free(request, publishing, published.gone)
    return JSONResponse(dict(published.answer), status_code=201)


@router.get("/tenants/{tenant}/adapters")
async def list_adapters(tenant: str, tenants: TenantsOf, publishing: PublishingOf) -> dict[str, Any]:
    await tenants.get(tenant)
    adapters = await publishing.catalog.adapters(tenant)
    return {"object": "list", "data": [_adapter_json(a, publishing.dispatcher) for a in adapters]}


@router.get("/tenants/{tenant}/adapters/{name}")
async def get_adapter(tenant: str, name: str, tenants: TenantsOf, publishing: PublishingOf) -> dict[str, Any]:
    await tenants.get(tenant)
    return _adapter_json(await publishing.catalog.adapter(tenant, name), publishing.dispatcher)


@router.patch("/tenants/{tenant}/adapters/{name}", openapi_extra=documented(AdapterChange))
async def update_adapter(
    tenant: str,
    name: str,
    body: AdapterChangeBody,
    tenants: TenantsOf,
    publishing: PublishingOf,
) -> dict[str, Any]:
    await tenants.get(tenant)
    if not body.model_fields_set:
        raise Unprocessable(f"Name at least one of {', '.join(AdapterChange.model_fields)}.")
    adapter = await publishing.catalog.update(tenant, name, **body.model_dump(exclude_unset=True))
    move_pin(publishing.dispatcher, adapter)
    return _adapter_json(adapter, publishing.dispatcher)


@router.post("/tenants/{tenant}/adapters/{name}/warm", openapi_extra=documented(Warm))
async def warm_adapter(
    tenant: str,
    name: str,
    body: Annotated[Warm, _json(Warm)],
    request: Request,
    tenants: TenantsOf,
    publishing: PublishingOf,
) -> dict[str, Any]:
    await tenants.get(tenant)
    version = await publishing.catalog.version(tenant, name, body.version, param="version")
    timeout = services_of(request).settings.queue_timeout
    tier = await publishing.dispatcher.warm(version, slot=body.slot, timeout=timeout)
    return {"adapter": name, "version": version.number, "tier": tier}


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


@router.post("/tenants/{tenant}/adapters/{name}/verify")
async def verify_adapter(
    tenant: str, name: str, tenants: TenantsOf, publishing: PublishingOf, version: int | None = None
) -> dict[str, Any]:
    await tenants.get(tenant)
    return await verify(publishing, tenant, name, version)


@router.get("/residency")
async def residency(publishing: PublishingOf) -> dict[str, Any]:
    return asdict(publishing.dispatcher.snapshot())


def _free(request: Request, publishing: Publishing, versions: list[Version]) -> None:
    """In the background: the rows are gone, and the last request may go on for minutes."""
    services_of(request).in_background(unpublish(publishing, versions))


def _versions(adapters: list[Adapter]) -> list[Version]:
    return [info.version for adapter in adapters for info in adapter.versions]


def _adapter_json(adapter: Adapter, dispatcher: Dispatcher) -> dict[str, Any]:
    live = adapter.live_version
    return {
        "name": adapter.name,
        "tenant": adapter.tenant,
        "live": adapter.live,
        "default": adapter.default,
        "pinned": adapter.pinned,
        "split": adapter.split,
        "keep_versions": adapter.keep_versions,
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
