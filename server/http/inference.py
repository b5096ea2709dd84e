"""``/v1``: what customers call. Thin: authenticate, read, hand over to ``complete``, write."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from adapters.model import DEFAULT_MODEL, Adapter
from server.accounts.tenants import Tenant
from server.errors import BadRequest, ModelNotFound
from server.http.answers import Model, Models
from server.http.auth import tenant_of
from server.http.bodies import json_object
from server.http.long_answers import answer_of, long_answer
from server.http.middleware import while_connected
from server.http.services import services_of
from server.http.streams import Late, LeasedResponse
from server.inference.completion import (
    Asked,
    Completion,
    check_dialect,
    is_numbered,
    open_completion,
    resolve,
    version_header,
)
from server.inference.dialects.base import Dialect
from server.inference.dialects.registry import COUNTING, SURFACES
from server.inference.embeddings import embed
from server.limits.permissions import check_model, may_name
from server.scheduling.lease import told_of

router = APIRouter(prefix="/v1", tags=["inference"])
tokens = APIRouter(tags=["inference"])

# vLLM reads these; a tenant must not choose its own place in the queue or in the cache.
_ENGINE_HEADERS = ("x-vllm-", "x-data-parallel-rank", "x-session-id")


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
    cards = {card["id"]: card for card in await _model_cards(request, tenant)}
    if name in cards:
        return cards[name]
    if is_numbered(name) or name == DEFAULT_MODEL:  # which a request may name too
        version, _ = await resolve(services_of(request).completions, tenant, name)
        if version is not None and version.adapter in cards:
            return cards[version.adapter] | {"id": name}
    raise ModelNotFound(f"The model `{name}` does not exist.", param="model")


async def _complete(request: Request, dialect: Dialect) -> Response:
    tenant, body = await _read(request)
    services = services_of(request)
    service = services.completions
    asked = Asked(request.state.request_id, tenant, dialect)
    # Also of refusals, and of a stream that begins while its request waits.
    request.state.headers = lambda: service.quotas.headers(tenant) | version_header(asked.version)
    request.state.operation = dialect.span or dialect.operation
    use_case = embed if dialect.pools else open_completion
    answering = use_case(service, asked, body)
    opening = while_connected(request, answering, Completion.discard)
    log: dict[str, Any] = request.state.log
    timeout, keepalive = services.settings.client_timeout, services.settings.sse_keepalive
    if keepalive and body.get("stream") is True and dialect.streams:
        task = asyncio.create_task(opening)
        if not await _done_within(task, keepalive):
            late = Late(task, dialect, log)
            return LeasedResponse(late, None, log, timeout, keepalive)
        opened = task.result()
    else:
        opened = await opening
    log["model"] = opened.model
    if opened.stream is not None:
        return LeasedResponse(opened.stream, opened.lease, log, timeout, keepalive)
    log |= told_of(opened.lease)
    return await answer_of(opened, timeout)


async def _done_within(task: asyncio.Task[Any], seconds: float) -> bool:
    """Whether ``task`` ends within ``seconds``; it is cancelled with whoever waits here."""
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task})
        raise
    return bool(done)


async def _tokens(request: Request, dialect: Dialect) -> Response:
    tenant, body = await _read(request)
    services = services_of(request)
    service = services.completions
    check_dialect(service.answers.base, dialect)
    version, _ = await resolve(service, tenant, body.get("model"))
    check_model(tenant, version.adapter if version else None)
    request.state.headers = lambda: version_header(version)
    document = await service.answers.tokens(dialect, dialect.allowed_fields(body), version)
    return await long_answer(document, services.settings.client_timeout)


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
    adapters = await services.completions.catalog.answering(tenant.id)
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


def _answers(dialect: Dialect) -> Callable[[Request], Awaitable[Response]]:
    """The route of a dialect that runs in the engine."""

    async def route(request: Request) -> Response:
        return await _complete(request, dialect)

    return route


def _counts(dialect: Dialect) -> Callable[[Request], Awaitable[Response]]:
    """The route of a dialect that the tokenizer answers alone."""

    async def route(request: Request) -> Response:
        return await _tokens(request, dialect)

    return route


for _dialect in SURFACES:
    _versioned = _dialect.path.startswith("/v1/")
    (router if _versioned else tokens).add_api_route(
        _dialect.path.removeprefix("/v1"),
        _counts(_dialect) if _dialect in COUNTING else _answers(_dialect),
        methods=["POST"],
        response_model=_dialect.answer,
        summary=_dialect.summary,
        name=_dialect.operation,
    )
