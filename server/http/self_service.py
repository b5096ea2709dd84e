"""``/v1/adapters``: a customer's own adapters, with a key that has the scope ``adapters:write``.

Bodies and answers are those of the admin API, by the same code; the tenant is always the key's.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from adapters.model import Quota
from server.errors import Forbidden
from server.http import adapters, answers
from server.http.adapters import AdapterChange, AdapterChangeBody, UploadOptionsOf
from server.http.auth import AdapterOwner
from server.http.bodies import documented
from server.http.services import ServicesOf

router = APIRouter(prefix="/v1/adapters", tags=["self-service"])


@router.get("", response_model=answers.Adapters)
async def list_adapters(owner: AdapterOwner, services: ServicesOf) -> dict[str, Any]:
    return await adapters.listed(services, owner)


@router.get("/{name}", response_model=answers.Adapter)
async def get_adapter(owner: AdapterOwner, name: str, services: ServicesOf) -> dict[str, Any]:
    return await adapters.one(services, owner, name)


@router.post(
    "/{name}/versions",
    status_code=201,
    response_model=answers.NewVersion,
    summary="Upload; 403 `quota_exceeded` beyond the quota",
)
async def create_version(
    owner: AdapterOwner, name: str, request: Request, options: UploadOptionsOf
) -> JSONResponse:
    if options.waived.implausible:
        raise Forbidden("Only the operator can accept an implausible adapter.", param="allow_implausible")
    limits = owner.limits
    quota = Quota(limits.max_adapters, limits.max_storage_bytes) if limits else None
    # Nothing is imported by URL: what the operator lets the server read may be another customer's.
    return await adapters.receive_version(request, owner, name, options, quota=quota)


@router.patch("/{name}", response_model=answers.Adapter, openapi_extra=documented(AdapterChange))
async def update_adapter(
    owner: AdapterOwner, name: str, body: AdapterChangeBody, services: ServicesOf
) -> dict[str, Any]:
    if body.pinned is not None:
        raise Forbidden("Only the operator can pin an adapter.", param="pinned")
    if body.quarantined is not None:
        raise Forbidden("Only the operator can release an adapter.", param="quarantined")
    return await adapters.update(services, owner, name, body)


@router.delete("/{name}", status_code=204)
async def delete_adapter(owner: AdapterOwner, name: str, services: ServicesOf) -> Response:
    await adapters.delete(services, owner, name)
    return Response(status_code=204)


@router.delete("/{name}/versions/{version}", status_code=204)
async def delete_version(owner: AdapterOwner, name: str, version: int, services: ServicesOf) -> Response:
    await adapters.delete_version(services, owner, name, version)
    return Response(status_code=204)
