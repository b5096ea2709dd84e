"""OpenAI's ``/v1/chat/completions``."""

from __future__ import annotations

from typing import Any

from server.inference.dialects.answers import ChatCompletion
from server.inference.dialects.base import OPENAI_SAMPLING, OpenAIText
from server.inference.dialects.schema import ANY, BOOL, LIMIT, OPENAI, TURNS, object_of


class Chat(OpenAIText):
    name = "chat"
    path = "/v1/chat/completions"
    operation = "chat_completions"
    summary = "Chat, answered by the customer's adapter"
    answer = ChatCompletion
    accepted = OPENAI_SAMPLING | {
        "messages", "max_completion_tokens", "parallel_tool_calls", "reasoning_effort", "response_format",
        "tool_choice", "tools", "top_logprobs",
    }  # fmt: skip
    max_tokens_fields = ("max_completion_tokens", "max_tokens")
    body = object_of(
        "messages",
        **OPENAI,
        messages=TURNS,
        max_completion_tokens=LIMIT,
        logprobs=BOOL,
        top_logprobs={"type": "integer", "minimum": 0},
        tools={"type": "array", "items": ANY},
        response_format=object_of("type", type={"enum": ["text", "json_object", "json_schema"]}),
    )

    def request_model(self, body: dict[str, Any]) -> str:
        return "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest"

    def sizes(self, body: dict[str, Any], request: Any) -> tuple[int, int | None]:
        """From the body: reading chat's deprecated ``max_tokens`` from the request warns every time."""
        return request.n or 1, body.get("max_completion_tokens") or body.get("max_tokens")

    async def call(self, serving: Any, request: Any) -> Any:
        return await serving.openai_serving_chat.create_chat_completion(request)
