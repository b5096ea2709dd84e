"""Anthropic's ``/v1/messages``, and the shape of Anthropic's errors."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from adapters.errors import AdapterError
from server.engine.calls import Call
from server.engine.errors import FAILED
from server.errors import Internal, ServerError, body_of, status_of
from server.inference.dialects.answers import Message
from server.inference.dialects.base import Dialect
from server.inference.dialects.schema import ANY, LIMIT, MODEL, SAMPLED, TEXT, TURNS, object_of

PROMPT_FIELDS = frozenset(
    {"model", "messages", "system", "tool_choice", "tools", "thinking", "output_config"}
)  # fmt: skip
SERVICE_FIELDS = frozenset({"metadata", "service_tier", "cache_control", "inference_geo"})
PROMPT_BODY = {"model": MODEL, "messages": TURNS, "system": TEXT, "tools": {"type": "array", "items": ANY}}
# https://docs.anthropic.com/en/api/errors; the statuses stay ours.
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


class Messages(Dialect):
    name = "messages"
    path = "/v1/messages"
    operation = "messages"
    summary = "Anthropic's messages"
    answer = Message
    accepted = PROMPT_FIELDS | {"max_tokens", "stop_sequences", "stream", "temperature", "top_k", "top_p"}
    ignored = SERVICE_FIELDS
    max_tokens_fields = ("max_tokens",)
    body = object_of(
        "messages max_tokens",
        **PROMPT_BODY,
        **SAMPLED,
        max_tokens=LIMIT,
        stop_sequences={"type": "array", "items": TEXT, "maxItems": 16},
        top_k={"type": "integer", "minimum": 0},
    )

    def request_model(self, body: dict[str, Any]) -> str:
        return "vllm.entrypoints.anthropic.protocol:AnthropicMessagesRequest"

    def request_id(self, call: Call) -> str | None:
        """The chat that vLLM makes of it gets the id; see ``server.engine.serving.chat_for_messages``."""
        return None

    async def call(self, serving: Any, request: Any) -> Any:
        return await serving.anthropic_serving_messages.create_messages(request)

    def document(self, call: Call, result: Any) -> dict[str, Any]:
        return {**result.model_dump(exclude_none=True), "id": f"msg_{call.id}"}

    async def events(self, call: Call, result: AsyncIterator[str]) -> AsyncIterator[str]:
        """vLLM's events under our id. Raises what the chat below them failed with.

        vLLM makes an event of Anthropic's own of an internal error, which says less.
        """
        async for event in result:
            if event.startswith("event: error"):
                raise call.failure or Internal(FAILED)
            if event.startswith("event: message_start"):
                event = event.replace(f'"chatcmpl-{call.id}"', f'"msg_{call.id}"', 1)
            yield event
        if call.failure is not None:
            raise call.failure

    def error_event(self, error: ServerError | AdapterError, number: int) -> str:
        body = anthropic_error(body_of(error), status_of(error)[0])
        return f"event: error\ndata: {json.dumps(body)}\n\n"


def speaks_anthropic(path: str) -> bool:
    """Whether the route with this template answers Anthropic's clients."""
    return path.startswith(Messages.path)


def anthropic_error(body: dict[str, Any], status: int) -> dict[str, Any]:
    """OpenAI's error ``body`` as Anthropic's; ``code`` is beside the type, as everywhere."""
    error = body["error"]
    type_ = _ERROR_TYPES.get(status, "invalid_request_error")
    return {"type": "error", "error": {"type": type_, "message": error["message"], "code": error["code"]}}
