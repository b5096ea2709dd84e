"""OpenAI's ``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from server.inference.dialects.answers import ChatCompletion
from server.inference.dialects.base import OPENAI_SAMPLING, OPENAI_SERVICE, OpenAIText
from server.inference.dialects.fields import (
    BEAMS,
    GUIDED,
    MODERATION,
    VLLM_ADVICE,
    VLLM_CHAT,
    VLLM_SAMPLING,
    Only,
)
from server.inference.dialects.schema import ANY, BOOL, LIMIT, OPENAI, QUESTION, TURNS, object_of
from server.inference.dialects.tools import (
    check_own_choice,
    check_own_tools,
    with_allowed_tools,
    with_strict_tools,
)

# How other servers of models name the switch.
_THINKING = 'Send chat_template_kwargs, as in {"enable_thinking": false}; the model\'s template reads it.'


class Chat(OpenAIText):
    name = "chat"
    place = 1
    path = "/v1/chat/completions"
    operation = "chat_completions"
    span = "chat"
    example: ClassVar[Mapping[str, Any]] = {"model": "support", "messages": [QUESTION], "max_tokens": 64}
    prompt_fields = ("messages",)
    replayed_fields = (
        "messages", "tools", "add_generation_prompt", "chat_template_kwargs", "continue_final_message",
        "add_special_tokens",
    )  # fmt: skip
    summary = "Chat, answered by the customer's adapter"
    answer = ChatCompletion
    accepted = (
        OPENAI_SAMPLING
        | VLLM_SAMPLING
        | VLLM_CHAT
        | GUIDED.keys()
        | {
            "messages", "max_completion_tokens", "parallel_tool_calls", "reasoning_effort", "response_format",
            "tool_choice", "tools", "top_logprobs",
        }
    )  # fmt: skip
    # The last two change nothing that an answer says: how fast it comes, and how long it should be.
    ignored = OPENAI_SERVICE | VLLM_ADVICE | {"prediction", "verbosity"}
    only: ClassVar[Mapping[str, Only]] = {
        **BEAMS,
        "audio": ((), "Answers are text."),
        "best_of": ((1,), "All n answers are returned; send n."),
        "enable_thinking": ((), _THINKING),
        "extra_body": (({},), "It is an argument of SDKs; in a body its members stand beside messages."),
        "function_call": (("none", "auto"), "Send tools and tool_choice, which took its place."),
        "functions": (([],), "Send tools, which took its place."),
        "modalities": ((["text"], []), "Answers are text."),
        "moderation": MODERATION,
        "reasoning": ((), "Send reasoning_effort."),
        "thinking": ((), _THINKING),
        "web_search_options": ((), "Nothing is searched here; offer a tool of the type function."),
    }
    booleans = frozenset({"logprobs"})
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

    def allowed_fields(self, body: dict[str, Any]) -> dict[str, Any]:
        """A message is gone on with where that was asked for: vLLM would begin another one by default.

        Tools that must be called are called with arguments that fit; see ``with_strict_tools``.
        """
        kept = super().allowed_fields(body)
        check_own_tools(kept.get("tools"), ("function",))
        check_own_choice(kept.get("tool_choice"))
        kept = with_allowed_tools(kept, nested=True)
        if kept.get("continue_final_message"):
            kept.setdefault("add_generation_prompt", False)
        if "tools" in kept:
            forced = kept.get("tool_choice") not in (None, "none", "auto")
            kept["tools"] = with_strict_tools(kept["tools"], forced)
        return kept

    def add_system(self, body: dict[str, Any], text: str) -> None:
        turns = body.get("messages")
        if isinstance(turns, list):
            roles = {str(turn.get("role")) for turn in turns if isinstance(turn, dict)}
            if not {"system", "developer"} & roles:
                body["messages"] = [{"role": "system", "content": text}, *turns]

    def request_model(self, body: dict[str, Any]) -> str:
        return "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest"

    def sizes(self, body: dict[str, Any], request: Any) -> tuple[int, int | None]:
        """From the body: reading chat's deprecated ``max_tokens`` from the request warns every time."""
        return request.n or 1, body.get("max_completion_tokens") or body.get("max_tokens")

    async def call(self, serving: Any, request: Any) -> Any:
        return await serving.openai_serving_chat.create_chat_completion(request)
