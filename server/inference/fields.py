"""Which fields of a request this API means, by kind: everything else is refused by name or dropped.

A field that is silently ignored changes the meaning of a request, and vLLM's own extras are the operator's
business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.engine.calls import Kind, TokenKind
from server.errors import BadRequest

_SHARED = {
    "model", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n", "presence_penalty", "seed",
    "stop", "stream", "stream_options", "temperature", "top_p", "user",
}  # fmt: skip
_PROMPT = {"model", "messages", "system", "tool_choice", "tools", "thinking", "output_config"}
ALLOWED: Mapping[Kind | TokenKind, frozenset[str]] = {
    "chat": frozenset(
        _SHARED
        | {
            "messages", "max_completion_tokens", "parallel_tool_calls", "reasoning_effort", "response_format",
            "tool_choice", "tools", "top_logprobs",
        }
    ),
    "completion": frozenset(_SHARED | {"prompt", "echo", "suffix"}),
    "responses": frozenset(
        {
            "model", "include", "input", "instructions", "max_output_tokens", "max_tool_calls", "metadata",
            "parallel_tool_calls", "reasoning", "store", "stream", "stream_options", "temperature", "text",
            "tool_choice", "tools", "top_logprobs", "top_p", "truncation", "user",
        }
    ),
    "messages": frozenset(
        _PROMPT | {"max_tokens", "stop_sequences", "stream", "temperature", "top_k", "top_p"}
    ),
    "embedding": frozenset({"model", "dimensions", "encoding_format", "input", "user"}),
    "count_tokens": frozenset(_PROMPT),
    "tokenize": frozenset(
        {
            "model", "prompt", "messages", "tools", "add_generation_prompt", "add_special_tokens",
            "continue_final_message", "return_token_strs",
        }
    ),
    "detokenize": frozenset({"model", "tokens"}),
}  # fmt: skip
# What says something about the vendor's service, not about the answer: accepted and dropped.
_OPENAI = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store"})
_ANTHROPIC = frozenset({"metadata", "service_tier", "cache_control", "inference_geo"})
DROPPED: Mapping[Kind | TokenKind, frozenset[str]] = {
    "chat": _OPENAI,
    "completion": _OPENAI,
    "responses": _OPENAI - {"metadata", "store"},
    "messages": _ANTHROPIC,
    "embedding": frozenset(),
    "count_tokens": _ANTHROPIC,
    "tokenize": frozenset(),
    "detokenize": frozenset(),
}
RESPONSE_FORMATS = frozenset({"text", "json_object", "json_schema"})
STREAM_OPTIONS: Mapping[Kind | TokenKind, frozenset[str]] = {
    "chat": frozenset({"include_usage", "include_obfuscation"}),
    "completion": frozenset({"include_usage", "include_obfuscation"}),
    "responses": frozenset({"include_obfuscation"}),
}
# Nothing is kept of a response: there is no state that could cross from one customer to another.
_STATEFUL = {
    "background": "Responses are answered at once; leave out background and wait, or stream.",
    "conversation": "Conversations are not kept; send the earlier turns as input.",
    "previous_response_id": "Responses are not kept; send the earlier turns as input.",
    "prompt": "There are no prompt templates here; send instructions and input.",
    "store": "Responses are not kept; leave out store, or send false.",
}
DEFAULT_MODEL = "default"


def meant(kind: Kind | TokenKind, body: dict[str, Any]) -> dict[str, Any]:
    """``body`` with only what this API means. Raises BadRequest naming the first field that it does not."""
    if kind == "responses":
        body = _stateless(body)
    for name in body:
        if name not in ALLOWED[kind] and name not in DROPPED[kind]:
            raise _unknown(name)
    kept = {name: value for name, value in body.items() if name not in DROPPED[kind]}
    options = kept.get("stream_options")
    if isinstance(options, dict):
        for name in options:
            if name not in STREAM_OPTIONS[kind]:
                raise _unknown(f"stream_options.{name}")
        kept["stream_options"] = {k: v for k, v in options.items() if k != "include_obfuscation"}
    wanted = kept.get("response_format")
    if isinstance(wanted, dict) and str(wanted.get("type")) not in RESPONSE_FORMATS:
        formats = ", ".join(sorted(RESPONSE_FORMATS))
        raise BadRequest(f"response_format.type must be one of {formats}", param="response_format")
    if kind == "responses":
        _functions_only(kept)
        kept.pop("stream_options", None)
    return kept | {"model": body.get("model") or DEFAULT_MODEL}


def _stateless(body: dict[str, Any]) -> dict[str, Any]:
    for name, cure in _STATEFUL.items():
        if body.get(name):
            raise BadRequest(cure, code="stateless", param=name)
    return {name: value for name, value in body.items() if name not in _STATEFUL} | {"store": False}


def _functions_only(body: dict[str, Any]) -> None:
    """OpenAI's other tools are run by a server, and this one runs none."""
    tools = body.get("tools")
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        if isinstance(tool, dict) and tool.get("type") != "function":
            raise BadRequest("Only tools of the type function are served.", param=f"tools.{index}.type")


def _unknown(param: str) -> BadRequest:
    return BadRequest(f"Unrecognized request argument supplied: {param}", code="unknown_field", param=param)
