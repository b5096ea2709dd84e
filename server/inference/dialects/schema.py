"""Pieces of JSON Schema that the dialects' bodies are described with in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from server.engine import MAX_STOPS

Schema = dict[str, Any]


def object_of(required: str = "", /, **properties: Schema) -> Schema:
    """An object with ``properties``; ``required`` names those that must be there, separated by spaces."""
    return {"type": "object", "required": required.split(), "properties": properties}


TEXT: Schema = {"type": "string"}
BOOL: Schema = {"type": "boolean"}
NUMBER: Schema = {"type": "number"}
ANY: Schema = {"type": "object"}
MODEL = TEXT | {"description": "An adapter's name, `name@3`, the base model's name, or `default`."}
TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}}
QUESTION = {"role": "user", "content": "What is the capital of France?"}  # of examples
TURNS = {
    "type": "array",
    "minItems": 1,
    "items": object_of("role content", role={"enum": ["system", "user", "assistant"]}, content=TEXT),
}
SAMPLED = {
    "temperature": NUMBER | {"minimum": 0, "maximum": 2},
    "top_p": NUMBER | {"exclusiveMinimum": 0, "maximum": 1},
    "stream": BOOL,
}
LIMIT = {"type": "integer", "minimum": 1, "maximum": 2**31 - 1}
OPENAI = {
    "model": MODEL,
    **SAMPLED,
    "max_tokens": LIMIT,
    "n": {"type": "integer", "minimum": 1},
    "stop": {"anyOf": [TEXT, {"type": "array", "items": TEXT, "maxItems": MAX_STOPS}]},
    "seed": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "presence_penalty": NUMBER | {"minimum": -2, "maximum": 2},
    "frequency_penalty": NUMBER | {"minimum": -2, "maximum": 2},
    "logit_bias": {"type": "object", "additionalProperties": NUMBER | {"minimum": -100, "maximum": 100}},
    "stream_options": object_of(include_usage=BOOL),
    "user": TEXT,
}
