"""Embeddings, labels and scores, where the base makes them: naming and limits as for completions.

A long list of inputs is embedded a few at a time under one lease, so that it leaves places to others.
"""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from adapters.model import DEFAULT_MODEL, BaseModel, Version
from adapters.tasks import run_in_thread
from server.errors import BadRequest, Internal
from server.inference.completion import (
    Asked,
    Completion,
    Completions,
    check_dialect,
    counted_refusals,
    estimate_prompt_tokens,
    prompt_tokens_bound,
    recorded_refusals,
    resolve_allowed,
)
from server.inference.dialects.base import Dialect
from server.inference.dialects.embeddings import MAX_INPUTS
from server.inference.dialects.scoring import (
    EMBEDDINGS,
    PAIRS,
    Scoring,
    check_labels,
    embeddings_body,
    pairs_body,
    pairs_of,
    scores_of,
)
from server.scheduling.nouns import together

# What the engine is given at a time: a text, the ids of its tokens, or two texts to compare.
Input = str | list[int] | tuple[str, str]
_ENCODINGS = ("float", "base64")


async def embed(service: Completions, asked: Asked, body: dict[str, Any]) -> Completion:
    """Answers ``body`` with a document; else as ``open_completion``."""
    if isinstance(asked.dialect, Scoring):
        return await _score(service, asked, asked.dialect, body)
    return await _embed(service, asked, asked.dialect, body)


async def _score(service: Completions, asked: Asked, dialect: Scoring, body: dict[str, Any]) -> Completion:
    """From the embeddings of what is compared, or a head's scores of it; counted under the dialect's name."""
    base = service.answers.base
    with recorded_refusals(service, asked), counted_refusals(service.metrics, asked.tenant):
        check_dialect(base, dialect)
        fields = dialect.allowed_fields(body)
        compared = dialect.asked(fields)
        by_head = base.makes == "labels"
        wanted = (pairs_body if by_head else embeddings_body)(fields, compared)
    try:
        opened = await _embed(service, asked, PAIRS if by_head else EMBEDDINGS, wanted)
    except BadRequest as exc:
        if exc.param == "input":  # no field of the request's own
            exc.param = compared.longest
        raise
    answered = opened.document
    scores = await run_in_thread(scores_of, compared, answered)
    return replace(opened, body=dialect.told(asked.id, fields, compared, scores, answered), parts=None)


async def _embed(service: Completions, asked: Asked, by: Dialect, body: dict[str, Any]) -> Completion:
    """``by`` is the dialect of ``body``, which the engine is asked in; the request may have another."""
    with recorded_refusals(service, asked):
        with counted_refusals(service.metrics, asked.tenant):
            check_dialect(service.answers.base, asked.dialect)
            await resolve_allowed(service, asked, body)
            if by is PAIRS:
                check_labels(asked.public_model, labels_of(asked.version, service.answers.base))
                fields = body | {"model": body.get("model") or DEFAULT_MODEL}
            else:
                fields = by.allowed_fields(body)
            bound, likely = _tokens_of(body)
        order = asked.order(by, fields, "", prompt_bound=bound, elastic=False)
        return await service.answers.open(replace(order, prompt_tokens=likely))


def labels_of(version: Version | None, base: BaseModel) -> int:
    """How many numbers ``version`` gives for an input: its own head's labels, or those of the base."""
    own = None if version is None else version.labels
    return own if own is not None else base.head.labels if base.head is not None else 0


def _tokens_of(body: Mapping[str, Any]) -> tuple[int, int]:
    """(high estimate, likely number) of the tokens in all inputs of ``body``; a query counts in each pair."""
    if "documents" not in body:
        text = str(body.get("input", ""))
        return prompt_tokens_bound(text), estimate_prompt_tokens(text)
    texts = [body["queries"]] if isinstance(body["queries"], str) else body["queries"]
    times = len(body["documents"]) if isinstance(body["queries"], str) else 1
    sized = [(text, times) for text in texts] + [(text, 1) for text in body["documents"]]
    bound = sum(prompt_tokens_bound(text) * often for text, often in sized)
    return bound, sum(estimate_prompt_tokens(text) * often for text, often in sized)


def inputs_of(request: Any) -> Sequence[Input]:
    """What ``request`` is to be answered for. BadRequest for none, more than ``MAX_INPUTS``, or an encoding
    that is unknown."""
    if hasattr(request, "documents"):  # as many as ``Scoring.asked`` allows
        return pairs_of(request.queries, request.documents)
    if getattr(request, "encoding_format", "float") not in _ENCODINGS:
        raise BadRequest("encoding_format must be float or base64", param="encoding_format")
    given = request.input
    inputs = given if isinstance(given, list) and not (given and isinstance(given[0], int)) else [given]
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise BadRequest(f"input must be 1 to {MAX_INPUTS} texts or lists of tokens", param="input")
    found: list[Input] = inputs
    return found


def part_of(request: Any, inputs: Sequence[Input]) -> Any:
    """``request`` for some of its inputs."""
    if hasattr(request, "documents"):
        queries, documents = zip(*inputs, strict=True)
        return request.model_copy(update={"queries": list(queries), "documents": list(documents)})
    return request.model_copy(update={"input": list(inputs)})


def places_of(inputs: Sequence[Input], max_running: int) -> int:
    """How many of ``inputs`` run at the same time."""
    return together(len(inputs), max_running)


def most_places(fields: dict[str, Any], max_running: int) -> int:
    """The most that ``places_of`` can say of a request with these fields, which nobody has parsed.

    A list of tokens is one input, as for ``inputs_of``.
    """
    lists = (value for value in fields.values() if isinstance(value, list))
    longest = max((len(each) for each in lists if not (each and isinstance(each[0], int))), default=1)
    return together(max(1, longest), max_running)


def finite(part: dict[str, Any], dialect: Dialect) -> dict[str, Any]:
    """The answer to some of the inputs. Internal if an embedding or a score in it is no number."""
    if not all(_finite(one[dialect.numbers_field]) for one in part["data"]):
        raise Internal("The model's answer to this input is not a number.")
    return part


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One document, in the order of the inputs."""
    data = [one for part in parts for one in part["data"]]
    tokens = sum(part["usage"]["prompt_tokens"] for part in parts)
    return {
        **{name: parts[0][name] for name in ("id", "created") if "probs" in data[0]},
        "object": "list",
        "data": [{**one, "index": index} for index, one in enumerate(data)],
        "model": parts[0]["model"],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _finite(numbers: list[float] | float | str) -> bool:
    """Whether each is, of an embedding (also in base64), of labels or of a score."""
    if isinstance(numbers, str):
        return math.isfinite(sum(array("f", base64.b64decode(numbers))))
    return math.isfinite(sum(numbers) if isinstance(numbers, list) else numbers)
