"""Embeddings and labels, where the base makes them: naming and limits as for completions, and their own.

A long list of inputs is embedded a few at a time under one lease, so that it leaves places to others.
"""

from __future__ import annotations

import base64
import math
from array import array
from dataclasses import replace
from typing import Any

from adapters.tasks import run_in_thread
from server.accounts.tenants import Tenant
from server.errors import BadRequest, Internal
from server.inference.completion import (
    Asked,
    Completion,
    Completions,
    Order,
    check_base,
    counted_refusals,
    estimate_prompt_tokens,
    is_numbered,
    prompt_tokens_bound,
    recorded_refusals,
    resolve_allowed,
)
from server.inference.dialects.base import Dialect
from server.inference.dialects.embeddings import MAX_INPUTS
from server.inference.dialects.scoring import EMBEDDINGS, Scoring

# A request takes at most one in so many of the engine's places.
_SHARE = 4
_ENCODINGS = ("float", "base64")


async def embed(
    service: Completions,
    tenant: Tenant,
    dialect: Dialect,
    body: dict[str, Any],
    request_id: str,
    asked: Asked | None = None,
) -> Completion:
    """Answers ``body`` for ``tenant`` with a document; else as ``open_completion``."""
    asked = asked or Asked()
    if isinstance(dialect, Scoring):
        return await _score(service, tenant, dialect, body, request_id, asked)
    return await _embed(service, tenant, dialect, dialect, body, request_id, asked)


async def _score(
    service: Completions,
    tenant: Tenant,
    dialect: Scoring,
    body: dict[str, Any],
    request_id: str,
    asked: Asked,
) -> Completion:
    """From the embeddings of what is compared, which are asked for under the dialect's name."""
    with (
        recorded_refusals(service, tenant, dialect, request_id, asked),
        counted_refusals(service.metrics, tenant),
    ):
        check_base(service.answers.base, dialect)
        fields = dialect.allowed_fields(body)
        compared = dialect.asked(fields)
    wanted = dialect.embeddings_body(fields | {"model": body.get("model")}, compared)
    try:
        opened = await _embed(service, tenant, dialect, EMBEDDINGS, wanted, request_id, asked)
    except BadRequest as exc:
        if exc.param == "input":  # no field of the request's own
            exc.param = compared.longest
        raise
    assert opened.body is not None
    told = await run_in_thread(dialect.told, request_id, fields, compared, opened.body)
    return replace(opened, body=told)


async def _embed(
    service: Completions,
    tenant: Tenant,
    dialect: Dialect,
    embeddings: Dialect,
    body: dict[str, Any],
    request_id: str,
    asked: Asked,
) -> Completion:
    """``dialect`` is that of the request, ``embeddings`` that of what the engine is asked."""
    with recorded_refusals(service, tenant, dialect, request_id, asked):
        with counted_refusals(service.metrics, tenant):
            check_base(service.answers.base, dialect)
            resolved = await resolve_allowed(service, tenant, dialect, body, request_id)
            version, public, reservation = resolved
            asked.version, asked.reservation = version, reservation
            asked.numbered = is_numbered(body.get("model"))
            fields = embeddings.allowed_fields(body)
            text = str(body.get("input", ""))
        order = Order(
            id=request_id,
            tenant=tenant,
            dialect=embeddings,
            fields=fields,
            version=version,
            public_model=public,
            reservation=reservation,
            prompt_bound=prompt_tokens_bound(text),
            prompt_tokens=estimate_prompt_tokens(text),
            elastic=False,
        )
        return await service.answers.open(order)


def inputs_of(request: Any) -> list[str | list[int]]:
    """Each a text or the ids of its tokens. BadRequest for none, more than ``MAX_INPUTS``, or an encoding
    that is unknown."""
    if getattr(request, "encoding_format", "float") not in _ENCODINGS:
        raise BadRequest("encoding_format must be float or base64", param="encoding_format")
    given = request.input
    inputs = given if isinstance(given, list) and not (given and isinstance(given[0], int)) else [given]
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise BadRequest(f"input must be 1 to {MAX_INPUTS} texts or lists of tokens", param="input")
    return inputs


def places_of(inputs: list[str | list[int]], max_running: int) -> int:
    """How many of ``inputs`` run at the same time."""
    return min(len(inputs), max(1, max_running // _SHARE))


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One document, in the order of the inputs. Internal if an embedding or a score is no number."""
    data = [one for part in parts for one in part["data"]]
    if not all(_finite(one["embedding"] if "embedding" in one else one["probs"]) for one in data):
        raise Internal("The model's answer to this input is not a number.")
    tokens = sum(part["usage"]["prompt_tokens"] for part in parts)
    return {
        **{name: parts[0][name] for name in ("id", "created") if "probs" in data[0]},
        "object": "list",
        "data": [{**one, "index": index} for index, one in enumerate(data)],
        "model": parts[0]["model"],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _finite(embedding: list[float] | str) -> bool:
    values = array("f", base64.b64decode(embedding)) if isinstance(embedding, str) else embedding
    return math.isfinite(sum(values))
