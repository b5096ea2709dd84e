"""The fake engine's chat, told as ``/v1/responses`` and ``/v1/messages`` tell it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from server.engine.calls import Call
from server.engine.serving import BROKEN, until_broken
from server.inference.dialects.messages import Messages


def as_chat(request: Any) -> Any:
    """vLLM's own conversion of an Anthropic request."""
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

    return AnthropicServingMessages.to_chat_completion_request(request)


def document(call: Call, chat: dict[str, Any]) -> dict[str, Any]:
    """A chat completion as a response of ``call``'s kind."""
    text = chat["choices"][0]["message"]["content"]
    usage, finish = chat["usage"], chat["choices"][0]["finish_reason"]
    tokens = {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}
    if call.kind == "messages":
        return {
            "id": f"msg_{call.id}",
            "type": "message",
            "role": "assistant",
            "model": chat["model"],
            "content": [{"type": "text", "text": text}],
            "stop_reason": {"stop": "end_turn", "length": "max_tokens"}.get(finish),
            "usage": tokens,
        }
    return _response(call, chat["model"], text, finish) | {
        "usage": {
            **tokens,
            "total_tokens": sum(tokens.values()),
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        }
    }


async def stream(call: Call, chat: AsyncIterator[str]) -> AsyncIterator[str]:
    """A chat stream with its usage, as a stream of ``call``'s kind."""
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

    if call.kind == "messages":
        converter = AnthropicServingMessages.message_stream_converter
        async for event in Messages().events(call, converter(None, until_broken(call, chat))):
            yield event
        return
    number = 0
    text, finish, model = "", None, ""
    usage: dict[str, Any] = {}
    async for chunk in chat:
        if chunk.startswith(BROKEN):
            yield chunk
            return
        if chunk == "data: [DONE]\n\n":
            break
        told = json.loads(chunk.removeprefix("data: "))
        model, usage = told["model"], told.get("usage") or usage
        for event in _opening(call, model) if number == 0 else ():
            yield _sse(event, number)
            number += 1
        for choice in told["choices"]:
            finish = choice["finish_reason"] or finish
            if delta := choice["delta"].get("content"):
                text += delta
                yield _sse(
                    {"type": "response.output_text.delta", **_AT, "delta": delta, "logprobs": []}, number
                )
                number += 1
    whole = {
        "choices": [{"message": {"content": text}, "finish_reason": finish}],
        "model": model,
        "usage": usage,
    }
    for event in _closing(call, document(call, whole), text):
        yield _sse(event, number)
        number += 1


_AT = {"item_id": "msg_0", "output_index": 0, "content_index": 0}


def _sse(event: dict[str, Any], number: int) -> str:
    return f"event: {event['type']}\ndata: {json.dumps({**event, 'sequence_number': number})}\n\n"


def _message(text: str | None, status: str) -> dict[str, Any]:
    content = [] if text is None else [_part(text)]
    return {"id": "msg_0", "type": "message", "role": "assistant", "content": content, "status": status}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _opening(call: Call, model: str) -> Iterator[dict[str, Any]]:
    begun = _response(call, model, None, None)
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    yield {"type": "response.output_item.added", "output_index": 0, "item": _message(None, "in_progress")}
    yield {"type": "response.content_part.added", **_AT, "part": _part("")}


def _closing(call: Call, response: dict[str, Any], text: str) -> Iterator[dict[str, Any]]:
    yield {"type": "response.output_text.done", **_AT, "text": text, "logprobs": []}
    yield {"type": "response.content_part.done", **_AT, "part": _part(text)}
    yield {"type": "response.output_item.done", "output_index": 0, "item": _message(text, "completed")}
    yield {"type": "response.completed", "response": response}


def _response(call: Call, model: str, text: str | None, finish: str | None) -> dict[str, Any]:
    """``text`` is None while it is in progress."""
    ended = {"length": "incomplete", "abort": "cancelled"}.get(finish or "", "completed")
    return {
        "id": f"resp_{call.id}",
        "object": "response",
        "created_at": 0,
        "model": model,
        "status": "in_progress" if text is None else ended,
        "incomplete_details": {"reason": "max_output_tokens"} if finish == "length" else None,
        "output": [] if text is None else [_message(text, "completed")],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "none",
        "tools": [],
        "top_p": 1.0,
        "store": False,
        "usage": None,
    }
