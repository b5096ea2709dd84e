"""``/v1``: what customers call. Thin: authenticate, read, hand over to ``complete``, write."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from adapters.errors import AdapterNotFound
from adapters.model import Adapter
from server.accounts.tenants import Tenant
from server.errors import BadRequest, ModelNotFound
from server.http.answers import Model, Models
from server.http.auth import tenant_of
from server.http.bodies import json_object
from server.http.middleware import while_connected
from server.http.services import services_of
from server.inference.completion import (
    Completion,
    LeasedStream,
    check_base,
    open_completion,
    resolve,
)
from server.inference.dialects.base import Dialect
from server.inference.dialects.registry import ANSWERING, COUNTING
from server.inference.embeddings import embed
from server.limits.permissions import may_name
from server.scheduling.lease import Lease

router = APIRouter(prefix="/v1", tags=["inference"])
tokens = APIRouter(tags=["inference"])

# vLLM reads these; a tenant must not choose its own place in the queue or in the cache.
_ENGINE_HEADERS = ("x-vllm-", "x-data-parallel-rank", "x-session-id")


class LeasedResponse(StreamingResponse):
    """SSE that closes its stream whatever happens: read to the end, left by the client, or never begun."""

    def __init__(
        self, stream: LeasedStream, lease: Lease, log: dict[str, Any], client_timeout: float
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would hold a stream back
        super().__init__(stream, media_type="text/event-stream", headers=headers | _version_header(lease))
        self._stream = stream
        self._lease = lease
        self._log = log
        self._client_timeout = client_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ends the connection of a client that does not read: its place in the engine is others' too."""
        loop = asyncio.get_running_loop()
        limit = asyncio.timeout(None)
        sending: float | None = None  # since when
        timer: asyncio.TimerHandle

        def look() -> None:
            """One timer a response: one for each chunk costs as much as the chunk's own way through."""
            nonlocal timer
            due = self._client_timeout + (loop.time() if sending is None else sending)
            if due > loop.time():
                timer = loop.call_at(due, look)
            else:
                limit.reschedule(due)

        async def send_in_time(message: Message) -> None:
            nonlocal sending
            sending = loop.time()
            await send(message)
            sending = None

        timer = loop.call_later(self._client_timeout, look)
        try:
            async with limit:
                await super().__call__(scope, receive, send_in_time)
        except (TimeoutError, ClientDisconnect):
            if not limit.expired():
                raise
        finally:
            timer.cancel()
            await self._stream.aclose()
            self._log |= _usage(self._lease)


@router.get("/models/", include_in_schema=False)
@router.get(
    "/models",
    response_model=Models,
    response_model_exclude_unset=True,
    summary="The customer's adapters, and the base model where allowed",
)
async def models(request: Request) -> dict[str, Any]:
    tenant = await tenant_of(request)
    return {"object": "list", "data": await _model_cards(request, tenant)}


@router.get(
    "/models/{name:path}", response_model=Model, response_model_exclude_unset=True, summary="One of them"
)
async def model(request: Request, name: str) -> dict[str, Any]:
    tenant = await tenant_of(request)
    for card in await _model_cards(request, tenant):
        if card["id"] == name:
            return card
    raise ModelNotFound(f"The model `{name}` does not exist.", param="model")


async def _complete(request: Request, dialect: Dialect) -> Response:
    tenant, body = await _read(request)
    services = services_of(request)
    service = services.completions
    request.state.headers = partial(service.quotas.headers, tenant)
    id_ = request.state.request_id
    use_case = embed if dialect.base == "embeddings" else open_completion
    opening = use_case(service, tenant, dialect, body, id_)
    opened = await while_connected(request, opening, Completion.discard)
    log: dict[str, Any] = request.state.log
    log["model"] = opened.model
    if opened.stream is not None:
        return LeasedResponse(opened.stream, opened.lease, log, services.settings.client_timeout)
    log |= _usage(opened.lease)
    return JSONResponse(opened.body, headers=_version_header(opened.lease))


def _version_header(lease: Lease) -> dict[str, str]:
    """Which version answers, which a canary leaves open; nothing for the base."""
    version = lease.version
    return {"X-Loraplex-Version": f"{version.adapter}@{version.number}"} if version else {}


async def _tokens(request: Request, dialect: Dialect) -> dict[str, Any]:
    tenant, body = await _read(request)
    service = services_of(request).completions
    check_base(service.answers.base, dialect)
    await resolve(service, tenant, body.get("model"))
    return await service.answers.tokens(dialect, dialect.allowed_fields(body))


async def _read(request: Request) -> tuple[Tenant, dict[str, Any]]:
    """Who asks, and what."""
    tenant = await tenant_of(request)
    for header in request.headers:
        if header.startswith(_ENGINE_HEADERS):
            raise BadRequest(f"The header {header} is not accepted.", code="unknown_header", param=header)
    return tenant, await json_object(request)


async def _model_cards(request: Request, tenant: Tenant) -> list[dict[str, Any]]:
    services = services_of(request)
    base = services.completions.answers.base.name
    try:
        adapters = await services.completions.catalog.adapters(tenant.id)
    except AdapterNotFound:
        adapters = []
    problem = services.publishing.fitness.problem
    live = [a for a in adapters if a.shares and any(problem(version) is None for version, _ in a.shares)]
    cards = [_card(adapter, base) for adapter in live if may_name(tenant, adapter.name)]
    if tenant.base_allowed and may_name(tenant, None):
        cards.append({"id": base, "object": "model", "created": services.started, "owned_by": "loraplex"})
    return cards


def _card(adapter: Adapter, base: str) -> dict[str, Any]:
    return {
        "id": adapter.name,
        "object": "model",
        "created": int(adapter.created_at.timestamp()),
        "owned_by": adapter.tenant,
        "parent": base,
    }


def _usage(lease: Lease) -> dict[str, Any]:
    """What the log line says of a request that ran."""
    first = lease.first_token_after
    return {
        "adapter": lease.version.adapter if lease.version else None,
        "version": lease.version.number if lease.version else None,
        "outcome": lease.outcome,
        "prompt_tokens": lease.prompt_tokens,
        "cached_tokens": lease.cached_tokens,
        "output_tokens": lease.output_tokens,
        "cold": lease.load_seconds > 0,
        "queue_seconds": round(lease.queued_for, 4),
        "load_seconds": round(lease.load_seconds, 4),
        "first_token_seconds": None if first is None else round(first, 4),
    } | ({"code": lease.code} if lease.code else {})


def _answers(dialect: Dialect) -> Callable[[Request], Awaitable[Response]]:
    """The route of a dialect that runs in the engine."""

    async def route(request: Request) -> Response:
        return await _complete(request, dialect)

    return route


def _counts(dialect: Dialect) -> Callable[[Request], Awaitable[dict[str, Any]]]:
    """The route of a dialect that the tokenizer answers alone."""

    async def route(request: Request) -> dict[str, Any]:
        return await _tokens(request, dialect)

    return route


for _dialect in (*ANSWERING, *COUNTING):
    _versioned = _dialect.path.startswith("/v1/")
    (router if _versioned else tokens).add_api_route(
        _dialect.path.removeprefix("/v1"),
        _answers(_dialect) if _dialect in ANSWERING else _counts(_dialect),
        methods=["POST"],
        response_model=_dialect.answer,
        summary=_dialect.summary,
        name=_dialect.operation,
    )
