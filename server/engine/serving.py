"""The border to vLLM's serving objects: what is changed in them, and their errors as exceptions.

In a stream vLLM reports an error as one more event, ``data: {"error": {…, "code": status}}``. It is read
here, once, and raised.
"""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import AsyncIterator
from typing import Any

from pydantic import ValidationError

from server.engine.calls import Call, current_call
from server.engine.errors import FAILED, from_vllm, request_errors
from server.errors import Internal, ServerError

BROKEN = 'data: {"error"'


def resolve(name: str) -> Any:
    """What ``name``, as ``module:attribute``, is."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


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


async def until_broken(call: Call, chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    """A chat stream for vLLM's Anthropic converter, which would make an internal error of any error."""
    async for chunk in chunks:
        if chunk.startswith(BROKEN):
            call.failure = _error_of(call, chunk)
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


async def raise_errors(call: Call, chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    """``chunks``; raises a ServerError where vLLM reports one, and EngineDied where the engine is gone."""
    with request_errors():
        try:
            async for chunk in chunks:
                if chunk.startswith(BROKEN):
                    raise _error_of(call, chunk)
                yield chunk
        except ValidationError as exc:  # vLLM makes no valid event of its own of some errors
            raise (_known_error(call) or Internal(FAILED)) from exc


def _error_of(call: Call, chunk: str) -> ServerError:
    """What ``chunk``, vLLM's error event, reports; its code is a number, the HTTP status."""
    if (known := _known_error(call)) is not None:
        return known
    try:
        error = json.loads(chunk.removeprefix("data: "))["error"]
        return from_vllm(str(error["message"]), int(error["code"]), error.get("param"))
    except (ValueError, KeyError, TypeError):
        return Internal(FAILED)


def _known_error(call: Call) -> ServerError | None:
    """Why ``call`` ended, where we ended it ourselves."""
    return call.failure or (call.admission.refused if call.admission is not None else None)


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


def raise_if_error(call: Call | None, result: Any) -> None:
    """Raises what ``result``, vLLM's answer to ``call``, reports if it is an error."""
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    if isinstance(result, ErrorResponse):
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError  # vLLM turns it into an error response
        if call is not None and call.failure is not None:
            raise call.failure
        raise from_vllm(result.error.message, int(result.error.code), result.error.param)
