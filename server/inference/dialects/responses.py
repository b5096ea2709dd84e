"""OpenAI's ``/v1/responses``, without what they keep between requests.

Nothing is kept of a response: there is no state that could cross from one customer to another.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, ClassVar

from adapters.errors import AdapterError
from server.engine.calls import Call
from server.errors import BadRequest, ServerError, body_of
from server.inference.dialects.answers import Response
from server.inference.dialects.base import OPENAI_SERVICE, Dialect, without_extras
from server.inference.dialects.fields import (
    GUIDED,
    MODERATION,
    VLLM_CHAT,
    VLLM_SAMPLING,
    Only,
    check_boolean,
)
from server.inference.dialects.schema import ANY, LIMIT, MODEL, SAMPLED, TEXT, TURNS, object_of
from server.inference.dialects.tools import (
    check_own_choice,
    check_own_tools,
    with_allowed_tools,
    with_strict_tools,
)
from server.inference.dialects.turns import whole_input

_OPENING = ("response.created", "response.in_progress")
_CHAT_ALONE: Only = ((), "vLLM has it for /v1/chat/completions.")
_STATEFUL = {
    "background_options": "Responses are answered at once; leave out background_options.",
    "background": "Responses are answered at once; leave out background and wait, or stream.",
    "conversation": "Conversations are not kept; send the earlier turns as input.",
    "previous_response_id": "Responses are not kept; send the earlier turns as input.",
    "prompt": "There are no prompt templates here; send instructions and input.",
    "store": "Responses are not kept; leave out store, or send false.",
}


class Responses(Dialect):
    name = "responses"
    place = 3
    path = "/v1/responses"
    resumes_elsewhere = False  # every item has an id that is made up at random
    operation = "responses"
    span = "chat"
    example: ClassVar[Mapping[str, Any]] = {
        "model": "support",
        "input": "What is the capital of France?",
        "store": False,
    }
    prompt_fields = ("input", "instructions")
    summary = "OpenAI's responses, without what they keep between requests"
    answer = Response
    accepted = frozenset(
        {
            "model", "include", "input", "instructions", "max_output_tokens", "max_tool_calls", "metadata",
            "parallel_tool_calls", "reasoning", "store", "stream", "stream_options", "temperature", "text",
            "tool_choice", "tools", "top_logprobs", "top_p", "truncation", "user",
            # vLLM's
            "chat_template_kwargs", "frequency_penalty", "ignore_eos", "include_reasoning",
            "include_stop_str_in_output", "logit_bias", "min_p", "presence_penalty", "repetition_penalty",
            "seed", "skip_special_tokens", "stop", "stop_token_ids", "structured_outputs", "top_k",
        }
    ) | GUIDED.keys()  # fmt: skip
    # Nothing of a context is dropped here, which is the most that its management could keep.
    ignored = (OPENAI_SERVICE - {"metadata", "store"}) | {"context_management"}
    only: ClassVar[Mapping[str, Only]] = {
        "access_programs": ((), "They belong to OpenAI's service."),
        "image": ((), "Answers are text."),
        "moderation": MODERATION,
        **dict.fromkeys((VLLM_SAMPLING | VLLM_CHAT) - accepted, _CHAT_ALONE),
    }
    stream_options = frozenset({"include_obfuscation"})
    max_tokens_fields = ("max_output_tokens",)
    asks_while_streaming = True
    body = object_of(
        "input",
        model=MODEL,
        **SAMPLED,
        input={"anyOf": [TEXT, TURNS]},
        instructions=TEXT,
        max_output_tokens=LIMIT,
        store={"const": False},
        text=ANY,
        tools={"type": "array", "items": ANY},
    )

    def allowed_fields(self, body: dict[str, Any]) -> dict[str, Any]:
        kept = super().allowed_fields(_stateless(body))
        check_own_tools(kept.get("tools"), ("function",))
        check_own_choice(kept.get("tool_choice"))
        kept = with_allowed_tools(kept, nested=False)
        if isinstance(kept.get("input"), list):
            kept["input"] = whole_input(kept["input"])
        if "tools" in kept:
            forced = kept.get("tool_choice") not in (None, "none", "auto")
            kept["tools"] = with_strict_tools(kept["tools"], forced)
        kept.pop("stream_options", None)
        return kept

    def add_system(self, body: dict[str, Any], text: str) -> None:
        if body.get("instructions") is None:
            body["instructions"] = text

    def request_model(self, body: dict[str, Any]) -> str:
        return "vllm.entrypoints.openai.responses.protocol:ResponsesRequest"

    def request_id(self, call: Call) -> str | None:
        return f"resp_{call.id}"

    async def call(self, serving: Any, request: Any) -> Any:
        return await serving.openai_serving_responses.create_responses(request)

    def document(self, call: Call, result: Any) -> dict[str, Any]:
        return _response(call, result.model_dump(mode="json", by_alias=True))

    async def events(self, call: Call, result: AsyncIterator[Any]) -> AsyncIterator[str]:
        """vLLM's events as text.

        vLLM opens the stream before the engine has looked at the request. The opening is held back until it
        has, so that what the engine refuses is refused before the first byte.
        """
        opening: list[str] = []
        async for event in result:
            shown = event.model_dump(mode="json", by_alias=True)
            if "response" in shown:
                shown["response"] = _response(call, shown["response"])
            chunk = f"event: {event.type}\ndata: {json.dumps(shown)}\n\n"
            if event.type in _OPENING:
                opening.append(chunk)
                continue
            for held in opening:
                yield held
            opening.clear()
            yield chunk

    def error_event(self, error: ServerError | AdapterError, number: int) -> str:
        body = body_of(error)["error"]
        told = {"type": "error", **{name: body[name] for name in ("code", "message", "param")}}
        return f"event: error\ndata: {json.dumps({**told, 'sequence_number': number})}\n\n"


def _stateless(body: dict[str, Any]) -> dict[str, Any]:
    """``body`` that asks for nothing to be kept. BadRequest (``stateless``) where it asks for it."""
    for name in ("background", "store"):
        if (given := body.get(name)) is not None and not given:
            check_boolean(name, given)
    for name, cure in _STATEFUL.items():
        if body.get(name):
            raise BadRequest(cure, code="stateless", param=name)
    return {name: value for name, value in body.items() if name not in _STATEFUL} | {"store": False}


def _response(call: Call, body: dict[str, Any]) -> dict[str, Any]:
    """vLLM calls an answer that was aborted completed."""
    if call.aborted and body["status"] == "completed":
        body["status"] = "cancelled"
    return without_extras(body) | {"store": False}
