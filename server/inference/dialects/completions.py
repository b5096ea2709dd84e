"""OpenAI's ``/v1/completions``."""

from __future__ import annotations

from typing import Any

from server.inference.dialects.answers import Completion
from server.inference.dialects.base import INTEGERS, OPENAI_SAMPLING, OpenAIText
from server.inference.dialects.schema import BOOL, OPENAI, TEXT, TOKENS, object_of


class Completions(OpenAIText):
    name = "completion"
    path = "/v1/completions"
    operation = "completions"
    summary = "Text completion, by the customer's adapter"
    answer = Completion
    accepted = OPENAI_SAMPLING | {"prompt", "echo", "suffix"}
    integers = INTEGERS | {"logprobs"}
    max_tokens_fields = ("max_tokens",)
    default_max_tokens = 16  # OpenAI's rule, and vLLM's
    body = object_of(
        "prompt",
        **OPENAI,
        prompt={"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1}, TOKENS]},
        logprobs={"type": "integer", "minimum": 0},
        echo=BOOL,
    )

    def request_model(self, body: dict[str, Any]) -> str:
        return "vllm.entrypoints.openai.completion.protocol:CompletionRequest"

    def sizes(self, body: dict[str, Any], request: Any) -> tuple[int, int | None]:
        prompts = 1
        if isinstance(request.prompt, list) and request.prompt:
            nested = not isinstance(request.prompt[0], int)
            prompts = len(request.prompt) if nested else 1
        return (request.n or 1) * prompts, request.max_tokens

    async def call(self, serving: Any, request: Any) -> Any:
        return await serving.openai_serving_completion.create_completion(request)
