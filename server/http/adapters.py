"""The calls on one tenant's adapters, for the operator's routes and for the customer's own.

Each takes a ``Tenant`` that its key or its row has already proved, and raises as the catalog does.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NamedTuple, Self

from fastapi import Depends, Header, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from adapters.database.rows import MAX_INTEGER
from adapters.errors import AdapterNotFound
from adapters.model import ADAPTER_PATTERN, Quota, Version, Waivers
from adapters.split import WHOLE
from adapters.store.downloads import Download
from adapters.store.notes import annotate
from adapters.store.upload_jobs import JobSearch
from server.accounts.tenants import Tenant
from server.errors import TooManyRequests, Unprocessable
from server.http.adapter_text import adapter_text
from server.http.bodies import Body, body_as
from server.http.reports import page_of
from server.http.services import Services, services_of
from server.http.uploads import files_of
from server.limits.permissions import may_manage
from server.publishing.jobs import publish_later
from server.publishing.publish import Published, move_pin, publish, unpublish_at_last
from server.publishing.quarantine import quarantine
from server.rollouts.stored import as_json as rollout_as_json

Note = Annotated[str, Field(min_length=1, max_length=500, pattern=r"^[^\x00]*$")]


class Defaults(Body):
    """What a request gets that says nothing of it; all of them at once. ``system`` is a system prompt."""

    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=MAX_INTEGER)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    max_tokens: int | None = Field(None, ge=1, le=MAX_INTEGER)
    system: str | None = Field(None, max_length=32_768)


class AdapterChange(Body):
    """What a PATCH of an adapter changes; what is not named stays as it is."""

    live: int | None = Field(None, ge=1)
    default: bool | None = None
    pinned: bool | None = None
    split: dict[int, Annotated[int, Field(ge=1)]] | None = None
    keep_versions: int | None = Field(None, ge=0, le=MAX_INTEGER)
    quarantined: Literal[False] | None = None
    defaults: Defaults | None = None

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
    """Takes a version out of service, for a ``reason`` that its customers read as a clause, or puts it back;
    keeps a note with it, which null takes away."""

    quarantined: bool | None = None
    reason: Note | None = None
    note: Note | None = None

    @model_validator(mode="after")
    def _reason_of_a_quarantine(self) -> Self:
        if self.reason is not None and not self.quarantined:
            raise PydanticCustomError("reason", "A reason goes with `quarantined` true.")
        return self


AdapterChangeBody = Annotated[AdapterChange, body_as(AdapterChange)]
VersionChangeBody = Annotated[VersionChange, body_as(VersionChange)]


class UploadOptions(NamedTuple):
    """``key`` is the client's Idempotency-Key. ``wait`` for the outcome, or answer with a job.

    ``rollout``: the version does not go live at once, but by a rollout.
    """

    waived: Waivers
    key: str | None = None
    note: str | None = None
    wait: bool = True
    rollout: Literal["standard"] | None = None


def _upload_options(
    allow_no_effect: bool = False,
    allow_implausible: bool = False,
    ignore_fields: Annotated[str, Query(max_length=4096)] = "",
    note: Annotated[Note | None, Query(description="Kept with the version, for people.")] = None,
    wait: Annotated[bool, Query(description="`false`: answer 202 once the bytes are here.")] = True,
    rollout: Annotated[
        Literal["standard"] | None, Query(description="Goes live by a standard rollout, not at once.")
    ] = None,
    prefer: Annotated[str, Header(description="`respond-async` is the same as `wait=false`.")] = "",
    idempotency_key: Annotated[str | None, Header(pattern=r"^[\x21-\x7e]{1,255}$")] = None,
) -> UploadOptions:
    """``ignore_fields``: names from the adapter's config, separated by commas."""
    fields = {name for part in ignore_fields.split(",") if (name := part.strip())}
    waived = Waivers(allow_no_effect, allow_implausible, tuple(sorted(fields)))
    later = "respond-async" in (word.strip().lower() for word in prefer.split(","))
    return UploadOptions(waived, idempotency_key, note, wait and not later, rollout)


class Warm(Body):
    """Which version, the live one if None, and whether in a slot or just in host memory."""

    empty = b"{}"
    version: int | None = Field(None, ge=1)
    slot: bool = False


Versions = Annotated[int, Query(ge=1, le=1000, description="Most versions of a page, all adapters together.")]
AdaptersAfter = Annotated[
    str | None, Query(pattern=f"^{ADAPTER_PATTERN}$", description="`next` of the page before.")
]
UploadsAfter = Annotated[str | None, Query(max_length=32, description="`next` of the page before.")]
WarmBody = Annotated[Warm, body_as(Warm)]
UploadOptionsOf = Annotated[UploadOptions, Depends(_upload_options)]


async def listed(services: Services, tenant: Tenant, after: str | None, limit: int) -> Response:
    """Adapters of ``tenant`` that its key may manage; of all, as many as have ``limit`` versions together."""
    adapters, last = await services.publishing.catalog.page(tenant.id, after or "", limit)
    own = [adapter for adapter in adapters if may_manage(tenant, adapter.name)]
    shown = await asyncio.gather(*(adapter_text(adapter, services) for adapter in own))
    text = f'{{"object":"list","data":[{",".join(shown)}],"next":{json.dumps(last)}}}'
    return Response(text, media_type="application/json")


async def one(services: Services, tenant: Tenant, name: str) -> Response:
    """The adapter ``name`` of ``tenant``."""
    adapter = await services.publishing.catalog.adapter(tenant.id, name, reports=True)
    return Response(await adapter_text(adapter, services), media_type="application/json")


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
    given: dict[str, Any] = {
        "waived": options.waived, "key": options.key, "quota": quota, "annotation": options.note,
        "make_live": options.rollout is None,
    }  # fmt: skip
    # One that is repeated is answered with the rollout that it began.
    if options.rollout is not None and not await services.publishing.receipts.has(tenant.id, options.key):
        await services.judge.check_idle(tenant.id, name)

    async def finished(published: Published) -> dict[str, Any]:
        _free(services, published.gone)
        return await _rolled_out(services, tenant, published) if options.rollout else dict(published.answer)

    async with services.intake.enter(tenant.id, quota.size_bytes if quota else None) as place:
        files = place.written(
            files_of(
                request,
                services.blobs.quarantine,
                max_bytes=services.settings.max_upload_bytes,
                prefixes=prefixes,
                counted=place.counted,
            )
        )
        if not options.wait:
            services.publishing.catalog.check_name(name)

            def in_background(work: Coroutine[Any, Any, None]) -> None:
                place.keep_until(services.in_background(work))

            later = in_background, finished
            job = await publish_later(services.publishing, tenant.id, name, files, *later, **given)
            # Where the rest is asked for, by whoever sent this.
            where = request.url.path.removesuffix("/versions") + f"/uploads/{job['id']}"
            return JSONResponse(job, status_code=202, headers={"Location": where})
        published = await publish(services.publishing, tenant.id, name, files, **given)
    return JSONResponse(await finished(published), status_code=201)


async def _rolled_out(services: Services, tenant: Tenant, published: Published) -> dict[str, Any]:
    """The answer to an upload, with its rollout: null for a first version, which is live at once.

    An upload that is repeated with its key has the rollout that it began.
    """
    answer = dict(published.answer)
    name, version = str(answer["adapter"]), int(answer["version"])
    begun = await services.judge.rows.of_version(tenant.id, name, version)
    if begun is None and answer["live"] != version:
        begun = await services.judge.start(tenant.id, name, version)
    return answer | {"rollout": rollout_as_json(begun) if begun is not None else None}


async def uploads(services: Services, search: JobSearch, limit: int) -> dict[str, Any]:
    """Uploads that are answered later, and refused ones; newest first."""
    return page_of(await services.publishing.jobs.search(search, limit + 1), limit, "id")


async def download(services: Services, tenant: Tenant, name: str, version: int) -> StreamingResponse:
    """The files of a version as a tar, as they are stored and served."""
    catalog = services.publishing.catalog
    found = await catalog.version(tenant.id, name, version, quarantined=True)
    try:
        golden = (await catalog.golden(found)).model_dump()
    except AdapterNotFound:
        golden = None
    async with services.held(found):
        tar = await asyncio.to_thread(Download, found.path, golden)
    headers = {
        "Content-Length": str(tar.size_bytes),
        "Content-Disposition": f'attachment; filename="{name}-{version}.tar"',
    }
    return StreamingResponse(tar, media_type="application/x-tar", headers=headers)


async def warm(services: Services, tenant: Tenant, name: str, body: Warm) -> dict[str, Any]:
    """Loads a version; returns when it is in host memory, or in a slot."""
    version = await services.publishing.catalog.version(tenant.id, name, body.version, param="version")
    timeout = services.settings.queue_timeout
    tier = await services.dispatcher.warm(version, slot=body.slot, timeout=timeout)
    return {"adapter": name, "version": version.number, "tier": tier}


@contextmanager
def one_at_a_time(services: Services, tenant: Tenant) -> Iterator[None]:
    """TooManyRequests while the same tenant does this already: it costs the engine, and nobody counts it."""
    if tenant.id in services.busy:
        raise TooManyRequests("One call of this kind at a time. Try again when it has ended.", retry_after=1)
    services.busy.add(tenant.id)
    try:
        yield
    finally:
        services.busy.discard(tenant.id)


async def update(services: Services, tenant: Tenant, name: str, change: AdapterChange) -> Response:
    """Changes the adapter, all of it or nothing; Unprocessable where nothing is named."""
    if not change.model_fields_set:
        raise Unprocessable(f"Name at least one of {', '.join(AdapterChange.model_fields)}.")
    changes = change.model_dump(exclude_unset=True)
    if change.defaults is not None:
        changes["defaults"] = change.defaults.model_dump(exclude_none=True)
    changes["released"] = changes.pop("quarantined", None) is False
    if "split" in changes:
        await services.judge.check_idle(tenant.id, name)
    move_pin(services.dispatcher, await services.publishing.catalog.update(tenant.id, name, **changes))
    return await one(services, tenant, name)


async def update_version(
    services: Services, tenant: Tenant, name: str, version: int, change: VersionChange
) -> Response:
    """Takes a version out of service or puts it back, and changes its note; Unprocessable for neither."""
    if not change.model_fields_set:
        raise Unprocessable(f"Name at least one of {', '.join(VersionChange.model_fields)}.")
    publishing = services.publishing
    if change.quarantined:
        found = await publishing.catalog.version(tenant.id, name, version, quarantined=True)
        reason = change.reason or "an operator has taken it out of service"
        here = services.dispatcher if services.peers is None else None  # a gateway's run at replicas
        await quarantine(publishing.quarantine, here, found, reason)
    elif change.quarantined is False:
        await publishing.quarantine.release(tenant.id, name, version)
    if "note" in change.model_fields_set:
        await annotate(services.database, tenant.id, name, version, change.note)
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
        services.in_background(unpublish_at_last(services.publishing, list(versions)))
