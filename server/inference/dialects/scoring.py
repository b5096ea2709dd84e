"""``/v1/rerank``, as Cohere, Jina and vLLM have it, and vLLM's ``/v1/score``, where a base makes embeddings.

A score is the cosine of two texts' embeddings, which is what vLLM calls a bi-encoder's. The embeddings are
asked for as those of ``/v1/embeddings``, a few at a time under one lease: vLLM's own classes would send a
thousand documents into the engine at once, past everybody who waits. Bases with a scoring head of their own
(cross-encoders) are not served.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from server.errors import BadRequest
from server.inference.dialects.answers import Reranked, Scores
from server.inference.dialects.base import Dialect
from server.inference.dialects.embeddings import Embeddings
from server.inference.dialects.fields import Only
from server.inference.dialects.schema import BOOL, MODEL, TEXT, Schema, object_of

EMBEDDINGS = Embeddings()
MAX_TEXTS = 1024
_TEXTS: Schema = {"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1, "maxItems": MAX_TEXTS}]}
_SHARED = frozenset({"model", "truncate_prompt_tokens", "truncation_side", "user"})


@dataclass(frozen=True, slots=True)
class Asked:
    """What is compared: each pair is of two places in ``texts``. ``names`` says which fields have them."""

    texts: list[str]
    names: list[str]
    pairs: list[tuple[int, int]]

    @property
    def longest(self) -> str:
        """Where the longest text is, which is too long if any is."""
        return max(zip(self.texts, self.names, strict=True), key=lambda text: len(text[0]))[1]


class Scoring(Dialect):
    """Answered from the embeddings of its texts: ``embeddings_body`` is asked for, and ``told`` of them."""

    base = "embeddings"
    streams = False

    def asked(self, body: Mapping[str, Any]) -> Asked:
        """Raises BadRequest."""
        raise NotImplementedError

    def embeddings_body(self, fields: Mapping[str, Any], asked: Asked) -> dict[str, Any]:
        """The body of the request for embeddings."""
        kept = {name: fields[name] for name in _SHARED if name in fields}
        return {**kept, "input": asked.texts, "encoding_format": "base64"}

    def told(
        self, id_: str, body: Mapping[str, Any], asked: Asked, embeddings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The answer, from that of the embeddings."""
        raise NotImplementedError


class Rerank(Scoring):
    name = "rerank"
    path = "/v1/rerank"
    operation = "rerank"
    summary = "Documents by how near they are to a query, where the base model makes embeddings"
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
    )

    def asked(self, body: Mapping[str, Any]) -> Asked:
        query = body.get("query")
        if not isinstance(query, str):
            raise BadRequest("`query` must be a text.", param="query")
        documents = _documents(body.get("documents"))
        if not isinstance(body.get("return_documents", True), bool):
            raise BadRequest("`return_documents` must be true or false.", param="return_documents")
        if body.get("top_n", 0) < 0:
            raise BadRequest("`top_n` must be at least 0, for all of them.", param="top_n")
        names = ["query", *_places(body["documents"], "documents")]
        return Asked([query, *documents], names, [(0, place) for place in range(1, len(documents) + 1)])

    def told(
        self, id_: str, body: Mapping[str, Any], asked: Asked, embeddings: Mapping[str, Any]
    ) -> dict[str, Any]:
        results: list[dict[str, Any]] = []
        with_texts = body.get("return_documents", True)
        for index, score in enumerate(_scores(asked, embeddings)):
            shown = {"document": {"text": asked.texts[index + 1]}} if with_texts else {}
            results.append({"index": index, **shown, "relevance_score": score})
        results.sort(key=lambda result: -result["relevance_score"])
        most = body.get("top_n") or len(results)
        usage = embeddings["usage"]
        return {
            "id": f"rerank-{id_}",
            "model": embeddings["model"],
            "usage": {name: usage[name] for name in ("prompt_tokens", "total_tokens")},
            "results": results[:most],
        }


class Score(Scoring):
    name = "score"
    path = "/v1/score"
    operation = "score"
    summary = "How near texts are to each other, where the base model makes embeddings"
    answer = Scores
    accepted = _SHARED | {"text_1", "text_2", "queries", "documents"}
    body = object_of(model=MODEL, text_1=_TEXTS, text_2=_TEXTS, queries=_TEXTS, documents=_TEXTS) | {
        "oneOf": [{"required": ["text_1", "text_2"]}, {"required": ["queries", "documents"]}]
    }

    def asked(self, body: Mapping[str, Any]) -> Asked:
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
        return Asked([*left, *right], names, pairs)

    def told(
        self, id_: str, body: Mapping[str, Any], asked: Asked, embeddings: Mapping[str, Any]
    ) -> dict[str, Any]:
        usage = embeddings["usage"]
        scores = _scores(asked, embeddings)
        return {
            "id": f"score-{id_}",
            "object": "list",
            "created": int(time.time()),
            "model": embeddings["model"],
            "data": [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)],
            "usage": {name: usage[name] for name in ("prompt_tokens", "total_tokens")},
        }


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


def _scores(asked: Asked, embeddings: Mapping[str, Any]) -> list[float]:
    """The cosine of each pair."""
    import numpy as np

    raw: Sequence[Mapping[str, Any]] = embeddings["data"]
    vectors = np.stack([np.frombuffer(base64.b64decode(one["embedding"]), dtype="<f4") for one in raw])
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    left, right = zip(*asked.pairs, strict=True)
    cosines = np.einsum("ij,ij->i", vectors[list(left)], vectors[list(right)])
    return [float(cosine) for cosine in cosines]
