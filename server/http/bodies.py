"""Request bodies: bounded in size and time, read as JSON, and made a model of."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import AsyncIterator, Awaitable
from typing import Any, ClassVar, TypeVar

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, ValidationError

from adapters.awake import AwakeTimeout
from adapters.errors import UploadTooLarge
from adapters.inspection import strict_json
from adapters.inspection.strict_json import Bounds
from server.errors import BadRequest, RequestTimeout, UnsupportedEncoding
from server.http.services import services_of
from server.inference.bounds import CLIENT_JSON, SETTING_JSON

T = TypeVar("T")


async def limited_body(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body in chunks. Raises UploadTooLarge past ``limit`` bytes, before they are all received.

    RequestTimeout if a chunk does not come within ``client_timeout``; UnsupportedEncoding if it is
    compressed, so that a few bytes never become many.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedEncoding("Send the body as it is, without Content-Encoding.")
    if request.headers.get("transfer-encoding", "chunked").lower() != "chunked":
        raise UnsupportedEncoding("Send the body as it is: of Transfer-Encodings only `chunked` is read.")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise UploadTooLarge(
            f"The body is larger than the {limit} bytes that are allowed.", code="body_too_large"
        )
    received = 0
    stream, seconds = request.stream(), services_of(request).settings.client_timeout
    while (chunk := await _in_time(anext(stream, None), seconds)) is not None:
        received += len(chunk)
        if received > limit:
            raise UploadTooLarge(
                f"The body is larger than the {limit} bytes that are allowed.", code="body_too_large"
            )
        yield chunk


async def whole_body(request: Request) -> bytes:
    """A body of at most ``max_body_bytes``, within ``client_timeout``. Raises as ``limited_body``.

    And as ``HeldBodies.add``; what is held is given back when the request has ended.
    """
    services = services_of(request)
    settings, bodies = services.settings, services.bodies
    owner, held = str(request.state.log.get("tenant", "")), 0
    chunks: list[bytes] = []

    async def read() -> None:
        nonlocal held
        async for chunk in limited_body(request, settings.max_body_bytes):
            bodies.add(owner, len(chunk))
            held += len(chunk)
            chunks.append(chunk)

    request.state.release = lambda: bodies.remove(owner, held)
    await _in_time(read(), settings.client_timeout)
    return b"".join(chunks)


async def _in_time(work: Awaitable[T], seconds: float) -> T:
    try:
        async with AwakeTimeout(seconds):
            return await work
    except TimeoutError as exc:
        raise RequestTimeout(f"The body did not come within {seconds:g} seconds.") from exc


async def json_object(request: Request, bounds: Bounds = CLIENT_JSON) -> dict[str, Any]:
    """The body as a JSON object within ``bounds``. Raises BadRequest, or as ``whole_body``."""
    return parse_object(await whole_body(request), bounds)


def parse_object(raw: bytes, bounds: Bounds = CLIENT_JSON) -> dict[str, Any]:
    """``raw`` as a JSON object; BadRequest for anything that two readers could understand differently."""
    try:
        body = strict_json.loads(raw.removeprefix(BOM_UTF8), bounds)
    except ValueError as exc:
        raise BadRequest(f"The body is not valid JSON: {str(exc)[:200]}", code="invalid_json") from exc
    if not isinstance(body, dict):
        raise BadRequest("The body must be a JSON object.", code="invalid_json")
    return body


class Body(BaseModel):
    """A JSON body with no other fields than the model's. ``empty`` is what an empty body stands for."""

    model_config = ConfigDict(extra="forbid", strict=True)
    empty: ClassVar[bytes] = b""


def body_as(model: type[Body]) -> Any:
    """A dependency: the body as ``model``, read after the key was checked, and no more of it than is allowed.

    FastAPI would read all of it first, whoever sent it.
    """

    async def read(request: Request) -> Body:
        raw = await whole_body(request)
        try:
            return model.model_validate(parse_object(raw or model.empty, SETTING_JSON))
        except ValidationError as exc:
            raise RequestValidationError(exc.errors()) from exc

    return Depends(read)


def documented(model: type[Body]) -> dict[str, Any]:
    """``openapi_extra`` of a route that reads ``model``."""
    schema = {"schema": model.model_json_schema(ref_template="#/components/schemas/{model}")}
    return {"requestBody": {"content": {"application/json": schema}, "required": not model.empty}}
