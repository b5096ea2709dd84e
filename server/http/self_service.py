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
from server.http.adapters import (
    AdapterChange,
    AdapterChangeBody,
    UploadOptionsOf,
    VersionChange,
    VersionChangeBody,
    Warm,
    WarmBody,
)
from server.http.auth import AdapterOwner
from server.http.bodies import documented
from server.http.services import ServicesOf
from server.publishing.publish import verify

router = APIRouter(prefix="/v1/adapters", tags=["self-service"])


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
) -> Response:
    if body.pinned is not None:
        raise Forbidden("Only the operator can pin an adapter.", param="pinned")
    if body.quarantined is not None:
        raise Forbidden("Only the operator can release an adapter.", param="quarantined")
    return await adapters.update(services, owner, name, body)


@router.patch(
    "/{name}/versions/{version}", response_model=answers.Adapter, openapi_extra=documented(VersionChange)
)
async def update_version(
    owner: AdapterOwner, name: str, version: int, body: VersionChangeBody, services: ServicesOf
) -> Response:
    """Its note; the operator alone takes it out of service and puts it back."""
    if body.model_fields_set & {"quarantined", "reason"}:
        raise Forbidden("Only the operator can quarantine or release a version.", param="quarantined")
    return await adapters.update_version(services, owner, name, version, body)


@router.post("/{name}/warm", response_model=answers.Warmed, openapi_extra=documented(Warm))
async def warm_adapter(
    owner: AdapterOwner, name: str, body: WarmBody, services: ServicesOf
) -> dict[str, Any]:
    """Into host memory; a slot is given to requests, and to whom the operator says."""
    if body.slot:
        raise Forbidden("Only the operator can load an adapter into a slot.", param="slot")
    with adapters.one_at_a_time(services, owner):
        return await adapters.warm(services, owner, name, body)


@router.post("/{name}/verify", response_model=answers.Verified, response_model_exclude_unset=True)
async def verify_adapter(
    owner: AdapterOwner, name: str, services: ServicesOf, version: int | None = None
) -> dict[str, Any]:
    """Holds a version against the `probes.json` that it came with; one call at a time."""
    with adapters.one_at_a_time(services, owner):
        return await verify(services.publishing, owner.id, name, version)
