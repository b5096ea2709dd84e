"""What a field of a request may hold, for every API surface: the vendors' fields and those of vLLM's users.

A field that is silently ignored changes what a request means, and some of vLLM's own are the operator's
business. So each field of a dialect is honoured, or an advice that changes no answer, or served only with
the values that ask for nothing, or the operator's; all others are refused by name. A null asks for nothing
and is accepted for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.engine.structure import check_size
from server.errors import BadRequest

# Sampling of vLLM's, beside the vendors', in chat and completions.
VLLM_SAMPLING = frozenset(
    {
        "allowed_token_ids", "bad_words", "ignore_eos", "include_stop_str_in_output", "logprob_token_ids",
        "min_p", "min_tokens", "prompt_logprobs", "repetition_detection", "repetition_penalty",
        "return_token_ids", "return_tokens_as_token_ids", "skip_special_tokens",
        "spaces_between_special_tokens", "stop_token_ids", "structured_outputs", "thinking_token_budget",
        "top_k", "truncate_prompt_tokens", "truncation_side", "add_special_tokens",
    }
)  # fmt: skip
# How vLLM renders a chat.
VLLM_CHAT = frozenset(
    {
        "add_generation_prompt", "chat_template_kwargs", "continue_final_message", "documents", "echo",
        "include_reasoning",
    }
)  # fmt: skip
# What vLLM called ``structured_outputs`` before, and the name there.
GUIDED: Mapping[str, str] = {
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_whitespace_pattern": "whitespace_pattern",
}
# What may say how fast or how often something is sent, and changes no answer.
VLLM_ADVICE = frozenset({"stream_interval"})
# vLLM's fields that say which adapter, cache, place in the queue or template a request gets.
RESERVED = frozenset(
    {
        "cache_salt", "chat_template", "ec_transfer_params", "embed_dtype", "enable_response_messages",
        "endianness", "guided_decoding_backend", "kv_transfer_params", "logits_processors", "lora_request",
        "media_io_kwargs", "mm_payload", "mm_processor_kwargs", "padding", "previous_input_messages",
        "priority", "prompt_embeds", "request_id", "return_mm_kwargs", "return_prompt_text",
        "return_token_offsets", "routed_experts_prompt_start", "session_id", "use_activation", "vllm_xargs",
        "watermarking",
    }
)  # fmt: skip

# What is served with some values alone: the others, and why nothing else is.
Only = tuple[tuple[Any, ...], str]
BEAMS: Mapping[str, Only] = {
    "length_penalty": ((1, 1.0), "It is a part of beam search, which is not served."),
    "early_stopping": ((False,), "It is a part of beam search, which is not served."),
    "use_beam_search": ((False,), "Beam search is not served; sample with n instead."),
}
MODERATION: Only = ((), "Nothing is moderated here; call a moderation service yourself.")

INTEGERS = frozenset(
    {
        "dimensions", "max_completion_tokens", "max_output_tokens", "max_tokens", "max_tool_calls",
        "min_tokens", "n", "prompt_logprobs", "seed", "thinking_token_budget", "top_k", "top_logprobs",
        "truncate_prompt_tokens",
    }
)  # fmt: skip
_NUMBERS = frozenset(
    {"frequency_penalty", "min_p", "presence_penalty", "repetition_penalty", "temperature", "top_p"}
)
_BOOLEANS = frozenset(
    {
        "add_generation_prompt", "add_special_tokens", "continue_final_message", "echo", "ignore_eos",
        "include_reasoning", "include_stop_str_in_output", "parallel_tool_calls", "return_token_ids",
        "return_token_strs", "return_tokens_as_token_ids", "skip_special_tokens",
        "spaces_between_special_tokens", "stream", "use_activation",
    }
)  # fmt: skip
_TOKEN_LISTS = frozenset({"allowed_token_ids", "logprob_token_ids", "stop_token_ids", "tokens"})
_PROMPTS = frozenset({"input", "prompt"})
# What the engine's arrays hold; a larger one would end a step, and the engine with it.
_LARGEST_INTEGER = 2**31 - 1
_JSON_TYPES = {str: "a string", bool: "a boolean", float: "a decimal", int: "an integer", list: "an array"}
# Beyond these a penalty makes infinities of ordinary logits.
LEAST_REPETITION_PENALTY, LARGEST_REPETITION_PENALTY = 0.01, 100
# The engine looks for patterns of each length after each token.
LONGEST_REPETITION = 128

_CONSTRAINTS = frozenset({"choice", "grammar", "json", "json_object", "regex", "structural_tag"})
_STRUCTURED = _CONSTRAINTS | {
    "disable_additional_properties", "disable_any_whitespace", "whitespace_pattern",
}  # fmt: skip
MAX_CHOICES = 1024
# Arguments of transformers' and vLLM's own functions, where a template's variables belong.
_NO_TEMPLATE_VARIABLES: Mapping[str, str] = {
    "chat_template": "the model's own template is used",
    "conversation": "send messages",
    "documents": "send documents as a field of its own",
    "messages": "send messages",
    "tools": "send tools",
    "add_generation_prompt": "send add_generation_prompt as a field of its own",
    "continue_final_message": "send continue_final_message as a field of its own",
}
_NO_TEMPLATE_PREFIXES = ("padding", "truncation", "max_length", "return_", "tokeniz", "processor_kwargs")
MAX_TEMPLATE_VARIABLES = 32


def unknown_field(param: str) -> BadRequest:
    """The refusal of a field that is no part of the API."""
    return BadRequest(f"Unrecognized request argument supplied: {param}", code="unknown_field", param=param)


def reserved_field(param: str) -> BadRequest:
    """The refusal of a field of vLLM's that the operator decides."""
    reason = "it is decided by whoever operates this server, not by a request"
    return BadRequest(f"{param} is not accepted: {reason}. Leave it out.", code="unknown_field", param=param)


def check_only(name: str, value: Any, only: Only) -> None:
    """BadRequest (``unsupported_parameter``) unless ``value`` is one of those that ask for nothing."""
    values, reason = only
    if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values):
        raise BadRequest(f"{name} is not served here: {reason}", code="unsupported_parameter", param=name)


def check_type(name: str, value: Any, *, integer: bool = False, boolean: bool = False) -> None:
    """BadRequest where a number, a boolean or a list of token ids is something that could be read as one.

    ``integer`` and ``boolean`` for a field that is one in this dialect only.
    """
    if integer or name in INTEGERS:
        check_integer(name, value)
    elif name in _NUMBERS:
        _check(name, value, int | float, "a number")
        if name == "repetition_penalty":
            _check_range(name, value, LEAST_REPETITION_PENALTY, LARGEST_REPETITION_PENALTY)
    elif boolean or name in _BOOLEANS:
        check_boolean(name, value)
    elif name in _TOKEN_LISTS:
        _check_tokens(name, value)
    elif name in _PROMPTS and isinstance(value, list):
        _check_prompts(name, value)
    elif name == "repetition_detection" and isinstance(value, dict):
        for member, number in value.items():
            _check(f"{name}.{member}", number, int, "an integer")
            _check_range(f"{name}.{member}", number, 0, LONGEST_REPETITION)
    elif name == "logit_bias" and isinstance(value, dict):
        for token, bias in value.items():
            _check(f"{name}.{token}", bias, int | float, "a number")


def check_integer(name: str, value: Any) -> None:
    """BadRequest for what is no integer, or one that the engine's arrays do not hold."""
    _check(name, value, int, "an integer")
    if abs(value) > _LARGEST_INTEGER and name != "seed":
        raise BadRequest(f"{name}: at most {_LARGEST_INTEGER}, but got more", param=name)


def check_boolean(name: str, value: Any) -> None:
    """BadRequest for what is neither true nor false."""
    if not isinstance(value, bool):
        raise _wrong(name, value, "a boolean")


def _check(name: str, value: Any, kind: Any, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise _wrong(name, value, wanted)


def _check_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise BadRequest(f"{name} must be from {least} to {most}", param=name)


def _check_prompts(name: str, value: list[Any]) -> None:
    """Token ids, or lists of them, hold nothing that could be read as one."""
    kinds = set(map(type, value))
    if kinds != {int} and int in kinds:
        _check_tokens(name, value)
    elif bool in kinds or float in kinds:
        raise _wrong(name, value, "texts or token ids")
    for place, item in enumerate(value if list in kinds else ()):
        if isinstance(item, list):
            _check_prompts(f"{name}.{place}", item)


def _check_tokens(name: str, value: Any) -> None:
    if not isinstance(value, list):
        raise _wrong(name, value, "an array of integers")
    if set(map(type, value)) <= {int}:  # at once: there may be as many as the vocabulary has
        return
    for place, token in enumerate(value):
        _check(f"{name}.{place}", token, int, "an integer")


def _wrong(name: str, value: Any, wanted: str) -> BadRequest:
    given = _JSON_TYPES.get(type(value), "an object")
    return BadRequest(f"{name}: expected {wanted}, but got {given} instead", param=name)


def with_structured_outputs(body: dict[str, Any]) -> dict[str, Any]:
    """``body`` with its constraint in ``structured_outputs`` alone, whichever of vLLM's names it had.

    BadRequest where there is more than one, or one that vLLM does not know.
    """
    guided = {GUIDED[name]: body[name] for name in GUIDED if body.get(name) is not None}
    if not _CONSTRAINTS & guided.keys():
        guided = {}  # the blanks of nothing
    kept = {name: value for name, value in body.items() if name not in GUIDED}
    if guided:
        if kept.get("structured_outputs") is not None:
            raise BadRequest(
                "Send structured_outputs or guided fields, not both.", param="structured_outputs"
            )
        kept["structured_outputs"] = guided
    if (given := kept.get("structured_outputs")) is not None:
        kept["structured_outputs"] = _structured(given)
    return kept


def _structured(given: Any) -> dict[str, Any]:
    where = "structured_outputs"
    if not isinstance(given, dict):
        raise _wrong(where, given, "an object")
    for name in given:
        if name not in _STRUCTURED:
            raise unknown_field(f"{where}.{name}")
    kept = {name: value for name, value in given.items() if value is not None}
    if len(_CONSTRAINTS & kept.keys()) != 1:
        raise BadRequest(f"{where} needs one of {', '.join(sorted(_CONSTRAINTS))}.", param=where)
    choices = kept.get("choice")
    if isinstance(choices, list) and not 1 <= len(choices) <= MAX_CHOICES:
        raise BadRequest(f"{where}.choice needs 1 to {MAX_CHOICES} texts.", param=f"{where}.choice")
    for name, value in kept.items():
        texts = value if isinstance(value, list) else [value]
        check_size(sum(len(text) for text in texts if isinstance(text, str)), f"{where}.{name}")
    return kept


def check_template_variables(given: Any) -> None:
    """BadRequest for ``chat_template_kwargs`` that are more than variables of the chat template."""
    where = "chat_template_kwargs"
    if not isinstance(given, dict):
        raise _wrong(where, given, "an object")
    if len(given) > MAX_TEMPLATE_VARIABLES:
        raise BadRequest(f"{where} has more than {MAX_TEMPLATE_VARIABLES} members.", param=where)
    for name in given:
        cure = _NO_TEMPLATE_VARIABLES.get(name)
        if cure is None and name.startswith(_NO_TEMPLATE_PREFIXES):
            cure = "it is no variable of a chat template"
        if cure is not None:
            raise BadRequest(f"{where}.{name} is not accepted: {cure}.", param=f"{where}.{name}")
