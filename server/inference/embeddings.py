"""The use case: embeddings, where the base model makes them; admitted as completions are.

A long list of inputs is embedded a few at a time under one lease, so that it leaves places to others.
"""

from __future__ import annotations

import base64
import math
from array import array
from typing import Any

from server.accounts.tenants import Tenant
from server.engine.calls import Call, InFlight
from server.errors import BadRequest, Internal
from server.inference.completion import (
    Completion,
    Completions,
    acquire_lease,
    check_base,
    closed_on_failure,
    counted_refusals,
    prompt_tokens_bound,
    resolve_allowed,
)
from server.inference.dialects.base import Dialect
from server.inference.dialects.embeddings import MAX_INPUTS

# A request takes at most one in so many of the engine's places.
_SHARE = 4
_ENCODINGS = ("float", "base64")


async def embed(
    service: Completions, tenant: Tenant, dialect: Dialect, body: dict[str, Any], request_id: str
) -> Completion:
    """Answers ``body`` for ``tenant`` with a document; raises and may be cancelled as ``open_completion``."""
    engine = service.engine
    with counted_refusals(service, tenant):
        check_base(engine.base, dialect)
        version, public, reservation = await resolve_allowed(service, tenant, dialect, body, request_id)
        request = engine.parse(dialect.name, dialect.allowed_fields(body))
        if request.encoding_format not in _ENCODINGS:
            raise BadRequest("encoding_format must be float or base64", param="encoding_format")
        inputs = _inputs(request.input)
        text = str(body["input"])
        places = min(len(inputs), max(1, engine.max_running // _SHARE))
        prompt_tokens = engine.estimate_prompt_tokens(text)
        await reservation.reserve(prompt_tokens_bound(text), 0)
        lease = await acquire_lease(
            service,
            tenant,
            version,
            reservation,
            prompt_tokens=prompt_tokens,
            max_tokens=1,
            sequences=places,
        )
    parts = []
    async with closed_on_failure(lease):
        for at in range(0, len(inputs), places):
            call = Call(
                id=f"{request_id}-{at}",
                kind=dialect.name,
                model=version.key if version else engine.base.name,
                public_model=public,
                cache_salt=tenant.cache_salt,
                meter=lease,
                admission=lease.admission,
            )
            lease.work = InFlight(engine, call)
            some = request.model_copy(update={"input": inputs[at : at + places]})
            answer = await engine.answer(call, some)
            assert answer.body is not None
            parts.append(answer.body)
        whole = _joined(parts)
    await lease.close("completed")
    return Completion(public, lease, body=whole)


def _inputs(given: Any) -> list[str | list[int]]:
    """Each a text or the ids of its tokens. BadRequest for none, or more than ``MAX_INPUTS``."""
    inputs = given if isinstance(given, list) and not (given and isinstance(given[0], int)) else [given]
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise BadRequest(f"input must be 1 to {MAX_INPUTS} texts or lists of tokens", param="input")
    return inputs


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One document, in the order of the inputs. Internal if an embedding is not of numbers."""
    data = [one for part in parts for one in part["data"]]
    if not all(_finite(one["embedding"]) for one in data):
        raise Internal("The model's answer to this input is not a number.")
    tokens = sum(part["usage"]["prompt_tokens"] for part in parts)
    return {
        "object": "list",
        "data": [{**one, "index": index} for index, one in enumerate(data)],
        "model": parts[0]["model"],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _finite(embedding: list[float] | str) -> bool:
    values = array("f", base64.b64decode(embedding)) if isinstance(embedding, str) else embedding
    return math.isfinite(sum(values))
