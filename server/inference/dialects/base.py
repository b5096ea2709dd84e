"""What one API surface is: a ``Dialect``, one file each, all of them listed in ``registry``.

A dialect names every field that it accepts, and refuses all others by name; ``fields`` says why.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, ClassVar, Literal

from adapters.errors import AdapterError
from adapters.model import DEFAULT_MODEL
from server.engine.calls import Call, Kind
from server.errors import BadRequest, ServerError, body_of
from server.inference.bounds import check_sizes
from server.inference.dialects.answers import Answer
from server.inference.dialects.fields import (
    BEAMS,
    RESERVED,
    VLLM_ADVICE,
    Only,
    check_only,
    check_template_variables,
    check_type,
    reserved_field,
    unknown_field,
    with_structured_outputs,
)
from server.inference.dialects.nested import check_nested
from server.inference.dialects.schema import Schema

# What says something about OpenAI's own service and not about the answer, or is an advice that costs nothing.
OPENAI_SERVICE = frozenset(
    {
        "metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
        "service_tier", "store",
    }
)  # fmt: skip
# Sampling, which chat and completions share.
OPENAI_SAMPLING = frozenset(
    {
        "model", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n", "presence_penalty", "seed",
        "stop", "stream", "stream_options", "temperature", "top_p", "user",
    }
)  # fmt: skip
RESPONSE_FORMATS = frozenset({"text", "json_object", "json_schema"})
# vLLM's own fields of an answer, which are null unless one of its extras was asked for.
_VLLM_FIELDS = (
    "kv_transfer_params", "ec_transfer_params", "prompt_token_ids", "prompt_logprobs", "prompt_text",
    "metrics", "input_messages", "output_messages",
)  # fmt: skip


class Dialect:
    """One API surface: what it accepts, how vLLM is asked, and how its answers and errors look.

    ``base`` is the kind of base model that can answer. ``request_model`` and ``call`` name things of vLLM by
    the names that vLLM gives them; the engine resolves them, since it alone imports vLLM.
    """

    name: ClassVar[Kind]
    path: ClassVar[str]
    place: ClassVar[int] = 50
    """Where the OpenAPI document has it among the others."""
    operation: ClassVar[str]
    """The operation's name in the OpenAPI document."""
    summary: ClassVar[str]
    span: ClassVar[str | None] = None
    """The operation's name in traces, where OpenTelemetry's conventions have one; None for ``operation``."""
    example: ClassVar[Mapping[str, Any]] = {}
    """A body that can be sent, for the OpenAPI document."""
    body: ClassVar[Schema]
    """The OpenAPI schema of the fields that matter; the vendors say what all of them mean."""
    answer: ClassVar[type[Answer]]
    """The fields of an answer that clients rely on."""
    accepted: ClassVar[frozenset[str]]
    ignored: ClassVar[frozenset[str]] = frozenset()
    only: ClassVar[Mapping[str, Only]] = {}
    """Fields that are served with the values alone that ask for nothing."""
    stream_options: ClassVar[frozenset[str]] = frozenset()
    max_tokens_fields: ClassVar[tuple[str, ...]] = ()
    """Where a request says how many tokens it wants, in the order in which these are looked at."""
    default_max_tokens: ClassVar[int | None] = None
    """Tokens of an answer that asks for no number; None for as many as fit."""
    least_tokens: ClassVar[int] = 1
    """The fewest tokens that a request may ask for."""
    prompt_fields: ClassVar[tuple[str, ...]] = ()
    """Where a request has its prompt. The first is named in an error about the prompt."""
    numbers_field: ClassVar[str] = ""
    """Of a dialect that pools: the member of each input's answer that has its numbers."""
    replayed_fields: ClassVar[tuple[str, ...]] = ()
    """What makes up the prompt of a request whose answer a rollout can replay token by token; empty where it
    cannot.
    """
    first_request: ClassVar[Mapping[str, Any] | None] = None
    """What an engine with such a base is asked before it is ready; None for all but one dialect of a base."""
    counts: ClassVar[bool] = False
    """Whether the tokenizer answers it alone, without a lease."""
    batched: ClassVar[bool] = True
    """Whether OpenAI's batches may ask it, where it runs in the engine."""
    base: ClassVar[Literal["text", "embeddings", "labels", "scores", "any"]] = "text"
    """What a base must make to answer; scores come of embeddings and of labels."""
    streams: ClassVar[bool] = True
    asks_while_streaming: ClassVar[bool] = False
    """Whether vLLM may ask the engine for more while a stream runs."""
    resumes_elsewhere: ClassVar[bool] = True
    """Whether a stream that another engine goes on with looks as if one had made it."""
    integers: ClassVar[frozenset[str]] = frozenset()
    """Fields that are integers in this dialect, and something else in another."""
    booleans: ClassVar[frozenset[str]] = frozenset()
    """Fields that are booleans in this dialect, and something else in another."""

    @property
    def pools(self) -> bool:
        """Whether it is answered with numbers for each input, a few inputs at a time."""
        return self.base in ("embeddings", "labels", "scores")

    @property
    def prompt_field(self) -> str | None:
        """The field that an error about the prompt names."""
        return self.prompt_fields[0] if self.prompt_fields else None

    def allowed_fields(self, body: dict[str, Any]) -> dict[str, Any]:
        """``body`` without what this dialect ignores, and without nulls.

        Raises BadRequest naming the first field that the dialect does not know or does not serve, that has
        too many items, or whose number is none.
        """
        for name, value in body.items():
            self._check_known(name, value)
        check_sizes(body)
        kept = {name: value for name, value in body.items() if name in self.accepted and value is not None}
        for name, value in kept.items():
            check_type(name, value, integer=name in self.integers, boolean=name in self.booleans)
            check_nested(name, value)
        self._check_amounts(kept)
        kept = with_structured_outputs(kept)
        if "chat_template_kwargs" in kept:
            check_template_variables(kept["chat_template_kwargs"])
        options = kept.get("stream_options")
        if isinstance(options, dict):
            for name in options:
                if name not in self.stream_options:
                    raise unknown_field(f"stream_options.{name}")
            kept["stream_options"] = {k: v for k, v in options.items() if k != "include_obfuscation"}
        return kept | {"model": body.get("model") or DEFAULT_MODEL}

    def _check_amounts(self, body: dict[str, Any]) -> None:
        """BadRequest for a conversation without a turn, and for an answer of no tokens."""
        for name in ("messages", "input", "prompt"):
            if body.get(name) == []:
                raise BadRequest(f"{name}: at least one is needed", param=name)
        for name in self.max_tokens_fields:
            if body.get(name, self.least_tokens) < self.least_tokens:
                least = self.least_tokens
                raise BadRequest(f"{name} must be at least {least}, got {body[name]}", param=name)

    def _check_known(self, name: str, value: Any) -> None:
        if name in self.accepted or name in self.ignored:
            return
        if name in self.only:
            if value is not None:
                check_only(name, value, self.only[name])
        elif name not in RESERVED:
            raise unknown_field(name)
        elif value is not None:
            raise reserved_field(name)

    def request_model(self, body: dict[str, Any]) -> str:
        """Where vLLM's request model for ``body`` is: ``module:class``."""
        raise NotImplementedError

    def prompt_text(self, body: Mapping[str, Any]) -> str:
        """Text of about the prompt's length; good enough for an estimate, and cheap."""
        return "".join(str(body[name]) for name in self.prompt_fields if body.get(name))

    def add_system(self, body: dict[str, Any], text: str) -> None:
        """Put ``text`` into ``body`` as a system prompt, unless it has one; nothing where there is none."""

    def sizes(self, body: dict[str, Any], request: Any) -> tuple[int, int | None]:
        """(sequences, output tokens that each asks for or None) of ``request``, parsed from ``body``."""
        return 1, getattr(request, self.max_tokens_fields[0]) if self.max_tokens_fields else 0

    def request_id(self, call: Call) -> str | None:
        """The id that vLLM's request gets; None where the request has no place for one."""
        return call.id

    async def call(self, serving: Any, request: Any) -> Any:
        """What vLLM answers to ``request``; ``serving`` holds its serving objects, by its own names."""
        raise NotImplementedError

    def document(self, call: Call, result: Any) -> dict[str, Any]:
        """vLLM's response object as the JSON that a customer gets."""
        return without_extras(result.model_dump())

    def events(self, call: Call, result: AsyncIterator[Any]) -> AsyncIterator[str]:
        """vLLM's stream as the server-sent events that a customer gets."""
        return result

    def error_event(self, error: ServerError | AdapterError, number: int) -> str:
        """What ends a stream that breaks with ``error``, after ``number`` events."""
        return f"data: {json.dumps(body_of(error))}\n\ndata: [DONE]\n\n"


class OpenAIText(Dialect):
    """What OpenAI's chat and completions have in common."""

    ignored = OPENAI_SERVICE | VLLM_ADVICE
    only = BEAMS
    stream_options = frozenset({"include_usage", "include_obfuscation"})

    def allowed_fields(self, body: dict[str, Any]) -> dict[str, Any]:
        kept = super().allowed_fields(body)
        wanted = kept.get("response_format")
        if isinstance(wanted, dict) and str(wanted.get("type")) not in RESPONSE_FORMATS:
            formats = ", ".join(sorted(RESPONSE_FORMATS))
            raise BadRequest(f"response_format.type must be one of {formats}", param="response_format")
        if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
            given = wanted.get("json_schema")
            if given is None or (isinstance(given, dict) and given.get("schema") is None):
                where = "response_format.json_schema.schema"
                raise BadRequest(f"{where} is needed; json_object asks for any object", param=where)
        return kept


def without_extras(body: dict[str, Any]) -> dict[str, Any]:
    """``body`` without those of vLLM's own fields that are null."""
    for name in _VLLM_FIELDS:
        if body.get(name) is None:
            body.pop(name, None)
    return body
