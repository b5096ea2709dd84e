"""How many items the fields of a request may have, looked at before a model of vLLM sees them.

The vendors' own bounds where they have one (tools, logit_bias, metadata), else far more than anybody sends.
Text is bounded by the body, and all items together by ``CLIENT_JSON``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.inspection import strict_json
from server.engine import MAX_STOPS
from server.errors import BadRequest

# What a prompt's text may hold, an adapter's file may not; tools' schemas nest deeper than either.
CLIENT_JSON = strict_json.Bounds(max_items=1 << 18, max_nodes=1 << 15, max_depth=100, allow_nul=True)
# What sets something: its longest list names a thousand adapters, and each wrong field is an error.
SETTING_JSON = strict_json.Bounds(max_items=1 << 12, max_nodes=1 << 12, max_depth=32, allow_nul=True)
MAX_ITEMS: Mapping[str, int] = {
    "bad_words": 1024,
    "documents": 1024,
    "guided_choice": 1024,
    "include": 64,
    "input": 2048,
    "messages": 2048,
    "stop": MAX_STOPS,
    "stop_sequences": MAX_STOPS,
    "system": 1024,
    "tools": 128,
}
MAX_MEMBERS: Mapping[str, int] = {"logit_bias": 1024, "metadata": 16, "stream_options": 16}
MAX_PARTS = 1024
# Lists of a turn: its parts, the calls in it, a summary of its reasoning, what a call gave.
PARTED = ("content", "tool_calls", "summary", "output")
MAX_TOKEN_IDS: Mapping[str, int] = {"logprob_token_ids": 128, "stop_token_ids": 1024}
# A list of these is one prompt, which the model's length bounds.
_TOKENS = {int}
_TURNS = frozenset({"input", "messages"})
_OBJECTS = frozenset({"messages", "tools"})


def check_sizes(body: Mapping[str, Any]) -> None:
    """Raises BadRequest naming the first field that has too many items, or items that are no objects."""
    for name, value in body.items():
        if isinstance(value, list):
            _check_list(name, value)
        elif isinstance(value, dict) and len(value) > MAX_MEMBERS.get(name, len(value)):
            raise BadRequest(f"{name} has more than {MAX_MEMBERS[name]} members.", param=name)


def _check_parts(turn: str, item: Mapping[str, Any]) -> None:
    """Raises BadRequest for more than ``MAX_PARTS`` in one list of a turn, with what is in them."""
    for member in PARTED:
        parts = item.get(member)
        if isinstance(parts, list) and len(parts) + _within(parts) > MAX_PARTS:
            where = f"{turn}.{member}"
            raise BadRequest(f"{where} has more than {MAX_PARTS} parts.", param=where)


def _within(parts: list[Any]) -> int:
    """Parts of parts, as those of a tool's result."""
    contents = (part.get("content") for part in parts if isinstance(part, dict))
    return sum(len(content) for content in contents if isinstance(content, list))


def _check_list(name: str, value: list[Any]) -> None:
    if len(value) > MAX_TOKEN_IDS.get(name, len(value)):
        raise BadRequest(f"{name} has more than {MAX_TOKEN_IDS[name]} items.", param=name)
    if len(value) > MAX_ITEMS.get(name, len(value)) and set(map(type, value)) != _TOKENS:
        raise BadRequest(f"{name} has more than {MAX_ITEMS[name]} items.", param=name)
    for place, item in enumerate(value):
        if isinstance(item, dict):
            parts = item.get("content")
            if name in _TURNS and isinstance(parts, dict):  # vLLM would read it as no parts at all
                where = f"{name}.{place}.content"
                raise BadRequest(f"{where} must be a text, or a list of parts.", param=where)
            _check_parts(f"{name}.{place}", item)
        elif name in _OBJECTS:
            raise BadRequest(f"{name}.{place} must be an object.", param=f"{name}.{place}")
        else:
            break  # lists of texts and tokens: the model checks them, and stops at the first that is none
