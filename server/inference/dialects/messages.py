"""Anthropic's ``/v1/messages``, and the shape of Anthropic's errors."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any, ClassVar

from adapters.errors import AdapterError
from server.engine import MAX_STOPS
from server.engine.calls import Call
from server.engine.errors import FAILED, TOO_LONG
from server.errors import Internal, ServerError, body_of, status_of
from server.inference.dialects.answers import Message
from server.inference.dialects.base import Dialect
from server.inference.dialects.fields import Only
from server.inference.dialects.schema import ANY, LIMIT, MODEL, QUESTION, SAMPLED, TEXT, TURNS, object_of
from server.inference.dialects.tools import check_own_tools, with_strict_tools
from server.inference.dialects.turns import check_blocks

PROMPT_FIELDS = frozenset(
    {
        "model", "chat_template_kwargs", "messages", "output_config", "system", "thinking", "tool_choice",
        "tools",
    }
)  # fmt: skip
# Anthropic's service, its prices, and what it does where an answer was refused. Of a context nothing is
# dropped here, which is the most that its management could keep.
SERVICE_FIELDS = frozenset(
    {
        "betas", "billing_policy", "cache_control", "context_management", "diagnostics",
        "fallback_credit_token", "fallbacks", "inference_geo", "metadata", "service_tier", "speed",
        "user_profile_id", "workspace_id",
    }
)  # fmt: skip
NOT_SERVED: Mapping[str, Only] = {
    "compaction": ((), "Nothing is summarized; ask the model for a summary."),
    "container": ((), "There are no containers; offer a tool of your own."),
    "mcp_servers": (([],), "No tool runs here; connect to the server yourself, and offer its tools."),
    "output_format": ((), "Send output_config.format, which took its place."),
    "thread": ((), "Nothing is kept of a conversation; send its messages."),
}
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
    place = 4
    path = "/v1/messages"
    operation = "messages"
    span = "chat"
    example: ClassVar[Mapping[str, Any]] = {"model": "support", "messages": [QUESTION], "max_tokens": 64}
    prompt_fields = ("messages", "system")
    batched = False  # Anthropic's batches are another API
    summary = "Anthropic's messages"
    answer = Message
    accepted = PROMPT_FIELDS | {"max_tokens", "stop_sequences", "stream", "temperature", "top_k", "top_p"}
    ignored = SERVICE_FIELDS
    only = NOT_SERVED
    max_tokens_fields = ("max_tokens",)
    body = object_of(
        "messages max_tokens",
        **PROMPT_BODY,
        **SAMPLED,
        max_tokens=LIMIT,
        stop_sequences={"type": "array", "items": TEXT, "maxItems": MAX_STOPS},
        top_k={"type": "integer", "minimum": 0},
    )

    def allowed_fields(self, body: dict[str, Any]) -> dict[str, Any]:
        """Tools that must be called are called with arguments that fit; see ``with_strict_tools``."""
        kept = super().allowed_fields(body)
        check_own_tools(kept.get("tools"), ("custom",))
        check_blocks(kept.get("messages"))
        choice = kept.get("tool_choice")
        if "tools" in kept:
            forced = isinstance(choice, dict) and choice.get("type") in ("any", "tool")
            kept["tools"] = with_strict_tools(kept["tools"], forced)
        return kept

    def add_system(self, body: dict[str, Any], text: str) -> None:
        if body.get("system") is None:
            body["system"] = text

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
    message = _too_long(error["message"]) if error["code"] == TOO_LONG else error["message"]
    return {"type": "error", "error": {"type": type_, "message": message, "code": error["code"]}}


def _too_long(message: str) -> str:
    """As Anthropic says it, which agents look for to make the conversation shorter."""
    most = re.search(r"context length is ([0-9]+)", message)
    answer = re.search(r"an answer of ([0-9]+) tokens", message)
    if answer and most:
        limit = "which is the maximum number of tokens of a prompt and its answer"
        return f"max_tokens: {answer[1]} > {most[1]}, {limit}"
    given = re.search(r"([0-9]+) input tokens|has ([0-9]+) tokens", message)
    if most is None:
        return f"prompt is too long: {message}"
    tokens = next((found for found in given.groups() if found), None) if given else None
    shown = tokens or f"more than {most[1]}"
    return f"prompt is too long: {shown} tokens > {most[1]} maximum"
