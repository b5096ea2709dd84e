"""``/v1/me`` and ``/v1/keys``: what a customer's key is, and the customer's other keys."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import Field

from server.accounts.keys import DEFAULT_SCOPES, SCOPES, KeyScope
from server.accounts.tenants import Tenant
from server.errors import Forbidden
from server.http import answers, answers_operators
from server.http.admin import Rotation
from server.http.auth import KeyOwner, Manager, Member
from server.http.bodies import Body, body_as, documented
from server.http.observation import limits_of
from server.http.services import ServicesOf

router = APIRouter(prefix="/v1", tags=["self-service"])


class OwnKey(Body):
    """A key that a customer makes for itself: it may do no more than the key that makes it."""

    empty = b"{}"
    name: str | None = None
    scopes: list[KeyScope] = Field(list(DEFAULT_SCOPES), min_length=1, max_length=len(SCOPES))
    expires_at: datetime | None = Field(None, strict=False)


@router.get(
    "/me",
    response_model=answers_operators.Me,
    summary="Whose key this is, what it may do, and what is left of its limits",
)
async def me(tenant: Member, services: ServicesOf) -> dict[str, Any]:
    """A gateway's request has no key, and the scopes of one for inference."""
    key, base = tenant.key, services.engine.base
    return {
        "tenant": {"id": tenant.id, "name": tenant.name, "created_at": tenant.created_at.isoformat()},
        "key": key.as_json() if key else None,
        "scopes": list(key.scopes) if key else list(DEFAULT_SCOPES),
        "sample_prompts": tenant.sample_prompts,
        "base": {
            "name": base.name,
            "allowed": tenant.base_allowed,
            "fingerprint": base.fingerprint,
            "max_lora_rank": base.max_lora_rank,
            "dtype": services.engine.lora_dtype,
        },
        "max_model_len": services.engine.max_model_len,
        **{name: value for name, value in (await limits_of(services, tenant)).items() if name != "tenant"},
    }


@router.get("/keys", response_model=answers.Keys, summary="The customer's keys, without their secrets")
async def list_keys(tenant: Manager, services: ServicesOf) -> dict[str, Any]:
    """Without secrets, oldest first."""
    return {"object": "list", "data": [key.as_json() for key in await services.tenants.keys(tenant.id)]}


@router.post("/keys", response_model=answers.NewKey, status_code=201, openapi_extra=documented(OwnKey))
async def create_key(
    tenant: KeyOwner, body: Annotated[OwnKey, body_as(OwnKey)], services: ServicesOf
) -> dict[str, Any]:
    """With at most the scopes of the key that asks, its limits, and an end that is not after its own."""
    assert tenant.key is not None
    more = [scope for scope in body.scopes if scope not in tenant.key.scopes]
    if more:
        raise Forbidden(f"This key does not have the scope `{more[0]}` itself.", param="scopes")
    ends = [time for time in (body.expires_at, tenant.key.expires_at) if time is not None]
    issued = await services.tenants.issue_key(
        tenant.id,
        body.name,
        scopes=body.scopes,
        expires_at=min(ends, default=None),
        limits=tenant.key.limits,
    )
    return {"id": issued.id, "key": issued.key, "name": issued.name}


@router.post(
    "/keys/{key_id}/rotate",
    response_model=answers.RotatedKey,
    status_code=201,
    openapi_extra=documented(Rotation),
)
async def rotate_key(
    tenant: KeyOwner, key_id: str, body: Annotated[Rotation, body_as(Rotation)], services: ServicesOf
) -> dict[str, Any]:
    """Not a key that may do more than the one that asks, or for longer."""
    await _check_not_stronger(tenant, key_id, services)
    overlap = timedelta(seconds=body.overlap_seconds)
    issued, old = await services.tenants.rotate_key(tenant.id, key_id, overlap)
    return {"id": issued.id, "key": issued.key, "name": issued.name, "replaces": old.as_json()}


@router.delete("/keys/{key_id}", status_code=204)
async def revoke_key(tenant: KeyOwner, key_id: str, services: ServicesOf) -> Response:
    """Refused from the next request on."""
    await services.tenants.revoke(tenant.id, key_id)
    return Response(status_code=204)


async def _check_not_stronger(tenant: Tenant, key_id: str, services: ServicesOf) -> None:
    """Forbidden for a key that may more than the one that asks, or for longer: whoever rotates it, has it."""
    assert tenant.key is not None
    ends = tenant.key.expires_at
    for key in await services.tenants.keys(tenant.id):
        more = set(key.scopes) - set(tenant.key.scopes)
        longer = ends is not None and (key.expires_at is None or key.expires_at > ends)
        if key.id == key_id and (more or longer or (key.limits != tenant.key.limits and tenant.key.limits)):
            raise Forbidden("That key may do more than yours, or for longer. Ask the operator to rotate it.")
