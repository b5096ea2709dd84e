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
from server.errors import BadRequest, Internal
from server.inference.completion import (
    Asked,
    Completion,
    Completions,
    check_base,
    counted_refusals,
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


async def embed(service: Completions, asked: Asked, body: dict[str, Any]) -> Completion:
    """Answers ``body`` with a document; else as ``open_completion``."""
    if isinstance(asked.dialect, Scoring):
        return await _score(service, asked, asked.dialect, body)
    return await _embed(service, asked, asked.dialect, body)


async def _score(service: Completions, asked: Asked, dialect: Scoring, body: dict[str, Any]) -> Completion:
    """From the embeddings of what is compared, which are asked for under the dialect's name."""
    with recorded_refusals(service, asked), counted_refusals(service.metrics, asked.tenant):
        check_base(service.answers.base, dialect)
        fields = dialect.allowed_fields(body)
        compared = dialect.asked(fields)
    wanted = dialect.embeddings_body(fields | {"model": body.get("model")}, compared)
    try:
        opened = await _embed(service, asked, EMBEDDINGS, wanted)
    except BadRequest as exc:
        if exc.param == "input":  # no field of the request's own
            exc.param = compared.longest
        raise
    assert opened.body is not None
    told = await run_in_thread(dialect.told, asked.id, fields, compared, opened.body)
    return replace(opened, body=told)


async def _embed(service: Completions, asked: Asked, embeddings: Dialect, body: dict[str, Any]) -> Completion:
    """``embeddings`` is the dialect of ``body``, which the engine is asked; the request may have another."""
    with recorded_refusals(service, asked):
        with counted_refusals(service.metrics, asked.tenant):
            check_base(service.answers.base, asked.dialect)
            await resolve_allowed(service, asked, body)
            fields = embeddings.allowed_fields(body)
            text = str(body.get("input", ""))
        order = asked.order(embeddings, fields, text, prompt_bound=prompt_tokens_bound(text), elastic=False)
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
