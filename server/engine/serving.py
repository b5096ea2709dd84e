"""The border to vLLM's serving objects: what is changed in them, and their errors as exceptions.

In a stream vLLM reports an error as one more event, ``data: {"error": {…, "code": status}}``. It is read
here, once, and raised.
"""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from pydantic import BaseModel, ValidationError

from server.engine.calls import Call, current_call
from server.engine.errors import FAILED, from_vllm, named, request_errors
from server.engine.manners import current_manner
from server.engine.templates import templates
from server.errors import BadRequest, Internal, ServerError

BROKEN = 'data: {"error"'
# Of what vLLM gives a tokenizer, what no template is given.
_NOT_VARIABLES = frozenset({"chat_template", "return_dict", "tokenize"})


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


async def numbers_of(answering: Awaitable[Any]) -> dict[str, Any]:
    """vLLM's answer with labels or scores as plain data.

    Internal where one is no number: vLLM makes JSON of it, which has none such, and its ValueError would read
    as the client's mistake.
    """
    try:
        return embeddings_of(await answering)
    except ValueError as exc:
        if "not JSON compliant" in str(exc):
            raise Internal("The model's answer to this input is not a number.") from exc
        raise


async def until_broken(call: Call, chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    """A chat stream for vLLM's Anthropic converter, which would make an internal error of any error."""
    async for chunk in chunks:
        if chunk.startswith(BROKEN):
            call.failure = _error_of(call, chunk)
            return
        yield chunk


def with_object_calls(completion: Any) -> Any:
    """A chat completion whose tool calls can be told as Anthropic's, where an input is an object.

    Arguments that are none, as those that the end of the answer cut off, become text: a call of which a part
    is missing must not be made.
    """
    for choice in getattr(completion, "choices", ()):
        message = choice.message
        whole = [called for called in message.tool_calls or () if _is_object(called.function.arguments)]
        if len(whole) == len(message.tool_calls or ()):
            continue
        broken = [called.function.arguments for called in message.tool_calls if called not in whole]
        message.content = "".join([message.content or "", *broken])
        message.tool_calls = whole
        if not whole and choice.finish_reason == "tool_calls":
            choice.finish_reason = "stop"
    return completion


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def public_name(base_name: str) -> Any:
    """What ``model`` shows in answers: the customer's own name, never the engine's."""

    def model_name(lora_request: Any = None) -> str:
        call = current_call.get()
        return call.public_model if call is not None else base_name

    return model_name


def own_templates(online: Any) -> None:
    """Lets ``online``, vLLM's OnlineRenderer, use the template of a version for its chats.

    The template is rendered in another process, and never seen by vLLM, which would compile it in this one.
    """
    prepare, renderer = online.preprocess_chat, online.renderer
    apply = getattr(renderer, "_apply_chat_template_async", None)
    if apply is None:
        return  # a model with a renderer of its own has no templates

    async def preprocess_chat(*args: Any, **kwargs: Any) -> Any:
        manner = current_manner.get()
        if manner is not None and manner.template is not None:
            kwargs["default_template_content_format"] = manner.content_format
        return await prepare(*args, **kwargs)

    async def apply_chat_template(
        model_config: Any, tokenizer: Any, conversation: Any, *, tools: Any = None, **kwargs: Any
    ) -> Any:
        manner = current_manner.get()
        if manner is None or manner.template is None:
            return await apply(model_config, tokenizer, conversation, tools=tools, **kwargs)
        special = {n: t for n, t in tokenizer.special_tokens_map.items() if isinstance(t, str)}
        variables = {name: value for name, value in kwargs.items() if name not in _NOT_VARIABLES}
        return await templates().render(
            manner.tenant,
            manner.template,
            conversation,
            tools,
            {**special, **manner.special_tokens, **variables},
        )

    online.preprocess_chat = preprocess_chat
    renderer._apply_chat_template_async = apply_chat_template


def going_on(convert: Any) -> Any:
    """vLLM's conversion of Anthropic's messages, so that an answer which the request begins is gone on with.

    Where the last message is the assistant's own, vLLM alone would begin another answer after it. BadRequest
    for messages of which none has any content.
    """

    def to_chat_completion_request(request: Any, **options: Any) -> Any:
        chat = convert(request, **options)
        if not chat.messages:
            raise BadRequest("messages: one that has content is needed", param="messages")
        last = chat.messages[-1]
        if last.get("role") == "assistant" and last.get("content") and not last.get("tool_calls"):
            chat.add_generation_prompt, chat.continue_final_message = False, True
        return chat

    return to_chat_completion_request


def chat_for_messages(create: Any) -> Any:
    """Chat under vLLM's Anthropic handler: with our id, and with its errors kept (see ``until_broken``)."""

    async def create_chat_completion(request: Any, raw_request: Any = None) -> Any:
        call = current_call.get()
        if call is None:
            raise RuntimeError("the engine was asked for a message outside an admitted call")
        request.request_id = call.id
        if call.manner is not None and call.manner.stop_token_ids:
            request.stop_token_ids = [*(request.stop_token_ids or ()), *call.manner.stop_token_ids]
        result = await create(request, raw_request)
        if not hasattr(result, "model_dump"):
            return until_broken(call, result)
        return with_object_calls(result)

    return create_chat_completion


async def raise_errors(call: Call, prompt: str | None, chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    """``chunks``; raises a ServerError where vLLM reports one, and EngineDied where the engine is gone."""
    with request_errors():
        try:
            async for chunk in chunks:
                if chunk.startswith(BROKEN):
                    raise named(_error_of(call, chunk), prompt)
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


def shallow(result: Any) -> dict[str, Any]:
    """A pydantic model without what is None. Its lists are not copied: they may have millions of tokens."""
    told = {name: value for name, value in result if value is not None}
    return {
        name: value.model_dump(exclude_none=True) if isinstance(value, BaseModel) else value
        for name, value in told.items()
    }


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
