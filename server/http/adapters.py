"""The calls on one tenant's adapters, for the operator's routes and for the customer's own.

Each takes a ``Tenant`` that its key or its row has already proved, and raises as the catalog does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self

from fastapi import Depends, Header, Query, Request
from fastapi.responses import JSONResponse
from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from adapters.database.rows import MAX_INTEGER
from adapters.model import Adapter, Quota, Tier, Version, Waivers
from adapters.split import WHOLE
from adapters.store.fitness import Fitness
from server.accounts.tenants import Tenant
from server.errors import Unprocessable
from server.http.bodies import Body, body_as
from server.http.services import Services, services_of
from server.http.uploads import files_of
from server.publishing.publish import move_pin, publish, unpublish


class AdapterChange(Body):
    """What a PATCH of an adapter changes; what is not named stays as it is."""

    live: int | None = Field(None, ge=1)
    default: bool | None = None
    pinned: bool | None = None
    split: dict[int, Annotated[int, Field(ge=1)]] | None = None
    keep_versions: int | None = Field(None, ge=0, le=MAX_INTEGER)
    quarantined: Literal[False] | None = None

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


class VersionChange(Body):
    """Puts a version back into service."""

    quarantined: Literal[False]


AdapterChangeBody = Annotated[AdapterChange, body_as(AdapterChange)]
VersionChangeBody = Annotated[VersionChange, body_as(VersionChange)]


class UploadOptions(NamedTuple):
    """``key`` is the client's Idempotency-Key."""

    waived: Waivers
    key: str | None = None


def _upload_options(
    allow_no_effect: bool = False,
    allow_implausible: bool = False,
    ignore_fields: Annotated[str, Query(max_length=4096)] = "",
    idempotency_key: Annotated[str | None, Header(pattern=r"^[\x21-\x7e]{1,255}$")] = None,
) -> UploadOptions:
    """``ignore_fields``: names from the adapter's config, separated by commas."""
    fields = {name for part in ignore_fields.split(",") if (name := part.strip())}
    waived = Waivers(allow_no_effect, allow_implausible, tuple(sorted(fields)))
    return UploadOptions(waived, idempotency_key)


UploadOptionsOf = Annotated[UploadOptions, Depends(_upload_options)]


async def listed(services: Services, tenant: Tenant) -> dict[str, Any]:
    """All adapters of ``tenant``."""
    adapters = await services.publishing.catalog.adapters(tenant.id)
    return {"object": "list", "data": [as_json(adapter, services) for adapter in adapters]}


async def one(services: Services, tenant: Tenant, name: str) -> dict[str, Any]:
    """The adapter ``name`` of ``tenant``."""
    return as_json(await services.publishing.catalog.adapter(tenant.id, name), services)


async def receive_version(
    request: Request,
    tenant: Tenant,
    name: str,
    options: UploadOptions,
    *,
    prefixes: Sequence[str] = (),
    quota: Quota | None = None,
) -> JSONResponse:
    """Publishes the files in the body of ``request``; ``prefixes`` are the sources that may be fetched."""
    services = services_of(request)
    async with services.intake.enter(tenant.id, quota.size_bytes if quota else None) as place:
        files = files_of(
            request,
            services.blobs.quarantine,
            max_bytes=services.settings.max_upload_bytes,
            prefixes=prefixes,
            counted=place.counted,
        )
        published = await publish(
            services.publishing,
            tenant.id,
            name,
            place.written(files),
            waived=options.waived,
            key=options.key,
            quota=quota,
        )
    _free(services, published.gone)
    return JSONResponse(dict(published.answer), status_code=201)


async def update(services: Services, tenant: Tenant, name: str, change: AdapterChange) -> dict[str, Any]:
    """Changes the adapter, all of it or nothing; Unprocessable where nothing is named."""
    if not change.model_fields_set:
        raise Unprocessable(f"Name at least one of {', '.join(AdapterChange.model_fields)}.")
    changes = change.model_dump(exclude_unset=True)
    if changes.pop("quarantined", None) is False:
        live = (await services.publishing.catalog.adapter(tenant.id, name)).live
        if live is not None:
            await services.publishing.quarantine.release(tenant.id, name, live)
    adapter = await services.publishing.catalog.update(tenant.id, name, **changes)
    move_pin(services.dispatcher, adapter)
    return as_json(adapter, services)


async def release_version(services: Services, tenant: Tenant, name: str, version: int) -> dict[str, Any]:
    """Puts a quarantined version back into service."""
    await services.publishing.quarantine.release(tenant.id, name, version)
    return await one(services, tenant, name)


async def delete(services: Services, tenant: Tenant, name: str) -> None:
    """Takes the adapter away from new requests at once; its bytes go when the last running one has ended."""
    _free(services, await services.publishing.catalog.delete_adapter(tenant.id, name))


async def delete_version(services: Services, tenant: Tenant, name: str, version: int) -> None:
    """As ``delete``, for one version."""
    _free(services, [await services.publishing.catalog.delete_version(tenant.id, name, version)])


async def delete_tenant(services: Services, tenant: Tenant) -> None:
    """Removes the tenant with its keys and adapters; running requests finish."""
    adapters = await services.publishing.catalog.adapters(tenant.id)
    versions = [info.version for adapter in adapters for info in adapter.versions]
    await services.tenants.delete(tenant.id)
    _free(services, versions)


def _free(services: Services, versions: Sequence[Version]) -> None:
    """In the background: the rows are gone, and the last request may go on for minutes."""
    if versions:
        services.in_background(unpublish(services.publishing, list(versions)))


def as_json(adapter: Adapter, services: Services) -> dict[str, Any]:
    """The adapter as both APIs show it, with the tiers that its versions are in now."""
    live, dispatcher = adapter.live_version, services.dispatcher
    fitness = services.publishing.fitness
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
                "quarantine": dict(info.quarantine) if info.quarantine else None,
                "problem": _problem(fitness, info.version),
                "report": dict(info.report),
            }
            for info in adapter.versions
        ],
    }


def _problem(fitness: Fitness, version: Version) -> dict[str, str] | None:
    """Why a version is not loaded any more, although nobody has taken it out of service."""
    if (unfit := fitness.problem(version)) is not None:
        return {"code": unfit.code, "message": unfit.message}
    if (damaged := fitness.damage(version)) is not None:
        return {"code": damaged.code, "message": damaged.message}
    return None
