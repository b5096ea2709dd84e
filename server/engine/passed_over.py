"""What xgrammar passes over in a JSON schema without a word, beside what vLLM knows of. Pure.

Found by asking its grammars of schemas; read in its converter: of a schema it takes the first of ``_CHOICES``
and nothing beside it, without one it goes by ``type``, and without that by what only objects or arrays have.
Of a pattern it leaves out what looks ahead, and anchors that stand in the middle.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

_NEVER = frozenset({"not", "if", "$dynamicRef", "dependentSchemas", "dependentRequired"})
# In the order in which they are taken.
_CHOICES = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
# A schema without a type is taken for an object or an array where it has one of these.
_OF_OBJECTS = frozenset({"properties", "additionalProperties", "unevaluatedProperties"})
_OF_ARRAYS = frozenset({"items", "prefixItems", "unevaluatedItems"})
_ONLY_WITH_TYPE = frozenset(
    {"required", "minProperties", "maxProperties", "patternProperties", "propertyNames"}
    | {"minItems", "maxItems", "pattern", "format", "minLength", "maxLength"}
    | {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
)
_TYPED = frozenset({"type"}) | _OF_OBJECTS | _OF_ARRAYS
_ASSERTS = _ONLY_WITH_TYPE | _OF_OBJECTS | _OF_ARRAYS | frozenset(_CHOICES)
_BESIDE = {choice: _ASSERTS - {choice} for choice in _CHOICES}
_SCHEMAS_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_SCHEMAS = frozenset(
    {"items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf", "unevaluatedProperties"}
)
_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: _is_number(value) and (isinstance(value, int) or value.is_integer()),
    "number": lambda value: _is_number(value),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
}
# An escape or a class of characters, whose brackets and anchors are themselves. A class without an end takes
# all that is left, so that no character is looked at twice.
_PLAIN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*(?:\]|\\?\Z)", re.DOTALL)
_IN_THE_MIDDLE = re.compile(r"(?<![(|:>])\^|\$(?![)|])")


def is_passed_over(schema: Mapping[str, Any]) -> bool:
    """Whether a part of ``schema`` would not hold. Looks at subschemas only: a property may be called
    ``not``, and a constant may be anything."""
    waiting: list[Any] = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            if _is_partly_taken(part):
                return True
            waiting += [part[name] for name in part.keys() & _SCHEMAS]
            for name in part.keys() & _SCHEMAS_BY_NAME:
                waiting += part[name].values() if isinstance(part[name], dict) else ()
    return False


def _is_partly_taken(part: Mapping[str, Any]) -> bool:
    ref = part.get("$ref")
    if part.keys() & _NEVER or (isinstance(ref, str) and not ref.startswith("#")):
        return True
    if (choice := next((name for name in _CHOICES if name in part), None)) is not None:
        return not part.keys().isdisjoint(_BESIDE[choice]) or not _is_of_type(part, choice)
    if part.keys().isdisjoint(_TYPED):
        return not part.keys().isdisjoint(_ONLY_WITH_TYPE)
    named, known = part.get("required"), part.get("properties")
    if isinstance(named, list) and not {*map(str, named)} <= {*(known if isinstance(known, dict) else ())}:
        return True
    patterns = [part.get("pattern"), *_names(part.get("patternProperties"))]
    return any(isinstance(pattern, str) and _looks_around(pattern) for pattern in patterns)


def _is_of_type(part: Mapping[str, Any], choice: str) -> bool:
    """Whether each of the ``choice`` has the ``type`` that stands beside it, which is passed over."""
    if "type" not in part:
        return True
    types = _names_of(part["type"])
    if choice in ("const", "enum"):
        members = [part["const"]] if choice == "const" else _listed(part["enum"])
        return all(any(_TYPES[one](member) for one in types if one in _TYPES) for member in members)
    if choice == "$ref":
        return False
    allowed = {*types, "integer"} if "number" in types else set(types)
    return all(
        isinstance(member, dict) and "type" in member and allowed.issuperset(_names_of(member["type"]))
        for member in _listed(part[choice])
    )


def _looks_around(pattern: str) -> bool:
    """Whether ``pattern`` has what is left out of it."""
    rest = _PLAIN.sub("a", pattern)
    inner = rest.removeprefix("^").removesuffix("$")
    return "(?=" in rest or "(?!" in rest or _IN_THE_MIDDLE.search(inner) is not None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _names_of(types: Any) -> list[str]:
    """Of a ``type``; what is none is left to the compiler, which refuses it."""
    return [one for one in _listed(types) if isinstance(one, str)]


def _names(value: Any) -> Collection[str]:
    return value.keys() if isinstance(value, dict) else ()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
