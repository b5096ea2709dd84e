"""Booleans and numbers inside a field of a request. Pydantic would read ``"false"`` or 0 there as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from server.inference.dialects.fields import check_boolean, check_integer

# Of all dialects, since none means something else by them; ``*`` is each item of an array.
BOOLEANS = (
    "input.*.async",
    "messages.*.content.*.closed",
    "messages.*.content.*.is_error",
    "messages.*.content.*.tool.definition.defer_loading",
    "messages.*.content.*.tool.definition.strict",
    "messages.*.tools.*.function.strict",
    "response_format.json_schema.strict",
    "stream_options.include_obfuscation",
    "stream_options.include_usage",
    "structured_outputs.disable_additional_properties",
    "structured_outputs.disable_any_whitespace",
    "system.*.is_error",
    "system.*.tool.definition.defer_loading",
    "system.*.tool.definition.strict",
    "text.format.strict",
    "tool_choice.disable_parallel_tool_use",
    "tools.*.async",
    "tools.*.defer_loading",
    "tools.*.function.defer_loading",
    "tools.*.function.strict",
    "tools.*.strict",
)
INTEGERS = ("thinking.budget_tokens",)
_EACH = "*"
_BY_FIELD: dict[str, list[tuple[list[str], Any]]] = {}
for _paths, _check in ((BOOLEANS, check_boolean), (INTEGERS, check_integer)):
    for _path in _paths:
        _name, *_rest = _path.split(".")
        _BY_FIELD.setdefault(_name, []).append((_rest, _check))


def check_nested(name: str, value: Any) -> None:
    """BadRequest where a boolean or an integer inside the field is something that could be read as one.

    A null asks for nothing there, too. What has another form than the field's is left to the engine.
    """
    for rest, check in _BY_FIELD.get(name, ()):
        for where, found in _at(name, value, rest):
            if found is not None:
                check(where, found)


def _at(where: str, value: Any, rest: Sequence[str]) -> Iterator[tuple[str, Any]]:
    if not rest:
        yield where, value
    elif rest[0] == _EACH:
        for place, item in enumerate(value if isinstance(value, list) else ()):
            yield from _at(f"{where}.{place}", item, rest[1:])
    elif isinstance(value, dict) and rest[0] in value:
        yield from _at(f"{where}.{rest[0]}", value[rest[0]], rest[1:])
