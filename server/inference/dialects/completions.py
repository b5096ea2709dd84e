"""OpenAI's ``/v1/completions``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from server.errors import BadRequest
from server.inference.dialects.answers import Completion
from server.inference.dialects.base import OPENAI_SAMPLING, OpenAIText
from server.inference.dialects.fields import BEAMS, GUIDED, VLLM_SAMPLING, check_only
from server.inference.dialects.schema import BOOL, OPENAI, TEXT, TOKENS, object_of


class Completions(OpenAIText):
    name = "completion"
    place = 2
    path = "/v1/completions"
    operation = "completions"
    span = "text_completion"
    example: ClassVar[Mapping[str, Any]] = {
        "model": "support",
        "prompt": "The capital of France is",
        "max_tokens": 16,
    }
    prompt_fields = ("prompt",)
    replayed_fields = ("prompt", "add_special_tokens")
    # What is compiled at a prompt, the token after it, the first one that is drawn, a log-probability.
    first_request: ClassVar[Mapping[str, Any]] = {
        "prompt": "Hello",
        "max_tokens": 2,
        "ignore_eos": True,
        "temperature": 1.0,
        "logprobs": 0,
    }
    summary = "Text completion, by the customer's adapter"
    answer = Completion
    accepted = (
        OPENAI_SAMPLING | VLLM_SAMPLING | GUIDED.keys() | {"echo", "prompt", "response_format", "suffix"}
    )
    only = BEAMS
    integers = frozenset({"logprobs"})
    max_tokens_fields = ("max_tokens",)
    least_tokens = 0  # with echo, for the prompt alone
    default_max_tokens = 16  # OpenAI's rule, and vLLM's
    body = object_of(
        "prompt",
        **OPENAI,
        prompt={"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1}, TOKENS]},
        logprobs={"type": "integer", "minimum": 0},
        echo=BOOL,
    )

    def allowed_fields(self, body: dict[str, Any]) -> dict[str, Any]:
        """``best_of`` is served where it asks for all that are returned, as it does by default.

        An empty ``suffix`` asks for nothing.
        """
        if body.get("prompt") in (None, ""):
            raise BadRequest("prompt: a text or token ids are needed", param="prompt")
        best_of, n = body.get("best_of"), body.get("n")
        if best_of is not None:
            check_only("best_of", best_of, ((1 if n is None else n,), "All n answers are returned; send n."))
        nothing = {"best_of"} | ({"suffix"} if body.get("suffix") == "" else set())
        return super().allowed_fields({k: v for k, v in body.items() if k not in nothing})

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
