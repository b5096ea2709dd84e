"""What a call of a tool is held to of its schema: its arguments are an object whatever the schema says. Pure.

A grammar goes by the first of ``$ref``, ``const``, ``enum`` and the choices, and by nothing beside it, and
takes a choice that names no type for any text (``server.engine.passed_over``). For an answer such a schema is
refused. Tools come with such schemas from everywhere, and what is not held then is up to the model; but
clients rely on a call's arguments being an object, and on the properties that stand at the top.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

OBJECT: dict[str, Any] = {"type": "object"}
_CHOICES = ("anyOf", "oneOf", "allOf")
_DEFINITIONS = ("$defs", "definitions")
# An object that has none of these is any. A grammar takes it for one without properties where it says more.
_NAMING = frozenset({"properties", "patternProperties", "additionalProperties", "propertyNames"})
_SAYING = ("title", "description", *_DEFINITIONS)
_LONGEST_CHAIN = (
    16  # of references from one to the next; a longer one is left to the compiler, which refuses loops
)


def held_arguments(schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """``schema`` with what makes its values objects; None where no object fits it."""
    if _is_another(schema) or _is_another(schema := _reached(schema, schema)):
        return None
    if "const" in schema or isinstance(schema.get("enum"), list):
        members = [schema["const"]] if "const" in schema else schema["enum"]
        objects = [member for member in members if isinstance(member, dict)]
        return {"enum": objects} if objects else None
    if schema.get("properties"):
        return {name: value for name, value in schema.items() if name not in _CHOICES} | OBJECT
    kept = dict(schema) | (OBJECT if isinstance(schema.get("type"), list) else {})
    for name in _CHOICES:
        if isinstance(listed := schema.get(name), list) and listed:
            members = [_member(part, schema) for part in listed]
            fit = [member for member in members if member is not None]
            if not fit or (name == "allOf" and len(fit) < len(listed)):
                return None
            if name == "allOf" and len(fit) > 1:
                fit = [_joined(_reached(member, schema) for member in fit)]
            kept[name] = fit
    return kept if kept.keys() & {"$ref", *_CHOICES} else _object(kept)


def _object(schema: Mapping[str, Any]) -> dict[str, Any]:
    """With its type, and where it names no property without what else it says of them."""
    named = not schema.keys().isdisjoint(_NAMING)
    return {name: value for name, value in schema.items() if named or name in _SAYING} | OBJECT


def _reached(part: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """What ``part`` refers to within ``root``, with the definitions of both."""
    for _ in range(_LONGEST_CHAIN):
        found = _referred(part.get("$ref"), root)
        if found is None:
            return part
        part = {name: root[name] for name in _DEFINITIONS if name in root} | found
    return part


def _referred(ref: object, root: Any) -> dict[str, Any] | None:
    """None where ``ref`` is none, or leads to no schema that says something."""
    if not isinstance(ref, str) or not ref.startswith("#"):
        return None
    found = root
    for name in ref.removeprefix("#").split("/")[1:]:
        found = found.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else None


def _member(part: Any, root: Mapping[str, Any]) -> Any:
    """One of a choice as a schema of objects, in which other choices are not held; None where none fits."""
    if not isinstance(part, dict):
        return dict(OBJECT) if part is True else None
    if _is_another(part) or _is_another(reached := _reached(part, root)):
        return None
    if reached.keys().isdisjoint({"const", "enum", *_CHOICES}) and reached.get("type") == "object":
        return part if "$ref" in part else _object(part)
    if "$ref" in part and _referred(part["$ref"], root) is None:
        return part  # leads nowhere, which the compiler says
    if "$ref" not in part and part.keys().isdisjoint({"const", "enum", *_CHOICES}):
        return _object(part)
    return dict(OBJECT)


def _joined(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """An object with the properties of all ``parts``, of which the first to name one says what it is."""
    properties: dict[str, Any] = {}
    wanted: set[str] = set()
    known = False
    for part in parts:
        named, listed = part.get("properties"), part.get("required")
        known = known or isinstance(named, dict)
        for name, value in named.items() if isinstance(named, dict) else ():
            properties.setdefault(name, value)
        wanted.update(one for one in (listed if isinstance(listed, list) else ()) if isinstance(one, str))
    required = [name for name in properties if name in wanted]
    return {**OBJECT, "properties": properties, "required": required} if known else dict(OBJECT)


def _is_another(schema: Mapping[str, Any]) -> bool:
    """Whether its type is not an object's, nor one of several that are."""
    kind = schema.get("type")
    return kind not in (None, "object") and not (isinstance(kind, list) and "object" in kind)
