"""OpenAI's ``/v1/embeddings``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from server.engine.calls import Call
from server.engine.serving import embeddings_of
from server.errors import Unavailable
from server.inference.dialects.answers import EmbeddingList
from server.inference.dialects.base import Dialect
from server.inference.dialects.schema import MODEL, TEXT, TOKENS, Schema, object_of

# OpenAI's.
MAX_INPUTS = 2048
INPUT: Schema = {
    "anyOf": [
        TEXT,
        {"type": "array", "items": TEXT, "minItems": 1, "maxItems": MAX_INPUTS},
        TOKENS,
        {"type": "array", "items": TOKENS, "minItems": 1, "maxItems": MAX_INPUTS},
    ]
}


class Embeddings(Dialect):
    name = "embedding"
    place = 5
    path = "/v1/embeddings"
    operation = "embeddings"
    example: ClassVar[Mapping[str, Any]] = {"model": "support", "input": ["first text", "second text"]}
    prompt_fields = ("input",)
    numbers_field = "embedding"
    first_request: ClassVar[Mapping[str, Any]] = {"input": "Hello"}
    summary = "OpenAI's embeddings, where the base model makes them"
    answer = EmbeddingList
    accepted = frozenset(
        {
            "model", "add_special_tokens", "dimensions", "encoding_format", "input", "truncate_prompt_tokens",
            "truncation_side", "user",
        }
    )  # fmt: skip
    base = "embeddings"
    streams = False
    body = object_of(
        "input",
        model=MODEL,
        input=INPUT,
        dimensions={"type": "integer", "minimum": 1},
        encoding_format={"enum": ["float", "base64"]},
        user=TEXT,
    )

    def request_model(self, body: dict[str, Any]) -> str:
        return "vllm.entrypoints.pooling.embed.protocol:EmbeddingCompletionRequest"

    async def call(self, serving: Any, request: Any) -> Any:
        return await serving.serving_embedding(request)

    def document(self, call: Call, result: Any) -> dict[str, Any]:
        """vLLM's answer, which is plain data. Unavailable if it was aborted: it is an empty vector then."""
        if call.aborted:
            raise Unavailable("The server is shutting down.", code="shutting_down", retry_after=5)
        return embeddings_of(result)
