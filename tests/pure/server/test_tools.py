"""Which schemas the arguments of a tool may have, and what becomes of them."""

from __future__ import annotations

from typing import Any

import pytest

from server.errors import BadRequest
from server.inference.dialects.registry import DIALECTS

TURNS = [{"role": "user", "content": "hi"}]
EMPTY = {"type": "object", "properties": {}, "additionalProperties": False}
ONE: dict[str, Any] = {"properties": {"a": {"type": "integer"}}, "required": ["a"]}
NONE: dict[str, Any] = {"type": "object", "properties": {}, "required": []}
OF_A = {"type": "object"} | ONE


def allowed(kind: str, schema: dict[str, Any], *, forced: bool = True, **fields: Any) -> dict[str, Any]:
    """The function of a request's only tool as the engine gets it; ``schema`` has its parameters, if any."""
    if kind == "chat":
        tool = {"type": "function", "function": {"name": "f", **schema, **fields}}
        body = {"messages": TURNS, "tools": [tool], "tool_choice": "required" if forced else "auto"}
    elif kind == "responses":
        tool = {"type": "function", "name": "f", **schema, **fields}
        body = {"input": "hi", "tools": [tool], "tool_choice": "required" if forced else "auto"}
    else:
        tool = {"name": "f", "input_schema": schema["parameters"], **fields}
        choice = {"type": "any" if forced else "auto"}
        body = {"messages": TURNS, "tools": [tool], "tool_choice": choice}
        if kind == "messages":
            body["max_tokens"] = 5
    (kept,) = DIALECTS[kind].allowed_fields(body)["tools"]
    return dict(kept.get("function", kept))


@pytest.mark.parametrize("kind", ["chat", "responses"])
@pytest.mark.parametrize("given", [{}, {"parameters": None}, {"parameters": {}}])
def test_no_parameters_are_an_empty_object_where_a_call_has_to_fit(kind: str, given: dict[str, Any]) -> None:
    assert allowed(kind, given)["parameters"] == EMPTY
    assert allowed(kind, given, forced=False, strict=True)["parameters"] == EMPTY
    left = allowed(kind, given, forced=False)
    assert {name: left[name] for name in left.keys() & {"parameters"}} == given


@pytest.mark.parametrize("kind", ["chat", "responses"])
@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({"description": "none"}, {"type": "object", "description": "none"}),
        ({"required": []}, {"type": "object"}),
        ({"type": "object"}, {"type": "object"}),
        ({"type": ["object"]}, {"type": "object"}),
        ({"$ref": "#/$defs/a", "$defs": {"a": EMPTY}}, EMPTY | {"$defs": {"a": EMPTY}}),
        ({"$ref": "#/$defs/a", "$defs": {"a": ONE}}, ONE | {"$defs": {"a": ONE}, "type": "object"}),
        ({"$ref": "#"}, {"$ref": "#"}),
        ({"anyOf": [EMPTY, {"type": "object"}]}, {"anyOf": [EMPTY, {"type": "object"}]}),
        ({"type": ["object", "null"]}, {"type": "object"}),
        ({"type": ["object", "null"], "required": ["a"]}, {"type": "object"}),
        ({"anyOf": [EMPTY, {"type": "null"}]}, {"anyOf": [EMPTY]}),
        ({"oneOf": [{"type": "string"}, {"type": ["null", "object"]}]}, {"oneOf": [{"type": "object"}]}),
        ({"allOf": [EMPTY, {"type": ["object", "null"]}]}, {"allOf": [NONE]}),
        ({"anyOf": [True, {"$ref": "#/$defs/a"}]}, {"anyOf": [{"type": "object"}, {"$ref": "#/$defs/a"}]}),
        ({"anyOf": []}, {"anyOf": []}),
        # Beside a choice a grammar goes by nothing else, and a choice without a type may be a bare text.
        (ONE | {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, ONE | {"type": "object"}),
        (ONE | {"type": "object", "allOf": [{"if": {}, "then": {}}]}, ONE | {"type": "object"}),
        (
            {"type": "object", "oneOf": [{"required": ["a"]}, ONE]},
            {"type": "object", "oneOf": [{"type": "object"}, OF_A]},
        ),
        ({"anyOf": [{"anyOf": [ONE]}, {"enum": ["x"]}]}, {"anyOf": [{"type": "object"}, {"type": "object"}]}),
        (
            {"anyOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": ONE}},
            {"anyOf": [{"type": "object"}], "$defs": {"a": ONE}},
        ),
        (
            {"allOf": [OF_A, {"properties": {"a": {}, "b": {}}, "required": ["b", "c"]}]},
            {
                "allOf": [
                    {
                        "type": "object",
                        "properties": {"a": {"type": "integer"}, "b": {}},
                        "required": ["a", "b"],
                    }
                ]
            },
        ),
        (
            {"allOf": [{"$ref": "#/$defs/a"}, {}], "$defs": {"a": OF_A}},
            {"allOf": [OF_A], "$defs": {"a": OF_A}},
        ),
        ({"type": "object", "required": ["a"]}, {"type": "object"}),
        ({"enum": ["x", {"a": 1}]}, {"enum": [{"a": 1}]}),
        ({"const": {"a": 1}}, {"enum": [{"a": 1}]}),
    ],
)
def test_parameters_are_of_an_object(kind: str, given: dict[str, Any], made: dict[str, Any]) -> None:
    assert allowed(kind, {"parameters": given})["parameters"] == made


@pytest.mark.parametrize("kind", ["chat", "responses", "messages", "count_tokens"])
@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string"},
        {"type": ["array", "null"]},
        {"type": True},
        {"type": []},
        {"anyOf": [{"type": "null"}, {"type": "string"}]},
        {"allOf": [EMPTY, {"type": "string"}]},
        {"type": "object", "oneOf": [{"type": "integer"}]},
        {"const": "x"},
        {"type": "object", "enum": ["x", 1]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}},
        {"anyOf": [{"$ref": "#/$defs/a"}, False], "$defs": {"a": {"type": "string"}}},
    ],
)
def test_a_tool_whose_arguments_can_be_no_object_is_refused(
    kind: str, forced: bool, schema: dict[str, Any]
) -> None:
    with pytest.raises(BadRequest, match="the schema of an object") as refused:
        allowed(kind, {"parameters": schema}, forced=forced)
    where = {"chat": "function.parameters", "responses": "parameters"}.get(kind, "input_schema")
    assert refused.value.param == f"tools.0.{where}"


def test_the_input_of_a_message_s_tool_is_an_object_too() -> None:
    given = {"parameters": {"type": ["object", "null"], "properties": {}}}
    assert allowed("messages", given)["input_schema"] == {"type": "object", "properties": {}}
    assert allowed("messages", given, forced=False)["input_schema"] == given["parameters"]
