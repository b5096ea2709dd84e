"""What vLLM's serving objects take and give, by kind: their request models, and their streams as SSE.

A stream that breaks says so in an event of its own, ``data: {"error": {…, "code": status}}``, whatever its
kind: vLLM does so for chat, and ``server.inference.completion`` turns it into a status or into the kind's
own event.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from pydantic import ValidationError

from server.engine.calls import Call, EngineDied, Kind, TokenKind, current_call
from server.engine.errors import FAILED, from_vllm, request_errors
from server.errors import Internal, ServerError, status_of

BROKEN = 'data: {"error"'

_OPENING = ("response.created", "response.in_progress")
# vLLM's own fields, which are null unless one of its extras was asked for.
_VLLM_FIELDS = (
    "kv_transfer_params", "ec_transfer_params", "prompt_token_ids", "prompt_logprobs", "metrics",
    "input_messages", "output_messages",
)  # fmt: skip


def request_model(kind: Kind | TokenKind, body: dict[str, Any]) -> Any:
    """vLLM's request model for ``body``."""
    match kind:
        case "chat":
            from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest as Model
        case "completion":
            from vllm.entrypoints.openai.completion.protocol import CompletionRequest as Model
        case "responses":
            from vllm.entrypoints.openai.responses.protocol import ResponsesRequest as Model
        case "messages":
            from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest as Model
        case "embedding":
            from vllm.entrypoints.pooling.embed.protocol import EmbeddingCompletionRequest as Model
        case "count_tokens":
            from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest as Model
        case "tokenize" if "messages" in body:
            from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest as Model
        case "tokenize":
            from vllm.entrypoints.serve.tokenize.protocol import TokenizeCompletionRequest as Model
        case "detokenize":
            from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest as Model
    return Model


def document(call: Call, kind: Kind, result: Any) -> dict[str, Any]:
    """vLLM's response object as the JSON that a customer gets."""
    if kind == "responses":
        return _response(call, result.model_dump(mode="json", by_alias=True))
    if kind == "messages":
        return {**result.model_dump(exclude_none=True), "id": f"msg_{call.id}"}
    return _plain(result.model_dump())


def embeddings_as_data(serving: Any) -> None:
    """Lets ``serving``, vLLM's ServingEmbedding, answer with plain data instead of a response in bytes."""

    def content_alone(content: dict[str, Any]) -> dict[str, Any]:
        return content

    if hasattr(serving, "json_response_cls"):
        serving.json_response_cls = content_alone


def embeddings_of(result: Any) -> dict[str, Any]:
    """The answer as plain data. Since 0.33 vLLM makes a response in bytes whatever the class."""
    shown: dict[str, Any] = json.loads(result.body) if hasattr(result, "body") else result
    return shown


async def response_events(call: Call, events: AsyncIterator[Any]) -> AsyncIterator[str]:
    """Events of ``/v1/responses`` as SSE.

    vLLM opens the stream before the engine has looked at the request. The opening is held back until it has,
    so that what the engine refuses is refused before the first byte.
    """
    opening: list[str] = []
    async for event in events:
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


async def message_events(call: Call, events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Events of ``/v1/messages`` under our id, and the error that ``until_broken`` kept at their end."""
    async for event in events:
        if event.startswith("event: error"):
            yield broken(FAILED, 500)
            return
        if event.startswith("event: message_start"):
            event = event.replace(f'"chatcmpl-{call.id}"', f'"msg_{call.id}"', 1)
        yield event
    if call.broken is not None:
        yield call.broken


async def until_broken(call: Call, chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    """A chat stream for vLLM's Anthropic converter, which would make an internal error of any error."""
    async for chunk in chunks:
        if chunk.startswith(BROKEN):
            call.broken = chunk
            return
        yield chunk


def calls_are_objects(completion: Any) -> bool:
    """Whether a chat completion's tool calls can be told as Anthropic's, whose input is an object."""
    try:
        return all(
            isinstance(json.loads(called.function.arguments), dict)
            for choice in getattr(completion, "choices", ())
            for called in choice.message.tool_calls or ()
        )
    except ValueError:
        return False


def broken(message: str, status: int, param: str | None = None) -> str:
    """The event that says that a stream broke."""
    return f"data: {json.dumps({'error': {'message': message, 'param': param, 'code': status}})}\n\n"


def _plain(body: dict[str, Any]) -> dict[str, Any]:
    for name in _VLLM_FIELDS:
        if body.get(name) is None:
            body.pop(name, None)
    return body


def _response(call: Call, body: dict[str, Any]) -> dict[str, Any]:
    """vLLM calls an answer that was aborted completed."""
    if call.aborted and body["status"] == "completed":
        body["status"] = "cancelled"
    return _plain(body) | {"store": False}


def public_name(base_name: str) -> Any:
    """What ``model`` shows in answers: the customer's own name, never the engine's."""

    def model_name(lora_request: Any = None) -> str:
        call = current_call.get()
        return call.public_model if call is not None else base_name

    return model_name


def chat_for_messages(create: Any) -> Any:
    """Chat under vLLM's Anthropic handler: with our id, and with its errors kept (see ``until_broken``)."""

    async def create_chat_completion(request: Any, raw_request: Any = None) -> Any:
        call = current_call.get()
        if call is None:
            raise RuntimeError("the engine was asked for a message outside an admitted call")
        request.request_id = call.id
        result = await create(request, raw_request)
        if not hasattr(result, "model_dump"):
            return until_broken(call, result)
        if not calls_are_objects(result):
            raise Internal("The model called a tool with arguments that are no JSON object.")
        return result

    return create_chat_completion


async def in_call_context(call: Call, stream: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """``stream``, which may ask the engine for more at any step."""
    end = object()
    while True:
        token = current_call.set(call)
        try:
            item = await anext(stream, end)
        finally:
            current_call.reset(token)
        if item is end:
            return
        yield item


async def errors_as_events(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    """``chunks``; an exception becomes their last event, as vLLM does it for chat."""
    try:
        with request_errors():
            try:
                async for chunk in chunks:
                    yield chunk
            except ValidationError as exc:  # of an event of vLLM's own
                raise Internal(FAILED) from exc
    except EngineDied:
        yield broken(FAILED, 500)
    except ServerError as exc:
        yield broken(exc.message, status_of(exc)[0], exc.param)


def raise_if_error(result: Any) -> None:
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    if isinstance(result, ErrorResponse):
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError  # vLLM turns it into an error response
        raise from_vllm(result.error.message, int(result.error.code), result.error.param)
