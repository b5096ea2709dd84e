"""``/v1/files`` and ``/v1/batches``, as OpenAI has them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from multipart import MultipartSegment
from pydantic import Field, ValidationError

from adapters.errors import FileNotFound
from adapters.store.batches import Batch, BatchSearch, State
from adapters.store.files import StoredFile
from server.accounts.tenants import Tenant
from server.batches.lines import ENDPOINTS
from server.batches.runner import create
from server.errors import BadRequest, NotFound
from server.http import answers_batches as answers
from server.http.auth import ADMIN, tenant_of
from server.http.bodies import Body, documented, json_object, limited_body
from server.http.reports import Limit, page_of
from server.http.services import Services, ServicesOf
from server.http.uploads import boundary_of, segments
from server.inference.bounds import SETTING_JSON
from server.inference.completion import check_dialect

router = APIRouter(prefix="/v1", tags=["self-service"])
operators = APIRouter(prefix="/admin/v1", tags=["admin"], dependencies=[ADMIN])

PURPOSES = ("batch", "batch_output")
KEEP = timedelta(days=30)
SHORTEST_S, LONGEST_S = 3600, 30 * 24 * 3600
# Of a form's fields that are no file; and of a form beside its file.
_FIELD_BYTES, _ROOM = 1024, 64 << 10
_TIMES = (
    "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled",
)  # fmt: skip


async def _asking(request: Request) -> Tenant:
    """The tenant, where this server takes batches at all; NotFound."""
    tenant = await tenant_of(request)
    services: Services = request.app.state.services
    if not services.batches.running:
        raise NotFound("This server takes no batches.")
    return tenant


Asking = Annotated[Tenant, Depends(_asking)]
After = Annotated[str | None, Query(max_length=64, description="`last_id` of the page before.")]


class ExpiresAfter(Body):
    """How long what a batch writes is kept."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=SHORTEST_S, le=LONGEST_S)


class NewBatch(Body):
    """A batch of the lines of a file."""

    input_file_id: str = Field(max_length=64)
    endpoint: str
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = Field(None, max_length=16)
    output_expires_after: ExpiresAfter | None = None


# --- files ------------------------------------------------------------------------------------------


@router.post("/files", response_model=answers.File, summary="Keep a file of requests, for a batch")
async def create_file(request: Request, tenant: Asking, services: ServicesOf) -> dict[str, Any]:
    boundary = boundary_of(request.headers.get("content-type"), _FORM)
    limits, files = tenant.limits, services.batches.files
    most = limits.max_storage_bytes if limits else None
    async with services.intake.enter(tenant.id, most) as place:
        body = place.counted(limited_body(request, services.settings.max_file_bytes + _ROOM))
        form = _Form(segments(body, boundary))
        stored = await files.receive(tenant.id, form.content())
        try:
            keep, filename = form.checked()
            return _file(await files.publish(stored, "batch", filename, keep))
        except BaseException:
            await files.discard(stored)
            raise


_FORM = "Send multipart/form-data with a field `purpose`, which is `batch`, and a file in a field `file`."


class _Form:
    """The fields of an upload, in any order; the bytes of ``file`` pass through ``content``."""

    def __init__(self, pieces: AsyncIterator[tuple[MultipartSegment, bytes]]) -> None:
        self._pieces = pieces
        self._fields: dict[str, bytes] = {}
        self._filename: str | None = None

    async def content(self) -> AsyncIterator[bytes]:
        """Raises BadRequest for a field that is unknown, too long, or comes twice."""
        async for part, piece in self._pieces:
            if part.name == "file":
                if not piece and self._filename is not None:
                    raise BadRequest("Send one file.", param="file")
                self._filename = part.filename or "file.jsonl"
                if piece:
                    yield piece
                continue
            if not piece and part.name in self._fields:
                raise BadRequest("The field comes twice.", param=part.name)
            value = self._fields[part.name] = self._fields.get(part.name, b"") + piece
            if len(value) > _FIELD_BYTES:
                raise BadRequest("The field is too long.", param=part.name)

    def checked(self) -> tuple[timedelta, str]:
        """(how long the file is kept, its name). Raises BadRequest."""
        given = {name: value.decode("utf-8", "replace") for name, value in self._fields.items()}
        if (purpose := given.pop("purpose", None)) != "batch":
            text = "`purpose` must be `batch`, the only one that is served here."
            raise BadRequest(text if purpose else _FORM, param="purpose")
        if self._filename is None:
            raise BadRequest(_FORM, param="file")
        anchor, seconds = given.pop("expires_after[anchor]", None), given.pop("expires_after[seconds]", None)
        if given:
            name = min(given)
            raise BadRequest(f"Unknown field `{name[:100]}`.", code="unknown_field", param=name)
        if anchor is None and seconds is None:
            return KEEP, self._filename
        short = seconds is not None and seconds.isascii() and seconds.isdigit() and len(seconds) < 9
        if anchor != "created_at" or not short or not SHORTEST_S <= int(seconds or 0) <= LONGEST_S:
            text = f"`expires_after` needs the anchor `created_at` and {SHORTEST_S} to {LONGEST_S} seconds."
            raise BadRequest(text, param="expires_after")
        return timedelta(seconds=int(seconds or 0)), self._filename


@router.get("/files", response_model=answers.FilePage, summary="The customer's files, newest first")
async def list_files(
    tenant: Asking,
    services: ServicesOf,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> dict[str, Any]:
    found = await services.batches.files.search(
        tenant.id, purpose=purpose, after=after, most=limit + 1, oldest=order == "asc"
    )
    return _page([_file(file) for file in found], limit)


@router.get("/files/{file_id}", response_model=answers.File, summary="What is known of a file")
async def get_file(tenant: Asking, file_id: str, services: ServicesOf) -> dict[str, Any]:
    return _file(await services.batches.files.get(tenant.id, file_id))


@router.get(
    "/files/{file_id}/content", response_class=StreamingResponse, summary="A file's bytes, as JSON lines"
)
async def get_content(tenant: Asking, file_id: str, services: ServicesOf) -> StreamingResponse:
    files = services.batches.files
    file = await files.get(tenant.id, file_id)
    return StreamingResponse(files.content(file), media_type="application/jsonl")


@router.delete(
    "/files/{file_id}",
    response_model=answers.DeletedFile,
    summary="Remove a file; 409 while a batch reads it",
)
async def delete_file(tenant: Asking, file_id: str, services: ServicesOf) -> dict[str, Any]:
    await services.batches.files.delete(tenant.id, file_id)
    return {"id": file_id, "object": "file", "deleted": True}


# --- batches ----------------------------------------------------------------------------------------


@router.post(
    "/batches",
    response_model=answers.Batch,
    openapi_extra=documented(NewBatch),
    summary="Answer the lines of a file within 24 hours, when there is room",
)
async def create_batch(request: Request, tenant: Asking, services: ServicesOf) -> dict[str, Any]:
    asked = _new_batch(await json_object(request, SETTING_JSON))
    dialect = ENDPOINTS.get(asked.endpoint)
    if dialect is None:
        raise BadRequest(f"`endpoint` must be one of {', '.join(ENDPOINTS)}.", param="endpoint")
    check_dialect(services.completions.answers.base, dialect)
    try:
        file = await services.batches.files.get(tenant.id, asked.input_file_id)
    except FileNotFound as exc:
        raise BadRequest(exc.message, code=exc.code, param="input_file_id") from None
    if file.purpose != "batch":
        raise BadRequest("The file was not uploaded with the purpose `batch`.", param="input_file_id")
    after = asked.output_expires_after
    keep = timedelta(seconds=after.seconds) if after else KEEP
    batch = await create(services.batches, tenant, asked.endpoint, file, notes=asked.metadata, keep=keep)
    return _as_json(batch)


def _new_batch(body: dict[str, Any]) -> NewBatch:
    """Raises BadRequest; OpenAI's clients know 400 for it."""
    try:
        asked = NewBatch.model_validate(body)
    except ValidationError as exc:
        first = exc.errors()[0]
        param = ".".join(map(str, first["loc"]))
        raise BadRequest(f"{param}: {first['msg']}", param=param) from None
    for key, value in (asked.metadata or {}).items():
        if len(key) > 64 or len(value) > 512:
            text = "A key of `metadata` has at most 64 characters, a value 512."
            raise BadRequest(text, param="metadata")
    return asked


@router.get("/batches", response_model=answers.BatchPage, summary="The customer's batches, newest first")
async def list_batches(
    tenant: Asking,
    services: ServicesOf,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> dict[str, Any]:
    found = await services.batches.batches.search(BatchSearch(tenant.id, after=after), limit + 1)
    return _page([_as_json(batch) for batch in found], limit)


@router.get("/batches/{batch_id}", response_model=answers.Batch, summary="How far a batch is")
async def get_batch(tenant: Asking, batch_id: str, services: ServicesOf) -> dict[str, Any]:
    return _as_json(await services.batches.batches.get(tenant.id, batch_id))


@router.post(
    "/batches/{batch_id}/cancel", response_model=answers.Batch, summary="Stop a batch; its results are kept"
)
async def cancel_batch(tenant: Asking, batch_id: str, services: ServicesOf) -> dict[str, Any]:
    return _as_json(await services.batches.batches.cancel(tenant.id, batch_id))


@operators.get(
    "/batches", response_model=answers.TenantBatches, summary="All customers' batches, newest first"
)
async def all_batches(
    services: ServicesOf,
    tenant: str | None = None,
    state: State | None = None,
    after: After = None,
    limit: Limit = 100,
) -> dict[str, Any]:
    """Without what is in them; `after` is the `next` of the page before."""
    search = BatchSearch(tenant, state, after)
    found = await services.batches.batches.search(search, limit + 1)
    data = [_as_json(batch) | {"tenant": batch.tenant} for batch in found]
    return page_of(data, limit, "id")


def _page(found: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    page = found[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(found) > limit,
    }


def _file(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": int(file.created_at.timestamp()),
        "expires_at": int(file.expires_at.timestamp()) if file.expires_at else None,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def _as_json(batch: Batch) -> dict[str, Any]:
    """As OpenAI shows it."""
    counts = batch.counts
    read, written = counts["prompt_tokens"], counts["output_tokens"]
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": {"object": "list", "data": batch.errors} if batch.errors else None,
        "input_file_id": batch.input_file,
        "completion_window": "24h",
        "status": batch.state,
        "output_file_id": batch.output_file,
        "error_file_id": batch.error_file,
        "created_at": int(batch.created_at.timestamp()),
        "expires_at": int(batch.expires_at.timestamp()),
        **{f"{name}_at": batch.times.get(name) for name in _TIMES},
        "request_counts": {
            "total": batch.total,
            "completed": counts["completed"],
            "failed": counts["failed"],
        },
        "usage": {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": counts["cached_tokens"]},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": read + written,
        },
        "metadata": batch.notes,
    }
