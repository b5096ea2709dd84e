"""``/v1/rerank``, as Cohere, Jina and vLLM have it, and vLLM's ``/v1/score``.

Where a base makes embeddings, a score is the cosine of two texts' embeddings, which is what vLLM calls a
bi-encoder's. Where it has a head, as a cross-encoder has, both texts are read at once and the score is what
the head says of them. Either way the engine is asked for a few at a time under one lease: vLLM's own classes
would send a thousand documents into the engine at once, past everybody who waits.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from server.engine.calls import Call
from server.engine.serving import numbers_of
from server.errors import BadRequest, Unavailable
from server.inference.dialects.answers import Reranked, Scores
from server.inference.dialects.base import Dialect
from server.inference.dialects.embeddings import Embeddings
from server.inference.dialects.fields import Only
from server.inference.dialects.schema import BOOL, MODEL, TEXT, Schema, object_of

EMBEDDINGS = Embeddings()
MAX_TEXTS = 1024
_TEXTS: Schema = {"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1, "maxItems": MAX_TEXTS}]}
_PROMPT = frozenset({"model", "truncate_prompt_tokens", "truncation_side", "user"})
_SHARED = _PROMPT | {"use_activation"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is compared: each pair is of two places in ``texts``. ``names`` says which fields have them."""

    texts: list[str]
    names: list[str]
    pairs: list[tuple[int, int]]

    @property
    def longest(self) -> str:
        """Where the longest text is, which is too long if any is."""
        return max(zip(self.texts, self.names, strict=True), key=lambda text: len(text[0]))[1]


class Scoring(Dialect):
    """Answered from the scores of the pairs that a request compares, whatever made them."""

    base = "scores"
    streams = False

    def asked(self, body: Mapping[str, Any]) -> Comparison:
        """Raises BadRequest."""
        raise NotImplementedError

    def told(
        self,
        id_: str,
        body: Mapping[str, Any],
        asked: Comparison,
        scores: Sequence[float],
        of: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The answer. ``of`` is the engine's, which has the model's name and the usage."""
        raise NotImplementedError


class Rerank(Scoring):
    name = "rerank"
    place = 7
    path = "/v1/rerank"
    operation = "rerank"
    example: ClassVar[Mapping[str, Any]] = {
        "model": "support",
        "query": "capital of France",
        "documents": ["Paris", "Rome"],
    }
    summary = (
        "Documents by how near they are to a query, where the base model makes embeddings or scores pairs"
    )
    answer = Reranked
    accepted = _SHARED | {"query", "documents", "top_n", "return_documents"}
    only: ClassVar[Mapping[str, Only]] = {  # of Cohere and vLLM, with the values that ask for nothing
        "max_chunks_per_doc": ((1,), "documents are not cut into pieces"),
        "max_tokens_per_doc": ((0,), "documents are not cut; see `truncate_prompt_tokens`"),
        "max_tokens_per_query": ((0,), "queries are not cut; see `truncate_prompt_tokens`"),
        "rank_fields": (([], ["text"]), "documents are texts"),
    }
    integers = frozenset({"top_n"})
    body = object_of(
        "query documents",
        model=MODEL,
        query=TEXT,
        documents=_TEXTS,
        top_n={"type": "integer", "minimum": 0},
        return_documents=BOOL,
        use_activation=BOOL,
    )

    def asked(self, body: Mapping[str, Any]) -> Comparison:
        query = body.get("query")
        if not isinstance(query, str):
            raise BadRequest("`query` must be a text.", param="query")
        documents = _documents(body.get("documents"))
        if not isinstance(body.get("return_documents", True), bool):
            raise BadRequest("`return_documents` must be true or false.", param="return_documents")
        if body.get("top_n", 0) < 0:
            raise BadRequest("`top_n` must be at least 0, for all of them.", param="top_n")
        names = ["query", *_places(body["documents"], "documents")]
        return Comparison([query, *documents], names, [(0, place) for place in range(1, len(documents) + 1)])

    def told(
        self,
        id_: str,
        body: Mapping[str, Any],
        asked: Comparison,
        scores: Sequence[float],
        of: Mapping[str, Any],
    ) -> dict[str, Any]:
        results: list[dict[str, Any]] = []
        with_texts = body.get("return_documents", True)
        for index, score in enumerate(scores):
            shown = {"document": {"text": asked.texts[index + 1]}} if with_texts else {}
            results.append({"index": index, **shown, "relevance_score": score})
        results.sort(key=lambda result: -result["relevance_score"])
        most = body.get("top_n") or len(results)
        return {
            "id": f"rerank-{id_}",
            "model": of["model"],
            "usage": _usage(of),
            "results": results[:most],
        }


class Score(Scoring):
    name = "score"
    place = 8
    path = "/v1/score"
    operation = "score"
    example: ClassVar[Mapping[str, Any]] = {
        "model": "support",
        "text_1": "capital of France",
        "text_2": ["Paris", "Rome"],
    }
    prompt_fields = ("input",)  # the field of ``Scoring.asked`` takes its place
    numbers_field = "score"
    summary = "How near texts are to each other, where the base model makes embeddings or scores pairs"
    answer = Scores
    accepted = _SHARED | {"text_1", "text_2", "queries", "documents"}
    body = object_of(
        model=MODEL, text_1=_TEXTS, text_2=_TEXTS, queries=_TEXTS, documents=_TEXTS, use_activation=BOOL
    ) | {"oneOf": [{"required": ["text_1", "text_2"]}, {"required": ["queries", "documents"]}]}

    def asked(self, body: Mapping[str, Any]) -> Comparison:
        first, second = ("queries", "documents") if "queries" in body else ("text_1", "text_2")
        for name in ("queries", "documents", "text_1", "text_2"):
            if name in body and name not in (first, second):
                raise BadRequest(f"Send `{first}` and `{second}` and no others.", param=name)
        left, right = _texts(body.get(first), first), _texts(body.get(second), second)
        if len(left) not in (1, len(right)):
            raise BadRequest(f"`{first}` must be one text, or as many as `{second}`.", param=first)
        places = [0] * len(right) if len(left) == 1 else range(len(left))
        pairs = [(one, len(left) + other) for other, one in enumerate(places)]
        names = [*_places(body[first], first), *_places(body[second], second)]
        return Comparison([*left, *right], names, pairs)

    def told(
        self,
        id_: str,
        body: Mapping[str, Any],
        asked: Comparison,
        scores: Sequence[float],
        of: Mapping[str, Any],
    ) -> dict[str, Any]:
        return {
            "id": f"score-{id_}",
            "object": "list",
            "created": int(time.time()),
            "model": of["model"],
            "data": [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)],
            "usage": _usage(of),
        }

    # What the engine is asked in for both calls, where the base has a head: see ``pairs_body``.

    def request_model(self, body: dict[str, Any]) -> str:
        return "vllm.entrypoints.pooling.scoring.protocol:ScoreQueriesDocumentsRequest"

    async def call(self, serving: Any, request: Any) -> Any:
        if serving.serving_scores is None:
            raise BadRequest(
                "vLLM cannot put two texts together with this base model's tokenizer; call /v1/classify with"
                " the token ids of both.",
                code="not_supported_by_base",
            )
        return await numbers_of(serving.serving_scores(request))

    def document(self, call: Call, result: Any) -> dict[str, Any]:
        """Plain data. Unavailable if it was aborted."""
        if call.aborted:
            raise Unavailable("The server is shutting down.", code="shutting_down", retry_after=5)
        shown: dict[str, Any] = result
        return shown


PAIRS = Score()


def embeddings_body(fields: Mapping[str, Any], asked: Comparison) -> dict[str, Any]:
    """The body of the request for embeddings of what is compared.

    Raises BadRequest where ``fields`` of the request say what only a head can do."""
    if "use_activation" in fields:
        raise BadRequest(
            "`use_activation` says how a head's number is given; the base model that is served here compares"
            " embeddings. Leave it out.",
            param="use_activation",
            code="unsupported_parameter",
        )
    kept = {name: fields[name] for name in _PROMPT if name in fields}
    return {**kept, "input": asked.texts, "encoding_format": "base64"}


def pairs_body(fields: Mapping[str, Any], asked: Comparison) -> dict[str, Any]:
    """The body of the request for a head's scores of what is compared, in ``PAIRS``.

    One query for all documents is there once, however many they are."""
    kept = {name: fields[name] for name in _SHARED if name in fields}
    firsts = {first for first, _ in asked.pairs}
    queries = [asked.texts[first] for first, _ in asked.pairs]
    documents = [asked.texts[second] for _, second in asked.pairs]
    return {**kept, "queries": queries[0] if len(firsts) == 1 else queries, "documents": documents}


def pairs_of(queries: str | list[str], documents: list[str]) -> list[tuple[str, str]]:
    """Of a body that ``pairs_body`` made, or vLLM's request of it."""
    firsts = [queries] * len(documents) if isinstance(queries, str) else queries
    return list(zip(firsts, documents, strict=True))


def check_labels(name: str, labels: int) -> None:
    """BadRequest (``not_supported_by_base``) where what answers as ``name`` has not one number for a pair."""
    if labels != 1:
        raise BadRequest(
            f"A score is one number, and the head of {name} has {labels}; call /v1/classify with both texts"
            " in one input, or train an adapter with one label.",
            param="model",
            code="not_supported_by_base",
        )


def _texts(given: Any, name: str) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    wrong = not isinstance(texts, list) or not all(isinstance(text, str) for text in texts)
    if wrong or not 1 <= len(texts) <= MAX_TEXTS:
        raise BadRequest(f"`{name}` must be a text, or a list of 1 to {MAX_TEXTS} texts.", param=name)
    return list(texts)


def _places(given: Any, name: str) -> list[str]:
    """What the texts of a field are called in an error."""
    return [f"{name}.{place}" for place in range(len(given))] if isinstance(given, list) else [name]


def _documents(given: Any) -> list[str]:
    """Texts; or objects with a ``text``, as Cohere's clients send them."""
    if isinstance(given, list):
        given = [one["text"] if isinstance(one, dict) and one.keys() == {"text"} else one for one in given]
    return _texts(given, "documents")


def _usage(of: Mapping[str, Any]) -> dict[str, int]:
    return {name: of["usage"][name] for name in ("prompt_tokens", "total_tokens")}


def scores_of(asked: Comparison, answered: Mapping[str, Any]) -> list[float]:
    """The score of each pair, from the engine's embeddings or its head's scores."""
    data: Sequence[Mapping[str, Any]] = answered["data"]
    if "score" in data[0]:
        return [one["score"] for one in data]
    return _cosines(asked, data)


def _cosines(asked: Comparison, data: Sequence[Mapping[str, Any]]) -> list[float]:
    import numpy as np

    vectors = np.stack([np.frombuffer(base64.b64decode(one["embedding"]), dtype="<f4") for one in data])
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    left, right = zip(*asked.pairs, strict=True)
    cosines = np.einsum("ij,ij->i", vectors[list(left)], vectors[list(right)])
    return [float(cosine) for cosine in cosines]
